"""What several settings do alike."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from corda_core import select_linears
from corda_core.bases import base_digest
from corda_core.linears import evaluating
from corda_eval.study.task import Batch, Score
from corda_eval.text.facts import facts_task
from corda_eval.text.perplexity import text_windows, window_losses
from corda_vlm.data.rows import Item
from corda_vlm.data.samples import Collator
from corda_vlm.options import LARGEST
from corda_vlm.selfwritten import read_self_context, self_context

WINDOW = 128
"""Tokens of a window of text."""
COMPARED = 4
"""Windows of each kept domain whose predictions are compared with the base's."""
Collate = Callable[[Sequence[Any]], dict[str, Any]]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]


def drawn(count: int, total: int, seed: str) -> list[int]:
    """Return ``count`` places out of ``total``: all of them in a new order, then all again."""
    generator = random.Random(seed)
    return [place for _ in range(-(-count // total)) for place in generator.sample(range(total), total)][:count]


def spread(count: int, total: int) -> list[int]:
    """Return at most ``count`` places out of ``total``, evenly spread."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def casting() -> torch.autocast:
    """Return the casting to bfloat16 that language models are trained and measured under, weights staying in float32."""
    return torch.autocast("cpu", torch.bfloat16)


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss (nats a token) of a batch's labelled tokens."""
    with casting():
        return model(**batch, use_cache=False).loss


def answer_score(model: nn.Module, batches: Sequence[Batch]) -> Score:
    """Return the mean loss (nats) of the labelled tokens, and the percentage of answers that are right in every token.

    An answer's own loss is the sum over its tokens over how many an answer has in the mean: so their mean is that over tokens.

    An answer is a run of labels: right if each of its tokens is the likeliest after those before it, which is when a model that always
    takes the likeliest token would give this answer. Nothing is generated.

    Args:
        model: A language model or a vision-language model.
        batches: Arguments of the model, with ``labels`` (batch, tokens): -100 where nothing is to be predicted. With ``logits_to_keep``
            they are those of the logits kept.
    """
    losses: list[Tensor] = []
    right: list[bool] = []
    num_tokens = 0
    with evaluating(model), casting():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            wanted = batch["labels"][:, 1:]
            asked = wanted >= 0
            logits = model(**inputs, use_cache=False).logits[:, :-1][asked].float()
            of_tokens = F.cross_entropy(logits, wanted[asked], reduction="none").double()
            numbers = (asked & ~F.pad(asked, (1, 0))[:, :-1]).flatten().cumsum(0)[asked.flatten()] - 1  # of the answer that a token is in
            count = int(numbers[-1]) + 1
            num_tokens += len(numbers)
            losses.append(torch.zeros(count, dtype=torch.double).index_add(0, numbers, of_tokens))
            wrong = logits.argmax(-1) != wanted[asked]
            right += (torch.zeros(count).index_add(0, numbers, wrong.float()) == 0).tolist()
    return Score.of((torch.cat(losses) * (len(right) / num_tokens)).tolist(), right)


def text_context(text: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: str | None = None) -> list[Batch]:
    """Return ``count`` windows of a text as a context, eight a batch: evenly spread over it, or drawn with a seed."""
    total = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) // WINDOW
    windows = text_windows(text, tokenizer, WINDOW, count if seed is None else max(count, total))
    chosen = windows if seed is None else [windows[place] for place in drawn(count, total, seed)]
    return [{"input_ids": ids} for ids in torch.stack(chosen).split(8)]


def guess_of(batches: Sequence[Batch], choices: int) -> float:
    """Return the loss (nats a token) of who knows that an answer is one of so many, of answers as of ``answer_score``."""
    asked = [batch["labels"][:, 1:] >= 0 for batch in batches]
    answers = sum(int((marks & ~F.pad(marks, (1, 0))[:, :-1]).sum()) for marks in asked)
    return math.log(choices) * answers / sum(int(marks.sum()) for marks in asked)


def text_loss(model: nn.Module, batch: Batch, *, image_token: int = -100) -> Tensor:
    """Return the mean loss (nats a token) of a context batch's texts, each token but an image's after those before it."""
    ids = batch["input_ids"]
    with casting():
        return model(**batch, labels=ids.masked_fill(ids == image_token, -100), use_cache=False).loss


def kept_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, windows: Mapping[str, Sequence[Tensor]], facts: int
) -> dict[str, Score]:
    """Return the loss on each domain's windows, and under "facts" the accuracy on the first ``facts`` facts, unless that is 0."""
    with casting():
        scores = {name: Score.of(window_losses(model, of_domain, batch_size=8)) for name, of_domain in windows.items()}
        if facts:
            hits = facts_task(model, tokenizer, batch_size=32, limit=facts).scores
            scores["facts"] = Score.of(None, [hit > 0 for hit in hits])
    return scores


def batched(items: Sequence[Any], collate: Collate, size: int) -> list[Batch]:
    """Return the samples in batches, in order."""
    return [collate(items[start : start + size]) for start in range(0, len(items), size)]


def self_written(model: nn.Module, processor: Any, items: Sequence[Item], *, count: int, seed: int, cache: Path) -> list[Batch]:
    """Return what the base writes itself, on the items' pictures if it sees, as a context; from the cache where it is there."""
    path = cache / f"self-{type(model).__name__}-{base_digest(model, select_linears(model))[:12]}-{len(items)}-{count}-{seed}.jsonl"
    if not path.exists():
        self_context(model, processor, items, count=count, seed=seed, max_tokens=WINDOW).save(path)
    return unpadded(list(read_self_context(path, items)), Collator(processor))


def unpadded(items: Sequence[Any], collate: Collate) -> list[Batch]:
    """Return batches of samples of equal length and alike in whether they have a picture, so that all tokens count and no mask is needed.

    The mask would be that of the language model's tokens, which the layers of the vision tower do not have.
    """
    alike = defaultdict(list)
    for item in items:
        inputs = collate([item])
        alike[inputs["input_ids"].shape[1], "pixel_values" in inputs].append(item)
    batches = [batch for some in alike.values() for batch in batched(some, collate, 8)]
    return [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in batches]
