"""A context where no old data are at hand: samples that the base makes itself."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.files import DIGEST, json_digest, read_text, write_whole
from corda_core.linears import evaluating
from corda_vlm.checks import checked_base
from corda_vlm.classifier import encode_images, zero_shot_head
from corda_vlm.context import collator_for
from corda_vlm.data.conversation import reads_images
from corda_vlm.data.rows import Item, Row
from corda_vlm.data.samples import has_image
from corda_vlm.failures import one_line
from corda_vlm.towers import has_two_towers, image_dtype, is_open_clip, is_text_only, is_vision_only
from corda_vlm.writer import Writer, Written, picture_of, shared_out

THINGS = """
cat dog horse cow sheep pig goat rabbit mouse lion tiger elephant bear monkey giraffe zebra deer wolf fox camel bird eagle owl
parrot penguin duck chicken swan fish shark whale dolphin turtle frog snake lizard crab spider bee butterfly snail man woman child
baby crowd doctor soldier farmer dancer musician hand face eye foot tree flower rose leaf forest mushroom cactus apple banana orange
lemon strawberry tomato carrot potato salad soup pizza hamburger sandwich cake cookie bread cheese egg bowl cup plate spoon knife
bottle glass teapot table chair sofa bed lamp clock mirror window door staircase kitchen bathroom bedroom office classroom library
house castle church temple skyscraper bridge tower tent street road garden park farm field beach island lake river waterfall
mountain volcano desert cave sky cloud rainbow sunset star planet snowman fire car bus truck train bicycle motorcycle tractor
airplane helicopter rocket boat ship wheel traffic-light stop-sign ball kite skateboard surfboard swing piano guitar violin drum
trumpet camera telephone television computer keyboard robot watch book newspaper map letter flag painting statue toy doll puzzle hat
shirt dress shoe coat bag umbrella ring crown key lock hammer scissors ladder rope bucket basket candle balloon coin trophy pattern
logo circle number word chart drawing document
"""
NOUNS = tuple(word.replace("-", " ") for word in THINGS.split())
"""Everyday things of which a picture may be a photo: general class prompts for models with two towers."""

MAX_TOKENS = 128
"""Length of a sample's own text, if nothing else is said."""


@dataclass(frozen=True)
class SelfWritten(Sequence[Item]):
    """Samples that a model wrote itself, as ``prepare`` takes them; pictures are read from the items when a sample is asked for."""

    rows: Sequence[Written]
    """What was written."""
    items: Sequence[Item]
    """Where the pictures are."""
    options: Mapping[str, Any]
    """What it was asked for: count, seed and so on."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return the sample at a place, or the samples of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        row = self.rows[index]
        picture = {"image": picture_of(self.items[row["image"]])} if "image" in row else {}
        return Row({key: value for key, value in row.items() if key != "seed"} | picture, f"self-written sample {index}")

    def fingerprint(self) -> str:
        """Return a SHA-256 of the options and of what was written."""
        return json_digest({"options": self.options, "rows": self.rows})

    def save(self, path: Path) -> None:
        """Write it as JSON lines: the options with a digest, then a line a sample, of pictures their places among the items."""
        lines = [{"self_context": self.options, DIGEST: self.fingerprint()}, *self.rows]
        write_whole(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def read_self_context(path: Path, items: Sequence[Item] = ()) -> SelfWritten:
    """Return what ``SelfWritten.save`` wrote.

    Args:
        path: The file.
        items: Those whose pictures it was written on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or names pictures that the items do not have.
    """
    cure = "put it back as it was, or name another output to begin anew"
    try:
        header, *rows = [json.loads(line) for line in read_text(path, cure).splitlines()]
        context = SelfWritten(rows, items, header["self_context"])
        whole = header[DIGEST] == context.fingerprint()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no whole file of samples that a base wrote ({one_line(error)}); {cure}.") from error
    if not whole:
        raise ValueError(f"{path} is damaged: its content is not that which its digest was taken of; {cure}.")
    last = max((row["image"] for row in rows if "image" in row), default=-1)
    if last >= len(items):
        raise ValueError(f"{path} has samples on picture {last}, but there are {len(items)} items; give those that it was written on.")
    return context


def self_context(
    model: nn.Module,
    processor: Any,
    items: Sequence[Item] | None = None,
    *,
    count: int = 256,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 16,
) -> SelfWritten:
    """Return samples that the base makes itself: a context for ``prepare`` and for keeping where there are no old data.

    - Language models: their own texts from the beginning-of-text token; where there is a chat template, every other batch is a user's turn
      and an answer, both of which the model writes.
    - Vision-language models: their answers to general prompts (``PROMPTS``) on the items' pictures; a quarter is text alone, as above.
    - Two towers: the items' pictures, each with the general class prompt (``NOUNS``) that the base prefers, no prompt much more often than
      others. Vision towers: the pictures.

    The same samples for the same seed, count and batch size, up to rounding, whatever the number of processes: each must call, and writes
    its share. The random state of torch is left as it was.

    Args:
        model: The untouched base.
        processor: Its processor or tokenizer, or ``OpenClipPairs``.
        items: Samples with the pictures that it is being tuned on; their text is not read. Language models need none.
        count: How many samples; of two towers and vision towers no more than there are pictures.
        seed: Of all draws.
        max_tokens: Length of a sample's own text; a chat's two turns share it.
        batch_size: Samples written at once.

    Raises:
        ValueError: If an option is not right, the model cannot write, or there are no pictures for a model that needs them.
    """
    options = {"count": count, "seed": seed, "max_tokens": max_tokens, "batch_size": batch_size}
    low = next((name for name in ("count", "max_tokens", "batch_size") if options[name] < 1), None)
    if low is not None:
        raise ValueError(f"{low} is {options[low]}; expected at least 1.")
    model = checked_base(model)
    sees = has_two_towers(model) or is_vision_only(model) or (reads_images(processor) and not is_text_only(model))
    places = _with_pictures(items or (), count, seed) if sees else []
    if sees and not places:
        raise ValueError(
            f"{type(model).__name__} reads pictures, but none of the {len(items or ())} items has one; give items with the pictures that "
            "it is being tuned on."
        )
    with evaluating(model):
        if is_vision_only(model):
            rows: list[Written] = [{"image": place} for place in places]
        elif has_two_towers(model):
            rows = _captioned(model, collator_for(model, processor), items or (), places, batch_size)
        else:
            rows = Writer.of(model, processor, items or (), places, max_tokens).rows(count, seed, batch_size)
    return SelfWritten(rows, items or (), options)


def _with_pictures(items: Sequence[Item], count: int, seed: int) -> list[int]:
    """Return the places of ``count`` items with a picture, or of all there are, in a random order."""
    order = random.Random(seed).sample(range(len(items)), len(items))
    return list(islice((place for place in order if has_image(items[place])), count))


def _captioned(model: Any, collate: Any, items: Sequence[Item], places: Sequence[int], batch_size: int) -> list[Written]:
    """Return the pictures with their captions: of all pairs that are left, the most similar next, no caption oftener than need be."""
    captions = [f"a photo of {'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in NOUNS]
    head = zero_shot_head(model, collate.tokenize, captions, ["{}"])
    device = next(model.parameters()).device

    def similarities(start: int) -> Tensor:
        inputs = collate.read([picture_of(items[place]) for place in places[start : start + batch_size]])
        if is_open_clip(model):
            inputs = {key: value.to(image_dtype(model)) for key, value in inputs.items()}
        features = encode_images(model, {key: value.to(device) for key, value in inputs.items()})
        return (F.normalize(features, dim=-1) @ head.T).float().cpu()

    rows = torch.cat(shared_out(similarities, range(0, len(places), batch_size)))
    left = [-(-len(places) // len(captions))] * len(captions)
    chosen: dict[int, str] = {}
    for pair in rows.flatten().argsort(descending=True, stable=True).tolist():
        picture, number = divmod(pair, len(captions))
        if picture not in chosen and left[number]:
            chosen[picture] = captions[number]
            left[number] -= 1
    return [{"image": place, "text": chosen[number]} for number, place in enumerate(places)]
