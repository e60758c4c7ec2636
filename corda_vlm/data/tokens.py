"""A sample -> the model's inputs: its text as one tokenisation of the whole, its images as the processor makes them.

The tokens of a prompt are those that it has when the model is asked, and those after it are the whole text's. Where a token of the whole
text would reach across the end of a prompt (a prompt that ends in a space, say), the text is cut there: the prompt keeps its tokens, and
the answer is tokenised as after a line's end. So training sees the tokens that generation does, here and in any server.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corda_vlm.data.conversation import Segment, image_token, puts_images_first, reads_images, tokenizer_of
from corda_vlm.failures import one_line

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""What processors give beside the tokens, one value a token."""
MARK = "\ufdd0"
"""What separates segments while a processor writes the images' tokens into them: a code that Unicode keeps free for programs."""


@dataclass(frozen=True)
class Sample:
    """One sample: its images in order, and its text with one token per image."""

    images: tuple[Image.Image, ...]
    segments: tuple[Segment, ...]
    is_chat: bool
    """Whether a chat template has already put the special tokens into the text."""
    asks: bool = False
    """Whether an answer is to follow."""


def encode(sample: Sample, processor: Any) -> dict[str, Tensor]:
    """Return ``input_ids`` (T,), ``is_response`` (T,), what else there is by token, and the image tensors (first axis: images).

    Raises:
        ValueError: If the processor does not take the sample.
    """
    texts = [segment.text.replace(MARK, "") for segment in sample.segments]
    # Processors see only what they see in generation: some append to their text.
    shown = [place + 1 for place, text in enumerate(texts) if sample.images and image_token(processor) in text]
    seen = max(shown, default=int(bool(sample.images) and puts_images_first(processor)))
    reader = _Reader(tokenizer_of(processor), image_token(processor), sample, texts[seen:])
    inputs: dict[str, Any] = _with_images(texts[:seen], sample.images, processor, reader) if seen else {"input_ids": [reader.read([])]}
    encoded = {key: torch.as_tensor(value)[0] if key in ("input_ids", *PER_TOKEN) else value for key, value in inputs.items()}
    encoded["is_response"] = torch.tensor(reader.is_response, dtype=torch.long)
    if encoded["is_response"].shape != encoded["input_ids"].shape:
        raise ValueError(f"{type(processor).__name__} puts tokens together in a way of its own; give ready batches instead.")
    if type(processor).__name__ == "PaliGemmaProcessor":
        encoded["token_type_ids"] = encoded["is_response"]  # 0: read in both directions; 1: causal, what is learned
    elif reads_images(processor):  # of all samples or of none, whatever else is in the batch
        given = set(PER_TOKEN) & set(processor.model_input_names)
        encoded |= {key: torch.zeros_like(encoded["input_ids"]) for key in given - set(encoded)}
    return {key: value for key, value in encoded.items() if key not in ("attention_mask", "labels")}


def cut(encoded: dict[str, Tensor], max_tokens: int | None) -> dict[str, Tensor]:
    """Return what ``encode`` gives without the tokens after so many; None leaves all."""
    return {key: value[:max_tokens] if key in ("input_ids", "is_response", *PER_TOKEN) else value for key, value in encoded.items()}


def length_without_images(sample: Sample, processor: Any) -> int:
    """Return how many tokens ``encode`` gives where each image were a single token."""
    texts = [segment.text.replace(MARK, "") for segment in sample.segments]
    return len(_Reader(tokenizer_of(processor), image_token(processor), replace(sample, images=()), texts).read([]))


def _with_images(texts: Sequence[str], images: Sequence[Image.Image], processor: Any, reader: "_Reader") -> dict[str, Any]:
    lent = copy.copy(processor)
    lent.tokenizer = reader
    try:
        return dict(lent(text=MARK.join(texts), images=list(images), return_tensors="pt"))
    except Exception as error:  # processors may raise anything
        name = type(processor).__name__
        try:
            processor.image_processor(images=list(images), return_tensors="pt")
        except Exception as refusal:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise ValueError(f"{name} does not take the image(s) of {sizes} pixels ({one_line(refusal)})") from error
        raise ValueError(f"{name} does not take the sample ({one_line(error)}); mend or remove it.") from error


@dataclass
class _Reader:
    """A tokenizer as it is lent to a processor: it gives one sample's tokens for the text with its images' tokens in it."""

    tokenizer: Any
    repeated: str
    """The token of which an image has many; not named as the tokenizer's own, which processors ask for."""
    sample: Sample
    rest: Sequence[str]
    """Text of the segments that the processor does not see."""
    is_response: list[int] = field(default_factory=list)
    """Of the tokens that were given."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = (text if isinstance(text, str) else text[0]).split(MARK)
        if self.is_response and not texts[0].replace(self.repeated, ""):  # BLIP-2's puts an image's tokens before the text by a second call
            encoding = self.tokenizer(text, **options)
            self.is_response = [0] * len(encoding["input_ids"]) + self.is_response
            return encoding
        encoding = self.tokenizer(["".join(texts)], **options | {"return_tensors": None})
        ids = self.read(texts)
        encoding.update({key: [[int(key == "attention_mask")] * len(ids)] for key in encoding} | {"input_ids": [ids]})
        return encoding

    def read(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of these texts and the rest."""
        texts = [*texts, *self.rest]
        wholes = _tokens_up_to_each(texts, self.repeated if self.sample.images else None, self.tokenizer)
        ids, is_response = _cut(texts, wholes, self.sample, self.tokenizer)
        ids, self.is_response = _with_special_tokens(ids, is_response, self.sample, self.tokenizer)
        return ids


def _tokens_up_to_each(texts: Sequence[str], repeated: str | None, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of the texts joined up to each; a run of the repeated token, which may be long, is read as one and written out."""
    joined = list(accumulate(texts))
    if repeated is None:
        return list(tokenizer(joined, add_special_tokens=False)["input_ids"])
    runs = re.compile(f"(?:{re.escape(repeated)})+")
    lengths = [len(run) // len(repeated) for run in runs.findall(joined[-1])]
    number = tokenizer.convert_tokens_to_ids(repeated)
    written_out = []
    for ids in tokenizer([runs.sub(repeated, text) for text in joined], add_special_tokens=False)["input_ids"]:
        length = iter(lengths)
        written_out.append([token for token in ids for _ in range(next(length) if token == number else 1)])
    return written_out


def _cut(texts: Sequence[str], wholes: Sequence[list[int]], sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of the joined texts and which belong to responses; ``wholes`` are those of the texts joined up to each.

    What is returned up to one text is a prefix of what is returned up to the next, where the wholes are not.
    """
    ids: list[int] = []
    is_response: list[int] = []
    for text, whole, segment in zip(texts, wholes, sample.segments, strict=True):
        ids = list(whole) if whole[: len(ids)] == ids else ids + _tokens_alone(text, tokenizer)
        is_response += [int(segment.is_response)] * (len(ids) - len(is_response))
    return ids, is_response


def _tokens_alone(text: str, tokenizer: Any) -> list[int]:
    """Return a text's tokens as they are after a line's end, or after something else that they do not join with."""
    for start in ("\n", ":", ""):
        first, both = tokenizer([start, start + text], add_special_tokens=False)["input_ids"]
        if both[: len(first)] == first:
            break
    return list(both[len(first) :])


def _with_special_tokens(ids: list[int], is_response: list[int], sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens with those that the tokenizer puts around a whole text, unless they are there; a question has no end yet."""
    before, after = special_tokens(tokenizer)
    if _starts_itself(sample, tokenizer):
        before = []
    if sample.asks or ids[len(ids) - len(after) :] == after:
        after = []
    ends = int(sample.segments[-1].is_response)
    return before + ids + after, [0] * len(before) + is_response + [ends] * len(after)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and behind a whole text."""
    text, whole = list(tokenizer("a", add_special_tokens=False)["input_ids"]), list(tokenizer("a")["input_ids"])
    start = next((place for place in range(len(whole)) if whole[place : place + len(text)] == text), 0)
    return whole[:start], whole[start + len(text) :]


def _starts_itself(sample: Sample, tokenizer: Any) -> bool:
    """Return whether the text has the tokenizer's start already: some chat templates write it, others leave it out."""
    start = getattr(tokenizer, "bos_token", None)
    return sample.is_chat and (start is None or sample.segments[0].text.lstrip().startswith(start))
