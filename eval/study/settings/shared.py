"""What several settings do alike."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.linears import evaluating
from corda_eval.study.task import Batch, Score


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

    An answer is a run of labels: right if each of its tokens is the likeliest after those before it, which is when a model that always
    takes the likeliest token would give this answer. Nothing is generated.

    Args:
        model: A language model or a vision-language model.
        batches: Arguments of the model, with ``labels`` (batch, tokens): -100 where nothing is to be predicted. With ``logits_to_keep``
            they are those of the logits kept.
    """
    losses, right, answers = [], 0, 0
    with evaluating(model), casting():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits, wanted = model(**inputs, use_cache=False).logits[:, :-1].float(), batch["labels"][:, 1:]
            asked = wanted >= 0
            losses.append(F.cross_entropy(logits[asked], wanted[asked], reduction="none"))
            numbers = (asked & ~F.pad(asked, (1, 0))[:, :-1]).flatten().cumsum(0)[asked.flatten()] - 1  # of the answer that a token is in
            wrong = torch.unique(numbers[logits[asked].argmax(-1) != wanted[asked]])
            answers += int(numbers[-1]) + 1
            right += int(numbers[-1]) + 1 - len(wrong)
    return Score(torch.cat(losses).double().mean().item(), 100 * right / answers)
