"""Retrieval with two towers: an image by its caption, a caption by its image.

``image_retrieval_recall@k``: share of captions whose image is among the k nearest. ``text_retrieval_recall@k``: share of images with at
least one of their captions among the k nearest (CLIP_benchmark's names and rule). Of equal cosines the lowest index comes first.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from corda_core.linears import evaluating
from corda_eval.records import TaskResult
from corda_eval.zeroshot.classify import Progress, image_features, text_features
from corda_eval.zeroshot.images import Each, LabelledImage, image_batches
from corda_vlm.data.pairs import PairCollator

ROWS = 1024
"""Rows of cosines in memory at once."""


@dataclass(frozen=True)
class CaptionedImages:
    """A test set: images, each with at least one caption."""

    task: str
    """Its usual name, such as "flickr30k"."""

    images: Sequence[Image.Image]
    """Each may be read when asked for."""

    captions: Sequence[Sequence[str]]
    """Those of each image, in the images' order."""

    captions_per_image: int | None = None
    """How many of an image's captions count, from its first; None takes all. Papers take 5 of COCO's 5 to 7, CLIP_benchmark all."""


def retrieve(
    model: nn.Module,
    data: CaptionedImages,
    pairs: PairCollator,
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress = iter,
) -> TaskResult:
    """Return recall at each k in both directions; ``scores`` and ``records`` are the captions'.

    Args:
        model: A model with two towers, adapted or not.
        data: Images and captions.
        pairs: As for ``classify_images``.
        ks: How many of the nearest are looked at.
        batch_size: Images, and captions, encoded at once.
        workers: Processes that read and prepare images.
        dtype: Precision of automatic casting; cosines are float32.
        progress: Wraps the iterable of batches, once for images and once for captions.

    Raises:
        ValueError: If an image has no caption, or a k is not positive.
    """
    _check(data, ks)
    kept = [list(captions)[: data.captions_per_image] for captions in data.captions]
    texts = [caption for captions in kept for caption in captions]
    owners = torch.tensor([number for number, captions in enumerate(kept) for _ in captions])
    start = time.perf_counter()
    with evaluating(model):
        numbered = Each(partial(_numbered, data.images), range(len(data.images)))
        batches: Iterable[Any] = image_batches(numbered, pairs.read, batch_size=batch_size, workers=workers, dtype=dtype)
        images = torch.cat([image_features(model, inputs, dtype) for _, _, inputs in progress(batches)])
        starts = progress(range(0, len(texts), batch_size))
        captions = torch.cat([text_features(model, pairs.tokenize(texts[first : first + batch_size]), dtype) for first in starts])
    image_ranks, text_ranks = retrieval_ranks(images, captions, owners.to(images.device))
    seconds = time.perf_counter() - start
    metrics = {f"image_retrieval_recall@{k}": (image_ranks < k).double().mean().item() for k in ks}
    metrics |= {f"text_retrieval_recall@{k}": (text_ranks < k).double().mean().item() for k in ks}
    rows = zip(texts, owners.tolist(), image_ranks.tolist(), strict=True)
    return TaskResult(
        task=data.task,
        metrics=metrics,
        headline=f"image_retrieval_recall@{ks[0]}",
        scores=(image_ranks < ks[0]).double().tolist(),
        records=[{"id": str(number), "caption": text, "answer": owner, "rank": rank} for number, (text, owner, rank) in enumerate(rows)],
        examples_per_second=len(texts) / seconds,
    )


def retrieval_ranks(images: Tensor, captions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many images come before each caption's own (captions,), and how many captions before the best of each image's (images,).

    Args:
        images: Features (images, d) of length 1.
        captions: Features (captions, d) of length 1.
        owners: Number of each caption's image (captions,).
    """
    image_ranks = [_ranks(rows @ images.T, own[:, None]) for rows, own in zip(captions.split(ROWS), owners.split(ROWS), strict=True)]
    text_ranks = []
    for start in range(0, len(images), ROWS):
        cosines = images[start : start + ROWS] @ captions.T
        numbers = torch.arange(start, start + len(cosines), device=owners.device)
        # The first of the best among an image's own captions.
        best = cosines.masked_fill(owners != numbers[:, None], -torch.inf).argmax(1, keepdim=True)
        text_ranks.append(_ranks(cosines, best))
    return torch.cat(image_ranks), torch.cat(text_ranks)


def _ranks(cosines: Tensor, right: Tensor) -> Tensor:
    """Return how many columns come before the right one (rows, 1) of each row."""
    wanted = cosines.gather(1, right)
    before = torch.arange(cosines.shape[1], device=cosines.device) < right
    return ((cosines > wanted) | ((cosines == wanted) & before)).sum(1)


def _numbered(images: Sequence[Image.Image], place: int) -> LabelledImage:
    return LabelledImage(str(place), images[place], place)


def _check(data: CaptionedImages, ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}; expected at least one number, each at least 1.")
    if data.captions_per_image is not None and data.captions_per_image < 1:
        raise ValueError(f"captions_per_image is {data.captions_per_image}; expected at least 1, or None for all.")
    if len(data.images) != len(data.captions) or not data.captions:
        raise ValueError(
            f"{data.task} has {len(data.images)} images and captions of {len(data.captions)}; expected the same number, at least one."
        )
    bare = [number for number, captions in enumerate(data.captions) if isinstance(captions, str) or not captions]
    if bare:
        raise ValueError(f"{data.task}, image {bare[0]} has the captions {data.captions[bare[0]]!r}; expected a list of at least one text.")
