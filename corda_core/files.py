"""Write files whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_in(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; at the end its files are renamed into ``folder``, last name first.

    A process that is killed, or an error, leaves the old files or none, never half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        yield Path(fresh)
        for file in sorted(Path(fresh).iterdir(), reverse=True):
            os.replace(file, folder / file.name)


def write_whole(path: Path, data: bytes) -> None:
    """Write one file."""
    with replacing_in(path.parent) as fresh:
        (fresh / path.name).write_bytes(data)
