"""``images_texts`` -> batches: what users have (pairs, dicts, datasets, ready batches) -> what a model's forward takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

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
from corda_vlm.data.tokens import PER_TOKEN, Sample, cut, encode, special_tokens

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Collator:
    """Turn items into one left-padded batch of tensors for ``model(**batch)``.

    Note:
        Left padding puts all responses at the end, so that with ``logits_to_keep`` the output layer need not read the prompt.
    """

    processor: Any
    """A processor (images and text) or a tokenizer (text only)."""

    with_labels: bool = False
    """Add ``labels``: the response tokens, all else ignored."""

    whole_texts: bool = False
    """With labels: of a sample without a response all of the text is learned, instead of refusing it."""

    trim_logits: bool = False
    """With labels: ask the model (``logits_to_keep``) for the logits of the responses only."""

    writes: bool = False
    """The model reads by an encoder and writes by a decoder (T5Gemma 2): it reads what stands before the last response, which is the
    ``labels``, given always as the decoder runs on them; both are padded on the right, from where such models count positions."""

    limits: TextLimits = TextLimits()
    """What the model can read (``limits_of``): longer samples and unknown tokens are refused, positions are given where it needs them."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the batch of these items.

        Raises:
            ValueError: If an item has no text, or more than the model can read; its images and placeholders do not match; or with labels,
                if it has no response. The text says which item.
        """
        encoded = read_each(self._encoded, items)
        if self.writes:
            return self._batch_to_write(encoded)
        if self.limits.padding_shifts and len({len(sample["input_ids"]) for sample in encoded}) > 1:
            raise ValueError(
                "This model counts positions from the left of a batch, padding included, and cannot be told others: samples of several "
                "lengths would shift each other; set batch_size to 1."
            )
        batch = self._batch(encoded)
        if self.limits.needs_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.with_labels:
            batch |= self._labels(batch["input_ids"], _padded([sample["is_response"] for sample in encoded]).bool())
        return batch

    def _batch(self, encoded: Sequence[dict[str, Tensor]], side: str = "left") -> dict[str, Any]:
        """Return the inputs of these samples together."""
        batch: dict[str, Any] = {
            "input_ids": _padded([sample["input_ids"] for sample in encoded], tokenizer_of(self.processor).pad_token_id or 0, side),
            "attention_mask": _padded([torch.ones_like(sample["input_ids"]) for sample in encoded], side=side),
        }
        for key in {key for sample in encoded for key in sample} - {"input_ids", "is_response"}:
            if key in PER_TOKEN:
                batch[key] = _padded([sample.get(key, torch.zeros_like(sample["input_ids"])) for sample in encoded], side=side)
            else:
                batch[key] = _joined([sample[key] for sample in encoded if key in sample])
        return batch

    def _batch_to_write(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Return what is read of these samples, and the last response of each as ``labels``."""
        end = torch.tensor(special_tokens(tokenizer_of(self.processor))[1], dtype=torch.long)
        read, written = [], []
        for sample in encoded:
            ids, is_response = sample["input_ids"], sample["is_response"]
            start = len(ids) - int(is_response.flip(0).cumprod(0).sum())
            stop = start - len(end) * torch.equal(ids[max(0, start - len(end)) : start], end)
            own = {key: sample[key][:stop] for key in ("input_ids", *PER_TOKEN) if key in sample}
            closed = {key: torch.cat([value, end if key == "input_ids" else torch.zeros_like(end)]) for key, value in own.items()}
            read.append(sample | closed)
            written.append(ids[start:] if start < len(ids) else ids[-1:])  # without a response the decoder has something to run on
        return self._batch(read, "right") | {"labels": _padded(written, IGNORED_LABEL, "right")}

    def _encoded(self, item: Item) -> dict[str, Tensor]:
        encoded = cut(encode(read_sample(item, self.processor), self.processor), getattr(item, "max_tokens", None))
        self.limits.check(encoded["input_ids"])
        if self.with_labels and not encoded["is_response"].any():
            if self.whole_texts:
                is_text = ~torch.isin(encoded["input_ids"], torch.tensor(self.limits.image_tokens, dtype=torch.long))
                return encoded | {"is_response": is_text.long()}
            raise ValueError(
                "A training item has no response to learn; give `question` and `answer`, or `conversations` with an assistant turn."
            )
        return encoded

    def _labels(self, input_ids: Tensor, is_response: Tensor) -> dict[str, Any]:
        labels = torch.where(is_response, input_ids, IGNORED_LABEL)
        if not self.trim_logits:
            return {"labels": labels}
        # One position more than the longest response: the logits that predict its first token.
        length = input_ids.shape[1]
        keep = min(length, 1 + length - int(is_response.any(0).int().argmax()))
        # Positions, not a number: hidden[:, -keep:] is not contiguous, so torch would copy the output layer's weight per sample.
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


def _padded(rows: Sequence[Tensor], fill: int = 0, side: str = "left") -> Tensor:
    """Return rows (T,) of several lengths as one tensor (batch, longest), padded on this side."""
    missing = [max(map(len, rows)) - len(row) for row in rows]
    return torch.stack([F.pad(row, (m, 0) if side == "left" else (0, m), value=fill) for row, m in zip(rows, missing, strict=True)])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors joined along the first axis; where other axes differ (images of more tiles), padded with zeros."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    missing = [[size - there for size, there in zip(largest, tensor.shape[1:], strict=True)] for tensor in tensors]
    paddings = [[amount for size in reversed(sizes) for amount in (0, size)] for sizes in missing]
    return torch.cat([F.pad(tensor, padding) if any(padding) else tensor for tensor, padding in zip(tensors, paddings, strict=True)])
