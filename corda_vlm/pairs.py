"""Images and captions -> batches, for models with an image tower and a text tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corda_vlm.data import Item, fields_of, read_images
from corda_vlm.media import image_field


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
            ValueError: If an item is not one image and one caption.
        """
        pairs = [read_pair(item) for item in items]
        return self.batch([image for image, _ in pairs], [caption for _, caption in pairs])


@dataclass(frozen=True)
class TransformersPairs(PairCollator):
    """For CLIP, SigLIP and SigLIP 2 of transformers."""

    processor: Any

    def read(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return ``pixel_values`` and what else the processor gives for images."""
        return dict(self.processor.image_processor(images=images, return_tensors="pt"))

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and what else the processor gives for text."""
        return dict(self.processor(text=captions, padding=self._padding, truncation=True, return_tensors="pt"))

    def batch(self, images: list[Image.Image], captions: list[str]) -> dict[str, Any]:
        """Return ``input_ids``, ``pixel_values`` and what else the processor gives."""
        return dict(self.processor(text=captions, images=images, padding=self._padding, truncation=True, return_tensors="pt"))

    @property
    def _padding(self) -> str | bool:
        # SigLIP reads its padding: captions have the length that it was trained with.
        return "max_length" if type(self.processor).__name__.startswith("Siglip") else True


@dataclass(frozen=True)
class TransformersImages:
    """For vision towers alone: captions, if there are any, are not read."""

    processor: Any

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return ``pixel_values`` and what else the image processor gives.

        Raises:
            ValueError: If an item has no image.
        """
        images = [image for item in items for image in _images_of(item)]
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
