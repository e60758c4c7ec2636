"""Zero-shot classification with two towers: CLIP and SigLIP of transformers, and open_clip's models.

The head is open_clip's: per class the mean of its prompts' features of length 1, brought to length 1. A name that two classes share (in
ImageNet "missile" and "sunglasses") has one row, so that both have the very same logits.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.linears import base_of, evaluating
from corda_eval.records import TaskResult
from corda_eval.zeroshot.images import ClassifiedImages, ImageBatch, image_batches
from corda_eval.zeroshot.tally import Tally
from corda_vlm.classifier import encode_images, encode_texts, zero_shot_head
from corda_vlm.data.pairs import PairCollator

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def classify_images(
    model: nn.Module,
    data: ClassifiedImages,
    pairs: PairCollator,
    *,
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress = iter,
) -> TaskResult:
    """Return the zero-shot accuracy, with ``scores`` whether each image was right.

    ``ece`` is the calibration error of softmax(scale · cosines) with the model's own scale, ``ece_scale_100`` that with open_clip's 100.

    Args:
        model: A model with two towers, adapted or not.
        data: Images, class names and prompts.
        pairs: How the model's inputs are made: ``TransformersPairs(processor)`` or ``OpenClipPairs(preprocess, tokenizer)``.
        batch_size: Images encoded at once.
        workers: Processes that read and prepare images.
        dtype: Precision of automatic casting, such as ``torch.bfloat16``; None computes in the model's own. Cosines are float32.
        progress: Wraps the iterable of batches, a progress bar for instance.

    Raises:
        ValueError: If there are no images, classes or templates, a label is of no class, or features are not finite.
    """
    scale = base_of(model).logit_scale.exp().item()
    tally = Tally()
    head = class_head(model, data, pairs, dtype=dtype)
    start = time.perf_counter()
    batches = image_batches(data.items, pairs.read, batch_size=batch_size, workers=workers, dtype=dtype)
    for ids, labels, cosines in cosine_batches(model, head, data, progress(batches), dtype=dtype):
        tally.add(ids, labels.to(cosines.device), cosines, {"ece": scale, "ece_scale_100": 100.0})
    num_answers = len(data.class_names if data.groups is None else data.groups)
    return tally.result(data.task, num_answers, time.perf_counter() - start)


def class_head(model: nn.Module, data: ClassifiedImages, pairs: PairCollator, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the classes' features (classes, d), float32, of length 1; equal names have equal rows."""
    names = list(dict.fromkeys(data.class_names))
    place = {name: number for number, name in enumerate(names)}
    with evaluating(model), precision(model, dtype):
        rows = zero_shot_head(model, pairs.tokenize, names, data.templates)
    return F.normalize(rows.float(), dim=-1)[[place[name] for name in data.class_names]]


def cosine_batches(
    model: nn.Module, head: Tensor, data: ClassifiedImages, batches: Iterable[ImageBatch], *, dtype: torch.dtype | None = None
) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
    """Yield ids, labels (batch,) and cosines (batch, answers) of the data's batches (``image_batches``), the highest of each group."""
    unique, inverse = torch.unique(head, dim=0, return_inverse=True)
    with evaluating(model):
        for ids, labels, inputs in batches:
            # Equal rows are multiplied once: a product's rounding depends on a row's place.
            cosines = (image_features(model, inputs, dtype) @ unique.T)[:, inverse]
            if data.groups is not None:
                cosines = torch.stack([cosines[:, list(group)].amax(1) for group in data.groups], dim=1)
            yield ids, labels, cosines


@torch.inference_mode()
def image_features(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return the image tower's features (batch, d) of length 1, float32."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
    with precision(model, dtype):
        return F.normalize(encode_images(model, inputs).float(), dim=-1)


@torch.inference_mode()
def text_features(model: nn.Module, tokens: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the text tower's features (batch, d) of length 1, float32."""
    with precision(model, dtype):
        return F.normalize(encode_texts(model, tokens).float(), dim=-1)


def precision(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return automatic casting to a precision, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(next(model.parameters()).device.type, dtype)
