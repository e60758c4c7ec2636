"""Folders that one run at a time writes to."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from corda_core.files import PARTIAL

LOCK = ".lock"
"""What the run that writes to a folder holds; the file stays, the lock goes with the process."""


LOCK_WAIT = 6.0
"""Seconds that a lock is waited for: workers of a DataLoader share it, and outlive a killed process by up to five."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or what it came from, says that there was no room to write."""
    seen: BaseException | None = error
    while seen is not None:
        # Words: safetensors has an error of its own for it, and torch.save one of its container's position.
        if getattr(seen, "errno", None) == errno.ENOSPC or re.search("No space left on device|unexpected pos", str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for it out of a folder, until the end or this process's death.

    What dead processes left half written in it is removed.

    Raises:
        BlockingIOError: If another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=LOCK_WAIT)
    try:
        lock.acquire()
    except Timeout:
        # Not "from": the cause says nothing more.
        raise BlockingIOError(f"{folder} is in use by another run; wait until that has ended, or name another output.") from None
    try:
        clear_partial(folder)
        yield
    finally:
        lock.release()


def clear_partial(folder: Path) -> None:
    """Remove what dead processes left half written in a folder that is locked; not below it, where others may write."""
    for left in list(folder.glob(f"{PARTIAL}*")):
        shutil.rmtree(left, ignore_errors=True)
