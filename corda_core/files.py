"""Write files whole or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""How folders of half-written files begin: a killed process leaves them behind."""


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
def replacing_in(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; at the end its files are renamed into ``folder``, last name first.

    A process that is killed, or an error, leaves the old files or none, never half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as fresh:
        yield Path(fresh)
        for file in sorted(Path(fresh).iterdir(), reverse=True):
            os.replace(file, folder / file.name)


def write_whole(path: Path, data: bytes) -> None:
    """Write one file."""
    with replacing_in(path.parent) as fresh:
        (fresh / path.name).write_bytes(data)
