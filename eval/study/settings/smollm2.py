"""SmolLM2-135M learns to add with the digits of the sum reversed; texts of three kinds and facts are to be kept.

Learned: lines such as ``347+85=234`` (432 reversed), numbers of up to three digits. Loss: nats a token of the sum and the line's end;
accuracy: sums that are right in every digit and end there, each judged after the right beginning of its window. A pair of numbers is in
one of training, validation and test, whatever their order.
Kept: Python's reference manual (``docs``, held-out topics), the standard library's sources (``code``) and scikit-learn's descriptions of
its data sets (``descriptions``), nats a token on windows that no context has; and the accuracy of the 100 facts (``facts``).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from corda_eval.bench.cases import smollm2_model
from corda_eval.study.settings.shared import answer_loss, answer_score, casting
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.text.facts import facts_scores
from corda_eval.text.perplexity import held_out_text, mean_loss, text_windows

SOURCES = ("argparse", "ast", "datetime", "decimal", "inspect", "locale", "mailbox", "optparse", "pickle", "tarfile", "typing", "zipfile")
Draw = Callable[[random.Random], tuple[str, str]]
"""Gives a question and its answer."""
LENGTH, WINDOW = 64, 128
"""Tokens of a window of additions, and of text."""


@dataclass(frozen=True)
class SmolLm2Addition:
    """Options of the setting."""

    steps: int = 60
    batch_size: int = 4
    """Windows of 64 tokens, about five additions each, a step."""
    context_windows: int = 48
    """Of 128 tokens, of each domain to be kept; the descriptions have no more than 57."""
    kept_windows: int = 16
    """Of 128 tokens, measured of each domain."""
    test_windows: int = 24
    """Of 64 tokens of additions, measured in the end."""
    validation_windows: int = 12
    """Measured eleven times in a training."""
    facts: int = 100

    def measured(self) -> dict[str, int]:
        """Return how many windows are measured of each split."""
        return {"test": self.test_windows, "validation": self.validation_windows}

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, layers, tokenizer = smollm2_model()
        model.requires_grad_(False)
        texts = kept_texts()
        contexts = {name: text_windows(first, tokenizer, WINDOW, self.context_windows) for name, (first, _) in texts.items()}
        kept = {name: text_windows(second, tokenizer, WINDOW, self.kept_windows) for name, (_, second) in texts.items()}
        batches = additions(tokenizer, self.steps * self.batch_size, "train", seed, batch_size=self.batch_size)
        test, validation = (additions(tokenizer, count, split) for split, count in self.measured().items())

        def measure(adapted: nn.Module) -> dict[str, Score]:
            scores = {TARGET: answer_score(adapted, test)}
            with casting():
                scores |= {name: Score(mean_loss(adapted, windows, batch_size=8)) for name, windows in kept.items()}
                if self.facts:
                    scores["facts"] = Score(None, facts_scores(adapted, tokenizer, limit=self.facts).accuracy)
            return scores

        return Task(
            model=model,
            layers=layers,
            loss=answer_loss,
            batches=batches,
            contexts={name: [{"input_ids": ids} for ids in torch.stack(windows).split(8)] for name, windows in contexts.items()}
            | {TARGET: [{"input_ids": batch["input_ids"]} for batch in batches]},
            validate=lambda adapted: answer_score(adapted, validation).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            kept_loss=text_loss,
        )


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss (nats a token) of a context batch's texts, each token after those before it."""
    with casting():
        return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def additions(tokenizer: Any, count: int, split: str, seed: int = 0, *, batch_size: int = 8, low: int = 0, high: int = 1000) -> list[Batch]:
    """Return windows of additions of one split, operands of low … high − 1, as ``windows`` does.

    Raises:
        ValueError: If the split has no such pair.
    """
    if not any(split_of(a, b) == split for a in range(low, high) for b in range(low, a + 1)):
        raise ValueError(f"No sum of two numbers of {low} to {high - 1} is in the split {split!r}; take a wider range.")
    draw = partial(addition, split=split, low=low, high=high)
    return windows(tokenizer, count, draw, f"{split} {seed}", batch_size=batch_size)


def addition(generator: random.Random, split: str, low: int, high: int) -> tuple[str, str]:
    """Return question and answer of one addition of a split: the digits of the sum reversed."""
    while True:
        a, b = generator.randrange(low, high), generator.randrange(low, high)
        if split_of(a, b) == split:
            return f"{a}+{b}=", f"{str(a + b)[::-1]}\n"


def windows(tokenizer: Any, count: int, draw: Draw, seed: str, *, batch_size: int = 8) -> list[Batch]:
    """Return ``count`` windows of questions and answers in batches, ``input_ids`` and ``labels`` (batch, 64).

    Labels are the answers that are whole, and -100 elsewhere.
    """
    generator = random.Random(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < LENGTH:
            question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in draw(generator))
            ids += question + answer
            labels += [-100] * len(question) + (answer if len(ids) <= LENGTH else [-100] * len(answer))
        rows["input_ids"].append(ids[:LENGTH])
        rows["labels"].append(labels[:LENGTH])
    batches = zip(*(torch.tensor(values).split(batch_size) for values in rows.values()), strict=True)
    return [dict(zip(rows, batch, strict=True)) for batch in batches]


def split_of(a: int, b: int) -> str:
    """Return the split that has the sum of these two: the test and validation have a tenth each, by a checksum."""
    return {0: "test", 1: "validation"}.get(crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10, "train")


def kept_texts() -> dict[str, tuple[str, str]]:
    """Return by domain the text for contexts and that for measuring, which share no file and no topic.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError("scikit-learn is not installed; run: pip install 'corda-vlm[demo]'")
    sources = [Path(find_spec(name).origin).read_text(encoding="utf-8") for name in SOURCES]  # type: ignore[union-attr, arg-type]
    described = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    descriptions = [file.read_text(encoding="utf-8") for file in described if file.name.endswith(".rst")]
    return {
        "docs": held_out_text(),
        "code": ("\n\n".join(sources[::2]), "\n\n".join(sources[1::2])),
        "descriptions": ("\n\n".join(descriptions[::2]), "\n\n".join(descriptions[1::2])),
    }
