"""Images and captions -> batches, for models with an image tower and a text tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER

from corda_vlm.data.conversation import tokenizer_of
from corda_vlm.data.media import image_field
from corda_vlm.data.rows import Item, read_each
from corda_vlm.data.samples import fields_of, read_images
from corda_vlm.failures import one_line


class PairCollator(ABC):
    """Turns items into one batch of tensors for ``model(**batch)``."""

    @abstractmethod
    def read(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return what the image tower reads."""

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Any:
        """Return what the text tower reads."""

    @abstractmethod
    def batch(self, images: list[Image.Image], captions: list[str]) -> dict[str, Any]:
        """Return the batch of these images and captions."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the batch of these items.

        Raises:
            ValueError: If an item is not one image and one caption, or its image is refused; the text says which.
        """
        pairs = read_each(read_pair, items)
        try:
            return self.batch([image for image, _ in pairs], [caption for _, caption in pairs])
        except Exception:  # processors may raise anything, and do not say for which image
            _read_alone(self.read, lambda item: read_pair(item)[:1], items)
            raise


@dataclass(frozen=True)
class TransformersPairs(PairCollator):
    """For CLIP, SigLIP and SigLIP 2 of transformers."""

    processor: Any
    max_tokens: int | None = None
    """The text tower's positions: captions are no longer, and SigLIP's are as long."""

    def read(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return ``pixel_values`` and what else the processor gives for images."""
        return dict(self.processor.image_processor(images=images, return_tensors="pt"))

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and what else the processor gives for text."""
        return dict(self.processor(text=captions, **self._length, return_tensors="pt"))

    def batch(self, images: list[Image.Image], captions: list[str]) -> dict[str, Any]:
        """Return ``input_ids``, ``pixel_values`` and what else the processor gives."""
        return dict(self.processor(text=captions, images=images, **self._length, return_tensors="pt"))

    @property
    def _length(self) -> dict[str, Any]:
        # SigLIP reads its padding: captions have the length that it was trained with.
        options = {"padding": "max_length" if type(self.processor).__name__.startswith("Siglip") else True, "truncation": True}
        own = tokenizer_of(self.processor).model_max_length
        known = [length for length in (self.max_tokens, own) if length is not None and length < LARGE_INTEGER]
        return options | ({"max_length": min(known)} if known else {})


@dataclass(frozen=True)
class TransformersImages:
    """For vision towers alone: captions, if there are any, are not read."""

    processor: Any

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return ``pixel_values`` and what else the image processor gives.

        Raises:
            ValueError: If an item has no image.
        """
        images = [image for images in read_each(_images_of, items) for image in images]
        try:
            return self.read(images)
        except Exception:  # as in PairCollator
            _read_alone(self.read, _images_of, items)
            raise

    def read(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return ``pixel_values`` and what else the image processor gives."""
        reader = getattr(self.processor, "image_processor", self.processor)
        return dict(reader(images=images, return_tensors="pt"))


@dataclass(frozen=True)
class OpenClipPairs(PairCollator):
    """For open_clip, with what ``open_clip.create_model_and_transforms`` and ``get_tokenizer`` return."""

    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    dtype: torch.dtype = torch.float32
    """The image tower's precision: open_clip leaves it to the caller to convert images."""

    def read(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return ``image`` (batch, 3, H, W)."""
        return {"image": torch.stack([self.preprocess(image) for image in images]).to(self.dtype)}

    def tokenize(self, captions: list[str]) -> Tensor:
        """Return the tokens (batch, tokens)."""
        return self.tokenizer(captions)

    def batch(self, images: list[Image.Image], captions: list[str]) -> dict[str, Any]:
        """Return ``image`` (batch, 3, H, W) and ``text`` (batch, tokens)."""
        return self.read(images) | {"text": self.tokenize(captions)}


def read_pair(item: Item) -> tuple[Image.Image, str]:
    """Return an item's image and caption (field ``caption`` or ``text``).

    Raises:
        ValueError: If it has not exactly one image and one caption.
    """
    fields = fields_of(item)
    images = read_images(image_field(fields))
    caption = fields.get("caption", fields.get("text"))
    if len(images) != 1 or not isinstance(caption, str) or not caption:
        raise ValueError(
            f"A sample has {len(images)} image(s) and the caption {caption!r}; a model with two towers needs one of each: (image, caption)."
        )
    return images[0], caption


def _images_of(item: Item) -> tuple[Image.Image, ...]:
    """Return the images of an item, which may be just one."""
    images = read_images(item if isinstance(item, Image.Image) else image_field(fields_of(item)))
    if not images:
        raise ValueError("A sample has no image, which is all that a vision tower reads; give images.")
    return images


def _read_alone(
    read: Callable[[list[Image.Image]], Any], images_of: Callable[[Item], tuple[Image.Image, ...]], items: Sequence[Item]
) -> None:
    """Refuse the first item with an image that cannot be read by itself."""

    def check(item: Item) -> None:
        for image in images_of(item):
            try:
                read([image])
            except Exception as error:
                raise ValueError(f"the image of {image.width} x {image.height} pixels cannot be read ({one_line(error)})") from error

    read_each(check, items)
