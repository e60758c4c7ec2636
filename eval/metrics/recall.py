"""Retrieval between images and captions by the cosine of their features."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1024
"""Rows of the score matrix that are held at once."""


def recall_at_k(image_features: Tensor, text_features: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return ``image_retrieval_recall@k`` and ``text_retrieval_recall@k``.

    The first is the share of captions whose image is among the k nearest, the second that of images with at least one of their captions
    among the k nearest (any hit, as CLIP's evaluations count, not the share of captions found). Of equal scores the first in order wins.

    Args:
        image_features: (images, d), of any length.
        text_features: (captions, d).
        image_of_text: (captions,), the place of each caption's image.
        ks: How many of the nearest count.

    Raises:
        ValueError: If shapes do not fit, a feature is not finite, or an image has no caption.
    """
    num_images = len(image_features)
    _check(image_features, text_features, image_of_text)
    images, texts = (torch.nn.functional.normalize(features.float(), dim=-1) for features in (image_features, text_features))
    owners = image_of_text.to(images.device)
    captions = torch.arange(len(texts), device=images.device)
    ranks_of_images = torch.cat([_ranks(texts[rows] @ images.T, owners[rows, None] == _range(images)) for rows in captions.split(CHUNK)])
    rows_of_images = torch.arange(num_images, device=images.device).split(CHUNK)
    ranks_of_texts = torch.cat([_ranks(images[rows] @ texts.T, rows[:, None] == owners) for rows in rows_of_images])
    scores = {f"image_retrieval_recall@{k}": float((ranks_of_images < k).double().mean()) for k in ks}
    return scores | {f"text_retrieval_recall@{k}": float((ranks_of_texts < k).double().mean()) for k in ks}


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Return, for each row, how many columns come before its first right one when sorted by score, ties by place."""
    best, place = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True)
    # max gives any of equal places; the first is wanted.
    place = torch.where(right & (scores == best), _range(scores.T), scores.shape[1]).amin(dim=1, keepdim=True)
    return ((scores > best) | ((scores == best) & (_range(scores.T) < place))).sum(dim=1)


def _range(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _check(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> None:
    shapes = f"images {tuple(image_features.shape)}, captions {tuple(text_features.shape)}, image_of_text {tuple(image_of_text.shape)}"
    fit = image_features.ndim == text_features.ndim == 2 and image_features.shape[1] == text_features.shape[1]
    if not fit or image_of_text.shape != text_features.shape[:1]:
        raise ValueError(f"The shapes are {shapes}; expected (images, d), (captions, d) and (captions,).")
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        broken = int((~features.isfinite().all(dim=1)).sum())
        if broken:
            raise ValueError(f"{name} has {broken} row(s) that are not finite of {len(features)}; mend the model or its precision.")
    places = torch.bincount(image_of_text, minlength=len(image_features)) if (image_of_text >= 0).all() else torch.zeros(0)
    if len(places) != len(image_features):
        raise ValueError(f"image_of_text has places outside 0 … {len(image_features) - 1}; expected the place of each caption's image.")
    if (places == 0).any():
        raise ValueError(f"{int((places == 0).sum())} image(s) have no caption, first number {int((places == 0).nonzero()[0])}; drop them.")
