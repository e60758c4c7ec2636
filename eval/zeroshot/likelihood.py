"""Classification by a LLaVA-type model: how likely each class's name is as the answer to a question about the image.

Image and question are encoded once an image; the names, as the chat template writes answers (with what ends them), are scored against
the cached prefix, many classes at a time. ``acc1`` compares sums of a name's log-probabilities, ``acc1_per_token`` their means,
which does not favour short names.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corda_core.linears import base_of, evaluating
from corda_eval.records import TaskResult
from corda_eval.zeroshot.classify import Progress, precision
from corda_eval.zeroshot.images import ClassifiedImages, image_batches
from corda_eval.zeroshot.tally import Tally
from corda_vlm.context import with_sizes_of
from corda_vlm.data.samples import Collator, read_sample
from corda_vlm.data.tokens import encode

QUESTION = "What is in the image?\nAnswer the question using a single word or phrase."


def classify_by_likelihood(
    model: nn.Module,
    data: ClassifiedImages,
    processor: Any,
    *,
    question: str = QUESTION,
    batch_size: int = 8,
    rows: int = 64,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress = iter,
) -> TaskResult:
    """Return the accuracy of the likeliest names; ``ece`` is the calibration error of their softmax.

    Args:
        model: A LLaVA-type model, adapted or not.
        data: Images and class names; prompts and groups are not used.
        processor: The model's.
        question: What is asked about each image.
        batch_size: Images encoded at once.
        rows: Names scored at once, over all images of a batch; each holds a copy of its image's keys and values.
        workers: Processes that read and prepare images.
        dtype: Precision of automatic casting.
        progress: Wraps the iterable of batches.

    Raises:
        ValueError: If the model numbers its positions in a way of its own, or a label is of no class.
    """
    unique = list(dict.fromkeys(data.class_names))
    place = {name: number for number, name in enumerate(unique)}
    inverse = torch.tensor([place[name] for name in data.class_names])
    names = name_tokens(unique, processor, question)
    lengths = torch.tensor([len(tokens) for tokens in names])
    tally, by_token = Tally(), Tally()
    start = time.perf_counter()
    collate = _Prompts(Collator(with_sizes_of(base_of(model), processor)), question)
    with evaluating(model):
        for ids, labels, inputs in progress(image_batches(data.items, collate, batch_size=batch_size, workers=workers)):
            scores = name_scores(model, inputs, names, rows=rows, dtype=dtype).cpu()
            tally.add(ids, labels, scores[:, inverse], {"ece": 1.0})
            by_token.add(ids, labels, (scores / lengths)[:, inverse], {})
    seconds = time.perf_counter() - start
    mean = by_token.result(data.task, len(data.class_names), seconds)
    more = {f"{name}_per_token": mean.metrics[name] for name in ("acc1", "acc5") if name in mean.metrics}
    return tally.result(data.task, len(data.class_names), seconds, more)


def name_tokens(names: Sequence[str], processor: Any, question: str = QUESTION) -> list[Tensor]:
    """Return the tokens of each name as an answer, those that end it included."""
    samples = [encode(read_sample({"question": question, "answer": name}, processor), processor) for name in names]
    return [sample["input_ids"][sample["is_response"].bool()] for sample in samples]


@torch.inference_mode()
def name_scores(
    model: nn.Module, inputs: dict[str, Tensor], names: Sequence[Tensor], *, rows: int = 64, dtype: torch.dtype | None = None
) -> Tensor:
    """Return log p(name | image, question), summed over a name's tokens (images, names), float32.

    Args:
        model: A LLaVA-type model, adapted or not.
        inputs: Images with the question, padded on the left.
        names: Tokens of each name.
        rows: Names scored at once, over all images.
        dtype: Precision of automatic casting.

    Raises:
        ValueError: If the model numbers its positions in a way of its own.
    """
    _refuse_own_positions(model)
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items()}
    mask = inputs["attention_mask"]
    with precision(model, dtype):
        output = model(**inputs, position_ids=_positions(mask), use_cache=True, logits_to_keep=1)
        first = output.logits[:, -1].float().log_softmax(-1)
        scores = first[:, torch.stack([name[0] for name in names]).to(device)]
        # By length: little padding, and names of one token are done.
        order = sorted((place for place, name in enumerate(names) if len(name) > 1), key=lambda place: len(names[place]))
        count = max(1, rows // len(mask))
        for chosen in (order[start : start + count] for start in range(0, len(order), count)):
            tokens = nn.utils.rnn.pad_sequence([names[place] for place in chosen], batch_first=True, padding_value=-1).to(device)
            scores[:, chosen] += _continued(model, output.past_key_values, mask, tokens)
    return scores


def _continued(model: nn.Module, prefix: Any, mask: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each name's tokens behind its first (images, names)."""
    images, count = len(mask), len(tokens)
    cache = copy.deepcopy(prefix)  # it grows as it is read
    cache.batch_repeat_interleave(count)
    real = tokens >= 0
    given = tokens.clamp(min=0)[:, :-1].repeat(images, 1)
    whole = torch.cat([mask.repeat_interleave(count, 0), real[:, :-1].repeat(images, 1).to(mask.dtype)], dim=1)
    positions = _positions(whole)[:, mask.shape[1] :]
    logits = model(input_ids=given, attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True).logits
    wanted = tokens[:, 1:].clamp(min=0).repeat(images, 1)
    log_probabilities = logits.float().log_softmax(-1).gather(2, wanted[..., None])[..., 0]
    return (log_probabilities * real[:, 1:].repeat(images, 1)).sum(1).reshape(images, count)


def _positions(mask: Tensor) -> Tensor:
    """Return each token's place among those that are no padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _refuse_own_positions(model: nn.Module) -> None:
    if hasattr(getattr(base_of(model), "model", None), "rope_deltas"):
        raise ValueError(
            f"{type(base_of(model)).__name__} numbers positions in three dimensions, which scoring names does not; expected a LLaVA-type "
            "model; ask it questions instead (corda_eval.vqa)."
        )


@dataclass(frozen=True)
class _Prompts:
    """Images -> batch with the question."""

    collate: Collator
    question: str

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        return self.collate([{"image": image, "question": self.question} for image in images])
