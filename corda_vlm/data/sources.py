"""A data option -> rows as plain values: from JSON, parquet and ``datasets``' folders, and ids of the datasets hub.

Rows are counted from 0, as ``rows[0]`` is; lines of a file from 1, as editors do.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from corda_core.files import read_json
from corda_vlm.data.arrow import ArrowRows
from corda_vlm.failures import one_line
from corda_vlm.options import Count, Options, Place, one_of

FIELDS = ("text", "question", "answer", "conversations", "image")
Rows = Sequence[Mapping[str, Any]]

SHARD = re.compile(r"(?P<split>.+)-\d+-of-(?P<count>\d+)(-[0-9a-f]+)?\.parquet")
"""The hub's names of parquet files."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PARQUET_MARK = b"PAR1"
"""How a parquet file starts, and how it ends if it is whole."""


@dataclass(frozen=True)
class DataConfig(Options):
    """Where samples come from, and which columns make up a sample."""

    source: Place
    """A .json (list of rows), .jsonl or .parquet file, a folder of .parquet files or of ``save_to_disk``, or an id of the datasets hub."""

    split: str = "train"
    """Split of an id or a folder that has splits; of an id also a slice, "train[:1000]"."""

    subset: str | None = None
    """Name of an id's configuration; None takes its only one."""

    images: Place | None = None
    """Folder that relative paths of images start from; None takes that of the source."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> its column, for "text", "question", "answer", "conversations", "image"; by default the column of the same name."""

    prompt: str | None = None
    """Template of the question: "{column}" or "{column[0]}" is replaced by a row's value, a name in ``columns`` by that column's."""

    on_broken: Annotated[str, one_of("stop", "skip")] = "stop"
    """"stop" or "skip": at an image that cannot be read, stop; or read all images once before the run and leave out such rows."""

    limit: Count | None = None
    """How many rows are taken, from the first; None takes all."""

    max_pixels: Count | None = None
    """How many pixels an image may have at most, as a small file may fill the memory; None takes Pillow's limit, 89,478,485."""

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        super().__post_init__()
        if not self.source:
            raise ValueError(f"source is {self.source!r}; expected a file, a folder or an id of the datasets hub.")
        if not set(self.columns) <= set(FIELDS):
            raise ValueError(f"columns is {self.columns!r}; expected field: column, with fields out of {list(FIELDS)}.")
        if self.prompt is not None and {"text", "conversations"} & set(self.columns):
            raise ValueError(
                f"columns maps {sorted(self.columns)} and prompt makes a question; leave out prompt, or text and conversations."
            )
        if self.prompt is not None and not self.placeholders:
            raise ValueError(f"prompt is {self.prompt!r}, which names no column; expected at least one between braces, as in {{question}}.")
        if "" in self.placeholders:
            raise ValueError(f"prompt is {self.prompt!r}; expected a column's name between braces, as in {{question}}.")

    @property
    def placeholders(self) -> Sequence[str]:
        """The columns that ``prompt`` names."""
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.prompt or "") if name is not None]
        except ValueError as error:
            raise ValueError(f"prompt is {self.prompt!r}: {error}; expected {{column}}, and doubled braces for braces as text.") from error
        return [re.split(r"[.\[]", name)[0] for name in names]


def load_rows(config: DataConfig, *, download: bool = False) -> tuple[Rows, Path]:
    """Return a source's rows as plain values, and the folder that relative paths of their images start from.

    An id of the hub comes from the cache of ``datasets``, and from the network only with ``download``. Parquet files are written once, as
    Arrow files, to that cache; rows are then read from the disk when they are asked for, their images as ``bytes`` and ``path``. Rows of
    JSON stay in memory.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ModuleNotFoundError: If ``datasets`` is needed and not installed.
        ValueError: If the source is broken, empty or of an unknown kind, or an option does not fit it.
    """
    path = Path(config.source)
    rows: Rows
    if path.is_dir():
        rows, folder = ArrowRows.of(_folder_table(path, config), config.limit), path
    elif path.exists():
        rows, folder = _file_rows(path, config), path.parent
    elif HUB_ID.fullmatch(config.source) and path.suffix not in FILE_READERS:
        rows, folder = ArrowRows.of(_hub_table(config, download), config.limit), Path()
    else:
        raise FileNotFoundError(f"source is {config.source!r}, but there is no such file or folder; correct the path.")
    if config.images is not None:
        folder = Path(config.images)
        if not folder.is_dir():
            raise FileNotFoundError(f"images is {config.images!r}, but there is no such folder; correct the path.")
    if not rows:
        raise ValueError(f"{config.source} holds no rows; expected at least one.")
    return rows, folder


def _file_rows(path: Path, config: DataConfig) -> Rows:
    """Return the rows of a file."""
    if path.suffix not in FILE_READERS:
        known = list(FILE_READERS)
        raise ValueError(f"{path} ends in {path.suffix!r}; expected one of {known}, a folder, or an id of the hub; convert it.")
    _refuse_splits(config)
    return FILE_READERS[path.suffix](path, config)


def _json_list(path: Path, config: DataConfig) -> Rows:
    rows = read_json(path, "expected a list of rows; get the file again, or mend it") if path.stat().st_size else []
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of rows; with one row a line, name the file .jsonl.")
    return _objects(rows[: config.limit], path)


def _json_lines(path: Path, config: DataConfig) -> Rows:
    with path.open("rb") as lines:
        filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        return _objects([_json_line(line, f"{path}, line {number}") for number, line in islice(filled, config.limit)], path)


def _objects(rows: list[Any], path: Path) -> Rows:
    """Return rows that are objects; refuse others."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}; expected an object of columns and values; mend the row.")
    return rows


def _json_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not whole JSON ({error}); expected one row a line; get the file again, or mend the line.") from error


def _parquet_file(path: Path, config: DataConfig) -> Rows:
    return ArrowRows.of(_parquet_table([path], config), config.limit)


FILE_READERS: Mapping[str, Callable[[Path, DataConfig], Rows]] = {".json": _json_list, ".jsonl": _json_lines, ".parquet": _parquet_file}
"""By a file's suffix: what reads its first ``limit`` rows."""


def _folder_table(path: Path, config: DataConfig) -> Any:
    """Return the table of a folder that was saved by ``save_to_disk``, or has parquet files."""
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _saved_table(path, config)
    return _parquet_table(_files_of_split(sorted(path.glob("*.parquet")), config), config)


def _parquet_table(files: Sequence[Path], config: DataConfig) -> Any:
    datasets = _import_datasets(config)
    for file in files:
        _check_whole(file)
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(
            f"{config.source} cannot be read ({reason}); expected filled parquet files of the same columns; get them again."
        ) from error


def _saved_table(path: Path, config: DataConfig) -> Any:
    """Return a split of a folder saved by ``save_to_disk``."""
    datasets = _import_datasets(config)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(
            f"{path} cannot be read ({one_line(error)}); expected a whole, filled folder of save_to_disk; save it again."
        ) from error
    if not isinstance(saved, dict):
        _refuse_splits(config)
        return saved
    _refuse_subset(config)
    if config.split not in saved:
        raise ValueError(f"{path} has the splits {sorted(saved)}, not {config.split!r}; set `split` to one of them.")
    return saved[config.split]


def _files_of_split(files: Sequence[Path], config: DataConfig) -> Sequence[Path]:
    """Return a folder's files; only those of the wanted split where their names have splits."""
    if not files:
        raise ValueError(
            f"{config.source} holds no .parquet files, and was not saved by save_to_disk; name the folder that holds the files."
        )
    shards = {file: match for file in files if (match := SHARD.fullmatch(file.name))}
    if not shards:
        _refuse_splits(config)
        return files
    _refuse_subset(config)
    chosen = [file for file, match in shards.items() if match["split"] == config.split]
    if not chosen:
        known = sorted({match["split"] for match in shards.values()})
        raise ValueError(f"{config.source} has files of the splits {known}, not {config.split!r}; set `split` to one of them.")
    count = int(shards[chosen[0]]["count"])
    if len(chosen) != count:
        raise ValueError(f"{config.source} has {len(chosen)} of the {count} files of the split {config.split!r}; get the others too.")
    return chosen


def _check_whole(file: Path) -> None:
    """Refuse a parquet file that lacks its start or end."""
    with file.open("rb") as content:
        start = content.read(len(PARQUET_MARK))
        content.seek(max(0, file.stat().st_size - len(PARQUET_MARK)))
        if not start == content.read() == PARQUET_MARK:
            raise ValueError(
                f"{file} is no whole parquet file (its start or end is missing), as after a broken download; get the file again."
            )


def _hub_table(config: DataConfig, download: bool) -> Any:
    """Return the table of an id of the datasets hub."""
    datasets = _import_datasets(config)
    name = f"source {config.source!r} (subset {config.subset!r}, split {config.split!r})"
    if download:
        try:
            return datasets.load_dataset(config.source, config.subset, split=config.split)
        except Exception as error:  # the hub's client lets through what several libraries raise
            reason = one_line(error.__cause__ or error)
            raise ValueError(
                f"{name} cannot be downloaded ({reason}); correct the options, or try again: what has come is kept."
            ) from error
    from datasets.packaged_modules.cache.cache import Cache

    try:
        # Not load_dataset: it asks the hub first, unless a variable was set before it was imported.
        cache = Cache(
            repo_id=config.source, dataset_name=config.source.split("/")[-1], config_name=config.subset, version="auto", hash="auto"
        )
        return cache.as_dataset(split=config.split)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} is neither a local path nor whole in the cache of datasets ({one_line(error)}); set `download: true`, or correct it."
        ) from error


def _import_datasets(config: DataConfig) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{config.source} is read by the package datasets, which is not installed; run: pip install 'corda-vlm[train]'."
        ) from error
    return datasets


def _refuse_splits(config: DataConfig) -> None:
    """Refuse a split where there are none."""
    _refuse_subset(config)
    if config.split != "train":
        raise ValueError(
            f"split is {config.split!r}, but {config.source} has no splits; leave `split` out, or name the file of that split."
        )


def _refuse_subset(config: DataConfig) -> None:
    """Refuse a configuration of what is no id."""
    if config.subset is not None:
        raise ValueError(f"subset is {config.subset!r}, but {config.source} is no id of the hub; leave `subset` out.")
