"""Samples that are longer than a model takes: refused, left out or cut, before anything is trained on them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corda_vlm.data.images import size_of
from corda_vlm.data.items import Items, told_of_each
from corda_vlm.data.samples import Collator, read_sample
from corda_vlm.data.tokens import Sample, encode, length_without_images

logger = logging.getLogger(__name__)

NEAR = 16
"""Tokens by which a length that is reckoned from parts may be wrong."""
LONGEST = 3
"""Tokens that a byte of text may become: one, and some more where a tokenizer writes characters out before it reads them."""
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Long:
    """A sample of too many tokens."""

    length: int
    can_be_cut: bool
    """Whether whole images and something to learn are left."""


def within_length(items: Items, collate: Collator, max_length: int | None, on_long: str) -> Items:
    """Return samples of no more tokens than a model takes, its images' tokens among them.

    All rows are looked at here once, images by their headers, by several threads and, under ``torch.distributed``, by all processes, each
    of which must call. What cannot be read, or has no text, is left as it is: it is refused where it is read.

    Args:
        items: The samples.
        collate: Encodes them, and knows what the model can read.
        max_length: The most tokens; None takes the model's positions, where they are known.
        on_long: "stop" refuses longer samples; "skip" leaves them out; "cut" takes their end off, and leaves those out that would lose part
            of an image or all that is to be learned.

    Raises:
        ValueError: If there are longer samples and ``on_long`` is "stop", all samples would be left out, or the model has fewer positions
            than ``max_length``.

    Note:
        How many tokens an image becomes is asked of the processor once for each size of images that there is.
    """
    positions = collate.limits.max_tokens
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"training.max_length is {max_length:,}, but the model has {positions:,} positions; expected at most these.")
    limit = positions if max_length is None else max_length
    if limit is None:
        return items
    lengths = _Lengths(items, collate, limit)
    long = told_of_each(items.places, lengths.long, "lengths")
    if not long:
        return items
    first = next(iter(long))
    about = f"{len(long):,} of {len(items):,} samples of {items.config.source} are longer than {limit:,} tokens"
    if on_long == "stop":
        raise ValueError(
            f"{about}, {'the positions of the model' if max_length is None else 'training.max_length'}; the first is row {first} with "
            f"{long[first].length:,}: shorten or remove them, or set training.on_long to skip or cut."
        )
    left_out = {row for row, found in long.items() if on_long == "skip" or not found.can_be_cut}
    num_cut = len(long) - len(left_out)
    logger.warning("%s: %d are cut, %d left out; the first is row %d.", about, num_cut, len(left_out), first)
    if len(left_out) == len(items):
        raise ValueError(f"{about}, and none can be cut: nothing is left; raise training.max_length, or shorten them.")
    return items.without_long(left_out, num_cut, limit if on_long == "cut" else None)


@dataclass(frozen=True)
class _Lengths:
    """Reckons how long samples are, with as little work as tells it."""

    items: Items
    collate: Collator
    limit: int
    of_images: dict[Sizes, int] = field(default_factory=dict)
    """Tokens that images of such sizes become, without one for each."""
    one_at_a_time: Lock = field(default_factory=Lock)
    """Held while texts are read: tokenizers keep how they pad, which some processors change."""

    def long(self, row: int) -> _Long | None:
        """Return what is to be known of a row that is too long, else None."""
        try:
            fields, sources, _ = self.items.sources(row)
            sizes = tuple(size_of(self.items.in_folder(source), self.items.config.max_pixels) for source in sources)
            with self.one_at_a_time:
                if self._is_short(fields, sizes):
                    return None
                encoded = self._encoded(self._sample(fields, sizes))
        except ValueError:  # of a broken image too
            return None
        length = len(encoded["input_ids"])
        return _Long(length, self._can_be_cut(encoded)) if length > self.limit else None

    def _is_short(self, fields: Mapping[str, Any], sizes: Sizes) -> bool:
        """Return whether a sample is surely no longer than the limit."""
        sample = self._sample(fields, tuple((1, 1) for _ in sizes))
        of_images = self.of_images.get(sizes, 0)
        known = sizes in self.of_images or not sizes
        if known and LONGEST * sum(len(segment.text.encode()) for segment in sample.segments) + of_images <= self.limit:
            return True
        of_text = length_without_images(sample, self.collate.processor)
        if not known:
            of_images = self.of_images[sizes] = len(self._encoded(self._sample(fields, sizes))["input_ids"]) - of_text
        return of_text + of_images <= self.limit - NEAR

    def _sample(self, fields: Mapping[str, Any], sizes: Sizes) -> Sample:
        """Return the sample of a row with white images of these sizes."""
        blank = [Image.new("RGB", size, "white") for size in sizes]
        return read_sample({**fields, "image": blank} if blank else fields, self.collate.processor)

    def _encoded(self, sample: Sample) -> dict[str, Tensor]:
        return encode(sample, self.collate.processor)

    def _can_be_cut(self, encoded: Mapping[str, Tensor]) -> bool:
        """Return whether the tokens after the limit have none of an image, and those before it something to learn, if there was any."""
        of_images = torch.isin(encoded["input_ids"], torch.tensor(self.collate.limits.image_tokens, dtype=torch.long))
        learned = encoded["is_response"]
        return not of_images[self.limit :].any() and bool(learned[: self.limit].any() or not learned.any())
