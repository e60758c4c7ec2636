"""``images_texts`` -> batches: what users have (pairs, dicts, datasets, ready batches) -> what a model's forward takes.

Text goes through in segments, each marked as given or as response; segments are tokenised one by one and joined, so the
prompt of a training sample has the very tokens that it has when the model is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Item = Any
"""(image or None, text), or a dict with ``text``, ``question``/``answer`` or ``conversations``, and perhaps ``image``."""

PLACEHOLDER = "<image>"
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text."""

    text: str
    is_response: bool


@dataclass(frozen=True)
class Sample:
    """One sample: its images in order, and its text with one placeholder per image."""

    images: tuple[Image.Image, ...]
    segments: tuple[Segment, ...]
    is_chat: bool
    """Whether a chat template has already put the special tokens into the text."""


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

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the batch of these items.

        Raises:
            ValueError: If an item has no text, or its images and placeholders do not match; or with labels, if an item has no response.
        """
        encoded = [encode(read_sample(item, self.processor), self.processor) for item in items]
        length = max(len(one["input_ids"]) for one in encoded)
        pad_id = tokenizer_of(self.processor).pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.stack([_pad_left(one["input_ids"], length, pad_id or 0) for one in encoded]),
            "attention_mask": torch.stack([_pad_left(torch.ones_like(one["input_ids"]), length, 0) for one in encoded]),
        }
        for key in {key for one in encoded for key in one} - {"input_ids", "is_response"}:
            batch[key] = torch.cat([one[key] for one in encoded if key in one])
        if self.with_labels:
            batch |= self._labels(batch["input_ids"], [one["is_response"] for one in encoded])
        return batch

    def _labels(self, input_ids: Tensor, is_response: list[Tensor]) -> dict[str, Any]:
        if not all(mask.any() for mask in is_response):
            raise ValueError(
                "A training item has no response to learn; give `question` and `answer`, or `conversations` with an assistant turn."
            )
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

    ``question``/``answer`` and ``conversations`` go through the chat template where there is one; plain text is taken as it stands.

    Raises:
        ValueError: If the item has no text, or its images and placeholders do not match.
    """
    fields = item if isinstance(item, Mapping) else _pair_fields(item)
    images = _read_images(fields.get("image", fields.get("images")))
    if images and not hasattr(processor, "image_processor"):
        raise ValueError(
            "A sample has an image, but the processor given is a tokenizer: pass the model's full processor, or leave images out."
        )
    if "conversations" in fields:
        turns = [(_role(turn["from"]), turn["value"]) for turn in fields["conversations"]]
        return Sample(images, _chat_segments(turns, len(images), processor), is_chat=_has_template(processor))
    if "question" in fields:
        turns = [("user", fields["question"])]
        if fields.get("answer") is not None:
            turns.append(("assistant", str(fields["answer"])))
        return Sample(images, _chat_segments(turns, len(images), processor), is_chat=_has_template(processor))
    if isinstance(fields.get("text"), str) and fields["text"]:
        text = _place_images(fields["text"], len(images))
        _check_placeholders(text, len(images))
        return Sample(images, (Segment(text.replace(PLACEHOLDER, image_token(processor)), is_response=False),), is_chat=False)
    raise ValueError(
        f"A sample has the fields {sorted(fields)} but no text; expected `text`, or `question` (and `answer`), or `conversations`."
    )


def encode(sample: Sample, processor: Any) -> dict[str, Tensor]:
    """Return ``input_ids`` (T,), ``is_response`` (T,) and the image tensors (first axis: images) of one sample."""
    remaining = list(sample.images)
    ids: list[Tensor] = []
    is_response: list[Tensor] = []
    extras: dict[str, Tensor] = {}
    for number, segment in enumerate(sample.segments):
        special = number == 0 and not sample.is_chat
        count = segment.text.count(image_token(processor)) if remaining else 0
        if count:
            taken, remaining = remaining[:count], remaining[count:]
            inputs = processor(text=segment.text, images=taken, add_special_tokens=special, return_tensors="pt")
            token_ids = inputs["input_ids"][0]
            for key in set(inputs) - {"input_ids", "attention_mask"}:
                extras[key] = torch.cat([extras[key], inputs[key]]) if key in extras else inputs[key]
        else:
            tokens = tokenizer_of(processor)(segment.text, add_special_tokens=special)["input_ids"]
            token_ids = torch.tensor(tokens, dtype=torch.long)
        ids.append(token_ids)
        is_response.append(torch.full_like(token_ids, segment.is_response))
    return {"input_ids": torch.cat(ids), "is_response": torch.cat(is_response), **extras}


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the argument if it is one."""
    return getattr(processor, "tokenizer", processor)


def image_token(processor: Any) -> str:
    """Return the text that stands for an image in this processor's prompts."""
    return getattr(processor, "image_token", PLACEHOLDER)


def _chat_segments(turns: list[tuple[str, str]], num_images: int, processor: Any) -> tuple[Segment, ...]:
    """Split a conversation into given text and responses: every assistant turn is a response."""
    turns = [(role, _place_images(text, num_images) if i == 0 else text) for i, (role, text) in enumerate(turns)]
    _check_placeholders("".join(text for _, text in turns), num_images)
    render = _renderer(processor)
    segments: list[Segment] = []
    done = ""
    for index in [i for i, (role, _) in enumerate(turns) if role == "assistant"]:
        prompt, whole = render(turns[:index], True), render(turns[: index + 1], False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError("This chat template rewrites earlier turns as the conversation grows; give ready batches instead.")
        segments += [Segment(prompt[len(done) :], is_response=False), Segment(whole[len(prompt) :], is_response=True)]
        done = whole
    if segments and turns[-1][0] == "assistant":
        # White space behind the last turn belongs to a next one that never comes.
        return (*segments[:-1], Segment(segments[-1].text.rstrip(), is_response=True))
    return (*segments, Segment(render(turns, True)[len(done) :], is_response=False))


def _renderer(processor: Any) -> Any:
    """Return ``(turns, ask) -> text``: the chat template, or one line a turn for tokenizers without one."""
    if not _has_template(processor):
        return lambda turns, ask: "".join(f"{text.replace(PLACEHOLDER, image_token(processor))}\n" for _, text in turns)
    multimodal = hasattr(processor, "image_processor")

    def render(turns: list[tuple[str, str]], ask: bool) -> str:
        messages = [{"role": role, "content": _parts(text) if multimodal else text} for role, text in turns]
        return str(processor.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False))

    return render


def _parts(text: str) -> list[dict[str, str]]:
    """Split a turn's text at its placeholders, in the form that transformers' chat templates take."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if number else []
        # The template puts its own separator behind an image.
        parts += [{"type": "text", "text": piece.removeprefix("\n") if number else piece}] if piece.strip() else []
    return parts


def _has_template(processor: Any) -> bool:
    return getattr(processor, "chat_template", None) is not None


def _place_images(text: str, num_images: int) -> str:
    """Return the text, with placeholders in front if it names none."""
    if PLACEHOLDER not in text and num_images:
        return f"{PLACEHOLDER}\n" * num_images + text
    return text


def _check_placeholders(text: str, num_images: int) -> None:
    found = text.count(PLACEHOLDER)
    if found != num_images:
        raise ValueError(
            f"A sample has {found} {PLACEHOLDER} token(s) but {num_images} image(s): give one image per token. Text: {text[:80]!r}"
        )


def _pair_fields(item: Item) -> dict[str, Any]:
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return {"image": item[0], "text": item[1]}
    raise ValueError(f"A sample is a {type(item).__name__}; expected a pair (image or None, text) or a dict.")


def _read_images(value: Any) -> tuple[Image.Image, ...]:
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(image for one in value for image in _read_images(one))
    if isinstance(value, (str, Path)):
        with Image.open(value) as image:
            return (image.convert("RGB"),)
    if isinstance(value, Image.Image):
        return (value if value.mode == "RGB" else value.convert("RGB"),)
    raise ValueError(f"An image is a {type(value).__name__}; expected a PIL image, a path, a list of these, or None.")


def _role(name: str) -> str:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if name not in roles:
        raise ValueError(f"A conversation has a turn from {name!r}; expected one of {sorted(roles)}.")
    return roles[name]


def _pad_left(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (length - len(values), 0), value=fill)
