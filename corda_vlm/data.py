"""``images_texts`` -> batches: what users have (pairs, dicts, datasets, ready batches) -> what a model's forward takes.

Text goes through in segments, each marked as given or as response; segments are tokenised one by one and joined, so the
prompt of a training sample has the very tokens that it has when the model is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corda_vlm.images import read_image
from corda_vlm.media import image_field, image_sources

Item = Any
"""(image or None, text), or a dict with ``text``, ``question``/``answer`` or ``conversations``, and perhaps ``image``."""

PLACEHOLDER = "<image>"
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""What processors give beside the tokens, one value a token."""
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
            if key in PER_TOKEN:
                batch[key] = torch.stack([_pad_left(one.get(key, torch.zeros_like(one["input_ids"])), length, 0) for one in encoded])
            else:
                batch[key] = _joined([one[key] for one in encoded if key in one])
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
    fields = fields_of(item)
    images = read_images(image_field(fields))
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
        return Sample(images, (Segment(text.replace(PLACEHOLDER, image_text(processor)), is_response=False),), is_chat=False)
    raise ValueError(
        f"A sample has the fields {sorted(fields)} but no text; expected `text`, or `question` (and `answer`), or `conversations`."
    )


def has_image(item: Item) -> bool:
    """Return whether an item has an image, without reading it where it is a file."""
    if isinstance(item, Image.Image):
        return True
    image = image_field(fields_of(item))
    return bool(image) if isinstance(image, (list, tuple)) else image is not None


def encode(sample: Sample, processor: Any) -> dict[str, Tensor]:
    """Return ``input_ids`` (T,), ``is_response`` (T,), what else there is by token, and the image tensors (first axis: images)."""
    remaining = list(sample.images)
    ids: list[Tensor] = []
    is_response: list[Tensor] = []
    by_token: dict[str, list[Tensor]] = {}
    by_image: dict[str, list[Tensor]] = {}
    for number, segment in enumerate(sample.segments):
        special = number == 0 and not _starts_itself(sample, processor)
        count = segment.text.count(image_token(processor)) if remaining else 0
        if count:
            taken, remaining = remaining[:count], remaining[count:]
            inputs = processor(text=segment.text, images=taken, add_special_tokens=special, return_tensors="pt")
            token_ids = inputs["input_ids"][0]
            for key in set(inputs) - {"input_ids", "attention_mask", "labels"}:
                if key in PER_TOKEN:
                    # Segments before this one were text.
                    by_token.setdefault(key, [torch.zeros_like(one) for one in ids]).append(inputs[key][0])
                else:
                    by_image.setdefault(key, []).append(inputs[key])
        else:
            tokens = tokenizer_of(processor)(segment.text, add_special_tokens=special)["input_ids"]
            token_ids = torch.tensor(tokens, dtype=torch.long)
            for values in by_token.values():
                values.append(torch.zeros_like(token_ids))
        ids.append(token_ids)
        is_response.append(torch.full_like(token_ids, segment.is_response))
    encoded = {"input_ids": torch.cat(ids), "is_response": torch.cat(is_response)}
    encoded |= {key: torch.cat(values) for key, values in by_token.items()}
    if type(processor).__name__ == "PaliGemmaProcessor" and "token_type_ids" in encoded:
        encoded["token_type_ids"] = encoded["is_response"]  # 0: read in both directions; 1: causal, what is learned
    nested = type(processor).__name__.startswith(("Idefics", "SmolVLM"))  # (1, images, …), where others have (images, …)
    return encoded | {key: _joined(values, axis=1 if nested else 0) for key, values in by_image.items()}


def _starts_itself(sample: Sample, processor: Any) -> bool:
    """Return whether the text has what its tokenizer puts before texts already: some chat templates write it, others leave it out."""
    start = getattr(tokenizer_of(processor), "bos_token", None)
    return sample.is_chat and (start is None or sample.segments[0].text.lstrip().startswith(start))


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the argument if it is one."""
    return getattr(processor, "tokenizer", processor)


def image_token(processor: Any) -> str:
    """Return the text that stands for an image in this processor's prompts."""
    return getattr(processor, "image_token", PLACEHOLDER)


def image_text(processor: Any) -> str:
    """Return what a prompt has in an image's place: the token, between the two that Qwen's models find their images by."""
    tokenizer, token = tokenizer_of(processor), image_token(processor)
    start, end = "<|vision_start|>", "<|vision_end|>"
    wrapped = tokenizer.convert_tokens_to_ids(start) not in (None, tokenizer.unk_token_id)
    return f"{start}{token}{end}" if wrapped else token


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
        text = segments[-1].text.rstrip()
        if text.endswith(turns[-1][1].rstrip()):  # the template puts no mark behind an answer: without one nobody learns to stop
            text += getattr(tokenizer_of(processor), "eos_token", None) or ""
        return (*segments[:-1], Segment(text, is_response=True))
    return (*segments, Segment(render(turns, True)[len(done) :], is_response=False))


def _renderer(processor: Any) -> Any:
    """Return ``(turns, ask) -> text``: the chat template, or one line a turn for tokenizers without one."""
    if not _has_template(processor):
        return lambda turns, ask: "".join(f"{text.replace(PLACEHOLDER, image_text(processor))}\n" for _, text in turns)
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


def fields_of(item: Item) -> Mapping[str, Any]:
    """Return a dict as it is, and an (image or None, text) pair as fields.

    Raises:
        ValueError: If the item is neither.
    """
    if isinstance(item, Mapping):
        return item
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return {"image": item[0], "text": item[1]}
    raise ValueError(f"A sample is a {type(item).__name__}; expected a pair (image or None, text) or a dict.")


def read_images(value: Any) -> tuple[Image.Image, ...]:
    """Return the images of a sample's field (``image_sources``) in RGB.

    Raises:
        ValueError: If it is of another form, or one cannot be read.
    """
    return tuple(read_image(source) for source in image_sources(value))


def _role(name: str) -> str:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if name not in roles:
        raise ValueError(f"A conversation has a turn from {name!r}; expected one of {sorted(roles)}.")
    return roles[name]


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
