"""Folders that one run at a time writes to, however many processes it has."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from corda_core.files import PARTIAL
from corda_core.layers import from_first_process, process_rank

LOCK = ".lock"
"""The file that the run which writes to a folder locks; the file stays, the lock goes with the process."""
LOCK_WAIT = 6.0
"""Seconds that a lock is waited for: workers of a DataLoader share it, and outlive a killed process by up to five."""


def processes() -> PartialState:
    """Return the group of processes that `accelerate launch` or `torchrun` started, or this one alone; the first call joins it.

    Without accelerators, accelerate must be told to use CPUs, or it takes this process to be the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this run, of however many processes, lives.

    Raises:
        BlockingIOError: If another run has it.
    """
    with ExitStack() as stack:
        refusal = None
        if process_rank() == 0:
            try:
                stack.enter_context(locked(folder))
            except BlockingIOError as error:
                refusal = str(error)
        refusal = from_first_process(refusal)
        if refusal is not None:
            raise BlockingIOError(refusal)
        yield


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
