"""``images_texts`` -> batches: what users have (pairs, dicts, datasets, ready batches) -> what a model's forward takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corda_vlm.data.conversation import (
    PLACEHOLDER,
    Segment,
    Turn,
    answer_of,
    has_template,
    image_text,
    place_images,
    reads_images,
    segments_of,
    text_of,
    tokenizer_of,
    turns_of,
)
from corda_vlm.data.images import read_image
from corda_vlm.data.limits import TextLimits
from corda_vlm.data.media import image_field, image_sources
from corda_vlm.data.rows import Item, fields_of, read_each
from corda_vlm.data.tokens import PER_TOKEN, Sample, encode

__all__ = ["IGNORED_LABEL", "Collator", "Item", "Sample", "encode", "fields_of", "has_image", "read_images", "read_sample"]

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Collator:
    """Turn items into one left-padded batch of tensors for ``model(**batch)``.

    Note:
        Left padding puts all responses at the end, so that ``logits_to_keep`` spares the output layer the prompt.
    """

    processor: Any
    """A processor (images and text) or a tokenizer (text only)."""

    with_labels: bool = False
    """Add ``labels``: the response tokens, all else ignored."""

    trim_logits: bool = False
    """With labels: ask the model (``logits_to_keep``) for the logits of the responses only."""

    limits: TextLimits = TextLimits()
    """What the model can read (``limits_of``): longer samples and unknown tokens are refused, positions are given where it needs them."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the batch of these items.

        Raises:
            ValueError: If an item has no text, or more than the model can read; its images and placeholders do not match; or with labels,
                if it has no response. The text says which item.
        """
        encoded = read_each(self._encoded, items)
        length = max(len(one["input_ids"]) for one in encoded)
        if self.limits.padding_shifts and any(len(one["input_ids"]) < length for one in encoded):
            raise ValueError(
                "This model counts positions from the left of a batch, padding included, and cannot be told others: samples of several "
                "lengths would shift each other; set batch_size to 1."
            )
        pad_id = tokenizer_of(self.processor).pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.stack([_pad_left(one["input_ids"], length, pad_id or 0) for one in encoded]),
            "attention_mask": torch.stack([_pad_left(torch.ones_like(one["input_ids"]), length, 0) for one in encoded]),
        }
        for key in {key for one in encoded for key in one} - {"input_ids", "is_response"}:
            if key in PER_TOKEN:
                batch[key] = torch.stack([_pad_left(one.get(key, torch.zeros_like(one["input_ids"])), length, 0) for one in encoded])
            else:
                batch[key] = _joined([one[key] for one in encoded if key in one])
        if self.limits.needs_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.with_labels:
            batch |= self._labels(batch["input_ids"], [one["is_response"] for one in encoded])
        return batch

    def _encoded(self, item: Item) -> dict[str, Tensor]:
        encoded = encode(read_sample(item, self.processor), self.processor)
        self.limits.check(encoded["input_ids"])
        if self.with_labels and not encoded["is_response"].any():
            raise ValueError(
                "A training item has no response to learn; give `question` and `answer`, or `conversations` with an assistant turn."
            )
        return encoded

    def _labels(self, input_ids: Tensor, is_response: list[Tensor]) -> dict[str, Any]:
        length = input_ids.shape[1]
        mask = torch.stack([_pad_left(one, length, 0) for one in is_response]).bool()
        labels = torch.where(mask, input_ids, IGNORED_LABEL)
        if not self.trim_logits:
            return {"labels": labels}
        # One position more than the longest response: the logits that predict its first token.
        keep = min(length, 1 + length - int(mask.any(0).int().argmax()))
        # As positions, not as a number: hidden[:, -keep:] is not contiguous, and torch then copies the output layer's weight per sample.
        return {"labels": labels[:, -keep:].contiguous(), "logits_to_keep": torch.arange(length - keep, length)}


def read_sample(item: Item, processor: Any) -> Sample:
    """Return the sample that an item describes.

    ``question``/``answer`` and ``conversations`` (or ``messages``) go through the chat template where there is one; plain text is taken as
    it stands. Of several answers the most frequent counts. To a tokenizer, ``<image>`` is text like any other.

    Raises:
        ValueError: If the item has no text, or its images and placeholders do not match.
    """
    fields = {name: value for name, value in fields_of(item).items() if value is not None}
    images = read_images(image_field(fields))
    if images and not reads_images(processor):
        raise ValueError(
            "A sample has an image, but the processor given is a tokenizer: pass the model's full processor, or leave images out."
        )
    turns = _turns(fields, processor)
    if turns is not None:
        segments = segments_of(turns, len(images), processor)
        return Sample(images, segments, is_chat=has_template(processor), asks=turns[-1][0] != "assistant")
    if isinstance(fields.get("text"), str) and fields["text"]:
        text = fields["text"]
        if reads_images(processor):
            [(_, text)] = place_images([("user", text)], len(images))
            text = text.replace(PLACEHOLDER, image_text(processor))
        return Sample(images, (Segment(text, is_response=False),), is_chat=False)
    raise ValueError(
        f"A sample has the fields {sorted(fields)} but no text; expected `text`, or `question` (and `answer`), or `conversations` (or "
        "`messages`)."
    )


def _turns(fields: Mapping[str, Any], processor: Any) -> list[Turn] | None:
    """Return the conversation that a sample is, or None if it is none."""
    name = next((name for name in ("conversations", "messages") if name in fields and len(fields[name])), None)
    if name is not None:
        return turns_of(fields[name], "A conversation", reads_images=reads_images(processor))
    if "question" not in fields:
        return None
    answer = answer_of(fields.get("answer"), "answer")
    return [("user", text_of(fields["question"], "question"))] + ([] if answer is None else [("assistant", answer)])


def has_image(item: Item) -> bool:
    """Return whether an item has an image, without reading it where it is a file."""
    if isinstance(item, Image.Image):
        return True
    image = image_field(fields_of(item))
    return bool(image) if isinstance(image, (list, tuple)) else image is not None


def read_images(value: Any) -> tuple[Image.Image, ...]:
    """Return the images of a sample's field (``image_sources``) in RGB.

    Raises:
        ValueError: If it is of another form, or one cannot be read.
    """
    return tuple(read_image(source) for source in image_sources(value))


def _pad_left(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (length - len(values), 0), value=fill)


def _joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Return the tensors one behind the other along an axis; where their other axes differ (images of more tiles), zeros fill up."""
    sizes = [max(one.shape[place] for one in tensors) for place in range(tensors[0].ndim)]
    filled = []
    for one in tensors:
        missing = [size - have if place != axis else 0 for place, (size, have) in enumerate(zip(sizes, one.shape, strict=True))]
        filled.append(torch.nn.functional.pad(one, [amount for size in reversed(missing) for amount in (0, size)]) if any(missing) else one)
    return torch.cat(filled, dim=axis)
