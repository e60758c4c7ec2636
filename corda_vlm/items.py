"""Rows of a source -> the items that collators take: texts as fields, images opened when they are asked for."""

import errno
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch.utils.data import Dataset

from corda_vlm.images import UNREADABLE, open_image, why_unreadable
from corda_vlm.sources import FIELDS, ArrowRows, DataConfig, load_rows

logger = logging.getLogger(__name__)

MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO)
"""What no file is to blame for: too many open ones, a failing disk."""


class Items(Dataset[dict[str, Any]], Sequence[dict[str, Any]]):
    """Samples as dicts of ``FIELDS``; images are opened, in RGB, when their sample is asked for.

    An item depends on its place only, not on what was read before or by which process. With ``on_broken="skip"`` a row whose image
    cannot be read gives the next readable row's item, going round at the end.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], folder: Path, config: DataConfig, needs_images: bool = False
    ) -> None:
        """Take rows, the column of each field, the folder that relative paths of images start from, and whether a row must have one."""
        self.rows, self.columns, self.folder, self.config, self.needs_images = rows, columns, folder, config, needs_images
        # In shared memory: workers of a DataLoader mark rows for all.
        self._broken = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    @property
    def num_broken(self) -> int:
        """How many broken rows have been met so far, in all worker processes."""
        return int(self._broken.sum())

    def __len__(self) -> int:
        """Return the number of rows, broken ones included."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the item at a place, or the items of a slice.

        Raises:
            ValueError: If the row has no text or a value of an unknown form; or its image cannot be read and ``on_broken`` is "stop", or
                no row's image can be read.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        first = range(len(self))[index]
        for row in chain(range(first, len(self)), range(first)):
            if self._broken[row]:
                continue
            try:
                return self._read(row)
            except _BrokenImageError as error:
                if self.config.on_broken == "stop":
                    raise ValueError(f"{error}; mend or remove it, correct `images`, or set `on_broken: skip`.") from error
                self._broken[row] = True
                logger.warning("%s; the next readable row is taken instead.", error)
        raise ValueError(f"{self.config.source} has {len(self)} row(s), and no row's image can be read; check `images`, or mend the files.")

    def _read(self, row: int) -> dict[str, Any]:
        where = f"{self.config.source}, row {row}"
        values = self.rows[row]
        fields = _text_fields(values, self.columns, self.config, where)
        image = values.get(self.columns["image"]) if "image" in self.columns else None
        images = [_read_image(source, name, where) for source, name in _image_sources(image, self.folder, where)]
        if not images and self.needs_images:
            raise _BrokenImageError(f"{where}: there is no image, without which this model learns nothing")
        if not images:
            return fields
        return fields | {"image": images if isinstance(image, (list, tuple)) else images[0]}


def load_items(config: DataConfig, *, download: bool = False, needs_images: bool = False) -> Items:
    """Return the items of a source (``load_rows``).

    With ``needs_images`` a row without an image counts as one whose image cannot be read. Texts of JSON are checked here, those of other
    sources when they are read.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ModuleNotFoundError: If ``datasets`` is needed and not installed.
        ValueError: If the source is broken, empty or of an unknown kind, or an option does not fit it.
    """
    rows, folder = load_rows(config, download=download)
    columns = _columns_of_fields(config, rows.names if isinstance(rows, ArrowRows) else {name: None for row in rows for name in row})
    if not isinstance(rows, ArrowRows):
        for number, row in enumerate(rows):
            _text_fields(row, columns, config, f"{config.source}, row {number}")
    return Items(rows, columns, folder, config, needs_images)


class _BrokenImageError(Exception):
    """An image that cannot be read."""


def _columns_of_fields(config: DataConfig, names: Iterable[str]) -> Mapping[str, str]:
    """Return the column of each field that the source has.

    Raises:
        ValueError: If a column that an option names is missing, or there is no text.
    """
    there = list(names)
    wanted = [(f"columns.{name}", column) for name, column in config.columns.items()]
    wanted += [("prompt", config.columns.get(name, name)) for name in config.placeholders]
    for option, column in wanted:
        if column not in there:
            raise ValueError(f"{config.source} has no column {column!r}, which `{option}` names; columns there: {there}.")
    columns = {name: name for name in FIELDS if name in there}
    if "images" in there:
        columns = {"image": "images"} | columns
    columns |= config.columns
    if config.prompt is None and not {"text", "question", "conversations"} & set(columns):
        raise ValueError(
            f"{config.source} has the columns {there}, but none for text; say in `columns` which one is the question, the text or the "
            "conversations."
        )
    return columns


def _text_fields(row: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig, where: str) -> dict[str, Any]:
    """Return the fields of a row other than its image.

    Raises:
        ValueError: If the row has no text, or a value is of an unknown form.
    """
    fields: dict[str, Any] = {}
    values = {name: row.get(column) for name, column in columns.items()}
    if config.prompt is not None:
        if any({**row, **values}.get(name) not in (None, "") for name in config.placeholders):
            fields["question"] = _filled(config.prompt, row, values, where)
    else:
        fields |= {name: _text(values[name], f"{where}, {name}") for name in ("text", "question") if values.get(name) not in (None, "")}
        if values.get("conversations"):
            fields["conversations"] = _turns(values["conversations"], where)
    if not any(fields.values()):
        raise ValueError(f"{where} has no text (its columns: {list(row)}); mend or remove the row, or say in `columns` where the text is.")
    answers = Counter(_answers(values.get("answer"), where))
    if answers:
        fields["answer"] = answers.most_common(1)[0][0]  # of equals, the first met
    return fields


def _filled(prompt: str, row: Mapping[str, Any], values: Mapping[str, Any], where: str) -> str:
    """Return the prompt with the values of a row's columns and fields, empty where there is none."""
    named = {name: value for name, value in {**row, **values}.items() if value is not None}
    try:
        return prompt.format_map(defaultdict(str, named))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fill the prompt {prompt!r} ({error!r}); mend the row or `prompt`.") from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is a {type(value).__name__}; expected text or a number; say in `columns` where the text is.")
    return str(value)


def _turns(value: Any, where: str) -> list[dict[str, str]]:
    """Return a conversation's turns, with nothing but speaker and text."""
    for turn in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise ValueError(f'{where} has the turn {str(turn)[:80]!r}; expected a list of {{"from": speaker, "value": text}}.')
    return [{"from": turn["from"], "value": turn["value"]} for turn in value]


def _answers(value: Any, where: str) -> list[str]:
    """Return all answers of a row: none, one, or those of several people."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [answer for one in value for answer in _answers(one, where)]
    if isinstance(value, Mapping):
        if "answer" not in value:
            raise ValueError(
                f'{where}, answer has the keys {list(value)}; expected text, a number, {{"answer": text}}, or a list of these.'
            )
        return _answers(value["answer"], where)
    return [_text(value, f"{where}, answer")]


def _image_sources(value: Any, folder: Path, where: str) -> list[tuple[Any, str]]:
    """Return what each image of a row is opened from (a path, bytes or a PIL image), and its name for messages."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [source for one in value for source in _image_sources(one, folder, where)]
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        if value.get("bytes") is not None:
            return [(value["bytes"], str(value.get("path") or "in the row"))]
        return _image_sources(value.get("path"), folder, where)
    if isinstance(value, (str, Path)):
        return [(folder / value, str(folder / value))]
    if isinstance(value, (bytes, Image.Image)):
        return [(value, "in the row")]
    raise ValueError(f"{where}, image is a {type(value).__name__}; expected a path, bytes, a PIL image, a list of these, or none.")


def _read_image(source: Any, name: str, where: str) -> Image.Image:
    """Return an image in RGB.

    Raises:
        _BrokenImageError: If it cannot be read.
    """
    try:
        return open_image(source)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise _BrokenImageError(f"{where}: the image {name} cannot be read ({why_unreadable(error)})") from error
