"""Ask a vision-language model questions and read its greedy answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from corda_core.linears import base_of, evaluating
from corda_eval.vqa.example import VqaExample
from corda_vlm.context import collator_for
from corda_vlm.data.conversation import tokenizer_of
from corda_vlm.data.limits import limits_of
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count, Options


@dataclass(frozen=True)
class Asking(Options):
    """How questions about images are asked."""

    max_new_tokens: Count = 128
    """Where an answer that does not end by itself is cut, if the model's positions last so long."""

    system: str | None = None
    """What the chat template's system turn says; None leaves that to the template. LLaVA-1.5 was trained and is evaluated with vicuna's
    sentence, which is missing in its Hugging Face port's template."""

    pad_images: bool = False
    """Pad images to squares with the processor's mean colour, as LLaVA-1.5 was trained; else do what the processor does, which for its
    Hugging Face port is to cut off the sides."""


@torch.inference_mode()
def answer_batch(model: Any, processor: Any, examples: Sequence[VqaExample], asking: Asking) -> list[str]:
    """Return the greedy answers to questions asked at once.

    Args:
        model: A LLaVA-type model, adapted or not.
        processor: Its processor.
        examples: The questions; their answers are not shown to the model.
        asking: How they are asked.

    Raises:
        ValueError: If an image cannot be read; the text names its question. Or if the processor has no place for a system turn, or no
            colour to pad with.
    """
    images = [example.open_image() for example in examples]
    if asking.pad_images:
        images = [image and _squared(image, processor) for image in images]
    if asking.system:
        _check_system(asking.system, processor)
    items = [{"image": image} | _turns(example.question, asking.system) for example, image in zip(examples, images, strict=True)]
    batch = {key: value.to(model.device) for key, value in collator_for(base_of(model), processor)(items).items()}
    length = batch["input_ids"].shape[1]
    positions = limits_of(base_of(model)).max_tokens or length + asking.max_new_tokens
    limit = max(1, min(asking.max_new_tokens, positions - length))
    with evaluating(model):
        tokens = model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=limit)
    answers = tokenizer_of(processor).batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _turns(question: str, system: str | None) -> dict[str, Any]:
    """Return the fields of an item that asks a question, behind a system turn if there is one."""
    if not system:
        return {"question": question}
    return {"conversations": [{"from": "system", "value": system}, {"from": "human", "value": question}]}


def _check_system(system: str, processor: Any) -> None:
    """Refuse a chat template that leaves system turns out.

    Raises:
        ValueError: If it does.
    """
    # Two sentences, as one may be what the template says by itself.
    once, twice = (Collator(processor)([_turns("?", turn)])["input_ids"].tolist() for turn in (system, f"{system} {system}"))
    if once == twice:
        raise ValueError(
            f"The chat template of {type(processor).__name__} leaves system turns out: system={system[:60]!r} would change nothing; leave "
            "the option out, or give the processor another template."
        )


def _squared(image: Image.Image, processor: Any) -> Image.Image:
    """Return the image in the middle of a square of the mean colour."""
    side = max(image.size)
    mean = getattr(getattr(processor, "image_processor", None), "image_mean", None)
    if mean is None:
        raise ValueError(f"{type(processor).__name__} names no mean colour (image_mean) to pad images with; leave pad_images out.")
    red, green, blue = (int(255 * value) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
