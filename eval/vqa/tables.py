"""Benchmarks as tables of ``datasets``, images inside, in the columns of the copies that people measure on (most are lmms-lab's).

A table is a .parquet file, a folder that holds such or was written by ``save_to_disk``, or an id of the datasets hub. An id is taken from
the cache of ``datasets``, and from the network only with ``download``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.vqa.files import rows_of
from corda_vlm.data.sources import HUB_ID, SHARD, DataConfig, load_rows

SUBSETS = {"lmms-lab/MMBench": "en", "lmms-lab/POPE": "default", "lmms-lab/ScienceQA": "ScienceQA-FULL"}
"""Of ids with several configurations the one that is read."""


def is_table(source: str | Path) -> bool:
    """Return whether a source is a table, or could be an id of one: no path, and ``owner/name``."""
    path = Path(source).expanduser()
    if path.is_dir():
        return any(path.glob("*.parquet")) or any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    return path.suffix == ".parquet" or (not path.exists() and "/" in str(source) and HUB_ID.fullmatch(str(source)) is not None)


@dataclass(frozen=True)
class Table:
    """How a benchmark is laid out in a table."""

    columns: Sequence[str]
    """What each row must have a value in."""

    split: str
    """The split that is reported."""

    subset: str | None = None
    """The configuration of an id."""

    def rows(
        self, source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False
    ) -> list[Mapping[str, Any]]:
        """Return a split's rows, all or the first: what they have values for, ``image`` as its file or a function that reads it.

        Args:
            source: The table.
            split: None takes the one that is reported, or all of a table without splits.
            limit: How many rows.
            download: Whether an id may be fetched.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            ModuleNotFoundError: If ``datasets`` is not installed.
            ValueError: If the table is broken, has no such split, or lacks a column or a value; the text counts the rows.
        """
        path = Path(source).expanduser()
        has_splits = (
            not path.exists() or (path / "dataset_dict.json").exists() or any(SHARD.fullmatch(part.name) for part in path.glob("*"))
        )
        subset = None if path.exists() else self.subset or SUBSETS.get(str(source))
        config = DataConfig(str(source), split or (self.split if has_splits else "train"), subset, limit=limit)
        rows, folder = load_rows(config, download=download)
        filled = []
        for place in range(len(rows)):
            row = {name: value for name, value in rows[place].items() if value is not None}
            if "image" in row:
                row["image"] = _image(rows, place, row["image"], folder, f"{source}, row {place}")
            filled.append({name: value for name, value in row.items() if value is not None})
        return rows_of(filled, self.columns, source)


def _image(rows: Sequence[Any], place: int, value: Any, folder: Path, where: str) -> Path | Callable[[], bytes] | None:
    """Return an image's file, or what reads it from its row again: all images of a benchmark are more than the memory holds."""
    if not isinstance(value, Mapping) or not {"bytes", "path"} <= set(value):
        raise ValueError(f"{where} has a {type(value).__name__} for its image; expected an image of datasets; take another copy.")
    if value["bytes"] is not None:
        return partial(_stored_image, rows, place)
    return None if value["path"] is None else folder / value["path"]


def _stored_image(rows: Sequence[Any], place: int) -> bytes:
    stored: bytes = rows[place]["image"]["bytes"]
    return stored
