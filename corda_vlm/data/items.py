"""Rows of a source -> the items that collators take: texts as fields, images opened when they are asked for."""

import copy
import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from corda_core.layers import gathered, num_processes, process_rank
from corda_vlm.context import progress_bar
from corda_vlm.data.arrow import ArrowRows
from corda_vlm.data.conversation import TURN_KEYS, answer_of, text_of, turns_of
from corda_vlm.data.images import BrokenImageError, read_image
from corda_vlm.data.media import image_field, image_sources
from corda_vlm.data.rows import Row
from corda_vlm.data.sources import FIELDS, DataConfig, load_rows
from corda_vlm.failures import one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_THREADS = 32
"""Threads that read images at once."""


class Items(Dataset[dict[str, Any]], Sequence[dict[str, Any]]):
    """Samples as dicts of ``FIELDS``; images are opened, in RGB, when their sample is asked for.

    An item depends on its place only, not on what was read before or by which process.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str],
        folder: Path,
        config: DataConfig,
        needs_images: bool = False,
        left_out: Collection[int] = (),
    ) -> None:
        """Take rows, the column of each field, the folder of images, whether a row must have one, and which rows to leave out."""
        self.rows, self.columns, self.folder, self.config, self.needs_images = rows, columns, folder, config, needs_images
        self.places: Sequence[int] = [row for row in range(len(rows)) if row not in left_out] if left_out else range(len(rows))
        """The row of each item."""
        self.num_broken = len(left_out)
        """How many rows are left out, as their images cannot be read."""
        self.num_long = 0
        """How many are left out, as they are too long."""
        self.num_cut = 0
        """How many are cut, as they are too long."""
        self.max_tokens: int | None = None
        """After how many tokens samples are cut; None leaves them whole."""

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return the item at a place, or the items of a slice.

        Raises:
            ValueError: If the row has no text, a value of an unknown form, an image that cannot be read or a medium that nobody reads.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        with _telling_what_to_do():
            return self.read(self.places[index])

    def name_of(self, row: int) -> str:
        """Return what messages call a row."""
        return f"{self.config.source}, row {row}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the values of all rows that are not left out, in their order, and of where they are cut.

        Of pictures, names count, or sizes where the rows hold them: mending a file does not change the data.
        """
        digest = hashlib.sha256()
        rows: Iterable[Mapping[str, Any]] = self.rows
        if isinstance(self.rows, ArrowRows):
            digest.update(_as_line({name: list(names) for name, names in self.rows.class_names.items()}))
            rows = self.rows.with_lengths()
        places = self.places if isinstance(self.places, range) else set(self.places)
        for place, row in enumerate(rows):
            if place in places:
                digest.update(_as_line(row))
        if self.num_cut:
            digest.update(_as_line({"max_tokens": self.max_tokens}))
        return digest.hexdigest()

    def sources(self, row: int) -> tuple[dict[str, Any], list[Any], bool]:
        """Return a row's fields without its images, what each image is opened from, and whether they are a list.

        Raises:
            BrokenImageError: If an image is missing.
            ValueError: If the row has no text, a value of an unknown form or a medium that nobody reads.
        """
        values, where = self.rows[row], self.name_of(row)
        fields = _text_fields(values, self.columns, self.config, where)
        image = self._image(values, where)
        sources = image_sources(image, f"{where}, image")
        if "" in sources:
            raise BrokenImageError(f"{where}: the name of an image is empty")
        if self.needs_images and not sources:
            raise BrokenImageError(f"{where}: there is no image, without which this model learns nothing")
        return fields, sources, isinstance(image, (list, tuple))

    def in_folder(self, source: Any) -> Any:
        """Return what an image is opened from: a name is one of the images' folder."""
        return self.folder / source if isinstance(source, (str, Path)) else source

    def read(self, row: int) -> Row:
        """Return the item of a row.

        Raises:
            BrokenImageError: If an image is missing or cannot be read.
            ValueError: If the row has no text, a value of an unknown form or a medium that nobody reads.
        """
        fields, sources, is_list = self.sources(row)
        images = [self._opened(source, self.name_of(row)) for source in sources]
        return Row(fields | ({"image": images if is_list else images[0]} if images else {}), self.name_of(row), self.max_tokens)

    def without_long(self, left_out: Collection[int], num_cut: int, max_tokens: int | None) -> "Items":
        """Return these samples without some of their rows, and all others, of which ``num_cut`` are longer, cut after so many tokens."""
        some = copy.copy(self)
        some.places = [row for row in self.places if row not in left_out] if left_out else self.places
        some.num_long, some.num_cut, some.max_tokens = len(left_out), num_cut, max_tokens
        return some

    def _image(self, values: Mapping[str, Any], where: str) -> Any:
        """Return what a row has for its image: in the column that options name, or in the only one that holds images."""
        if "image" in self.config.columns:
            return values.get(self.config.columns["image"])
        try:
            return image_field(values, {*self.columns.values(), *self.config.placeholders})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _opened(self, source: Any, where: str) -> Image.Image:
        try:
            return read_image(self.in_folder(source), self.config.max_pixels)
        except BrokenImageError as error:
            raise BrokenImageError(f"{where}: {error}") from error


def load_items(
    config: DataConfig, *, download: bool = False, needs_images: bool = False, accepts: Callable[[Image.Image], Any] | None = None
) -> Items:
    """Return the items of a source (``load_rows``).

    With ``needs_images`` a row without an image counts as one whose image cannot be read. Rows of JSON are checked here, but for what is in
    their images; those of other sources when they are read. With ``on_broken: skip`` all images are read here once, by several threads, and
    rows whose images cannot be read are left out; under ``torch.distributed`` each process must call, and reads its share.

    Args:
        config: Where they come from.
        download: Whether the hub may be asked.
        needs_images: Whether a row must have an image.
        accepts: What else must take each image where broken ones are skipped, such as a model's image processor.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ModuleNotFoundError: If ``datasets`` is needed and not installed.
        ValueError: If the source is broken, empty or of an unknown kind, or an option does not fit it.
    """
    rows, folder = load_rows(config, download=download)
    columns = _columns_of_fields(config, rows.names if isinstance(rows, ArrowRows) else {name: None for row in rows for name in row})
    items = Items(rows, columns, folder, config, needs_images)
    if not isinstance(rows, ArrowRows):
        _check_rows(items)
    if config.on_broken == "stop":
        return items
    broken = _broken_rows(items, accepts)
    for reason in broken.values():
        logger.warning("%s; the row is left out.", reason)
    if len(broken) == len(rows):
        raise ValueError(f"{config.source} has {len(rows)} row(s), and no row's image can be read; check `images`, or mend the files.")
    return Items(rows, columns, folder, config, needs_images, broken)


def _as_line(row: Mapping[str, Any]) -> bytes:
    in_short = json.dumps(row, sort_keys=True, default=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value))
    return in_short.encode() + b"\n"


@contextmanager
def _telling_what_to_do() -> Iterator[None]:
    """Say of a broken image which options to change."""
    try:
        yield
    except BrokenImageError as error:
        raise ValueError(f"{error}; mend or remove it, correct `images`, or set `on_broken: skip`.") from error


def _check_rows(items: Items) -> None:
    """Refuse rows that can be seen to be wrong without opening their images."""
    for row, values in enumerate(items.rows):
        if items.config.on_broken == "stop":
            with _telling_what_to_do():
                items.sources(row)
        else:
            _text_fields(values, items.columns, items.config, items.name_of(row))


def _broken_rows(items: Items, accepts: Callable[[Image.Image], Any] | None) -> dict[int, str]:
    """Return why the images of rows cannot be read; each process must call it. Other errors wait until a row is asked for."""

    def why(row: int) -> str | None:
        try:
            images = items.read(row).get("image", [])
        except BrokenImageError as error:
            return str(error)
        except ValueError:
            return None
        if accepts is not None:
            for image in images if isinstance(images, list) else [images]:
                try:
                    accepts(image)
                except Exception as error:  # processors may raise anything
                    return f"{items.name_of(row)}: the model's processor refuses the image ({one_line(error)})"
        return None

    return told_of_each(range(len(items.rows)), why, "images")


def told_of_each(rows: Sequence[int], tell: Callable[[int], T | None], title: str) -> dict[int, T]:
    """Return what is told of rows, in their order, but None; read by several threads, by each process a share: each must call it."""
    share = rows[process_rank() :: num_processes()]
    with _one_thread_each(), ThreadPool(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        answers = pool.imap(tell, share, chunksize=16)
        told = {row: answer for row in progress_bar(share, title) if (answer := next(answers)) is not None}
    return dict(sorted((row, answer) for part in gathered(told) for row, answer in part.items()))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads of its own in each of ours, which would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _columns_of_fields(config: DataConfig, names: Iterable[str]) -> Mapping[str, str]:
    """Return the column of each field that the source has."""
    there = list(names)
    wanted = [(f"columns.{name}", column) for name, column in config.columns.items()]
    wanted += [("prompt", config.columns.get(name, name)) for name in config.placeholders]
    for option, column in wanted:
        if column not in there:
            raise ValueError(f"{config.source} has no column {column!r}, which `{option}` names; columns there: {there}.")
    columns = {name: name for name in FIELDS if name in there}
    if "messages" in there:
        columns = {"conversations": "messages"} | columns
    columns |= config.columns
    if config.prompt is None and not {"text", "question", "conversations"} & set(columns):
        raise ValueError(
            f"{config.source} has the columns {there}, but none for text; say in `columns` which one is the question, the text or the "
            "conversations."
        )
    return columns


def _text_fields(row: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig, where: str) -> dict[str, Any]:
    """Return the fields of a row other than its image."""
    fields: dict[str, Any] = {}
    values = {name: row.get(column) for name, column in columns.items()}
    if config.prompt is not None:
        if any({**row, **values}.get(name) not in (None, "") for name in config.placeholders):
            fields["question"] = _filled(config.prompt, row, values, where)
    else:
        fields |= {name: text_of(values[name], f"{where}, {name}") for name in ("text", "question") if values.get(name) not in (None, "")}
        turns = values.get("conversations")
        if turns:
            turns_of(turns, where)
            fields["conversations"] = [{name: turn[name] for name in TURN_KEYS if name in turn} for turn in turns]
    if not any(fields.values()):
        raise ValueError(f"{where} has no text (its columns: {list(row)}); mend or remove the row, or say in `columns` where the text is.")
    answer = answer_of(values.get("answer"), f"{where}, answer")
    return fields if answer is None else fields | {"answer": answer}


def _filled(prompt: str, row: Mapping[str, Any], values: Mapping[str, Any], where: str) -> str:
    """Return the prompt with the values of a row's columns and fields, empty where there is none."""
    named = {name: value for name, value in {**row, **values}.items() if value is not None}
    try:
        return prompt.format_map(defaultdict(str, named))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fill the prompt {prompt!r} ({error!r}); mend the row or `prompt`.") from error
