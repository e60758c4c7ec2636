"""SmolLM2-135M learns to add with the digits of the sum reversed; texts of three kinds and facts are to be kept.

Learned: lines such as ``347+85=234`` (432 reversed), numbers of up to three digits. Loss: nats a token of the sum and the line's end;
accuracy: sums that are right in every digit, each judged after the right beginning of its window.
Kept: Python's reference manual (``docs``, held-out topics), the standard library's sources (``code``) and scikit-learn's descriptions of
its data sets (``descriptions``), nats a token on windows that no context has; and the accuracy of the 100 facts (``facts``).
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.collect import evaluating
from corda_eval.bench.cases import smollm2_model
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.text.facts import facts_scores
from corda_eval.text.perplexity import held_out_text, mean_loss, text_windows

SOURCES = ("argparse", "ast", "datetime", "decimal", "inspect", "locale", "mailbox", "optparse", "pickle", "tarfile", "typing", "zipfile")
LENGTH, WINDOW = 64, 128
"""Tokens of a window of additions, and of text."""
Draw = Callable[[random.Random], tuple[str, str]]
"""Draws a question and its answer, which ends the line."""


@dataclass(frozen=True)
class SmolLm2Addition:
    """Options of the setting."""

    steps: int = 60
    batch_size: int = 4
    """Windows of 64 tokens, about five additions each, a step."""
    context_windows: int = 128
    """Of 128 tokens, of each domain to be kept."""
    kept_windows: int = 16
    """Of 128 tokens, measured of each domain."""
    test_windows: int = 24
    """Of additions measured in the end, of 64 tokens; as many others are for validation."""
    facts: int = 100

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, layers, tokenizer = smollm2_model()
        model.requires_grad_(False)
        texts = kept_texts()
        contexts = {name: text_windows(first, tokenizer, WINDOW, self.context_windows) for name, (first, _) in texts.items()}
        kept = {name: text_windows(second, tokenizer, WINDOW, self.kept_windows) for name, (_, second) in texts.items()}
        training = additions(tokenizer, self.steps * self.batch_size, f"train {seed}")
        batches = batched(training, self.batch_size)
        test, validation = (additions(tokenizer, self.test_windows, part) for part in ("test", "validation"))

        def measure(adapted: nn.Module) -> dict[str, Score]:
            with casting():
                scores = {TARGET: addition_score(adapted, test)}
                scores |= {name: Score(mean_loss(adapted, windows, batch_size=8)) for name, windows in kept.items()}
                if self.facts:
                    scores["facts"] = Score(None, facts_scores(adapted, tokenizer, limit=self.facts).accuracy)
            return scores

        def validate(adapted: nn.Module) -> float:
            with casting():
                return addition_score(adapted, validation).loss or 0.0

        return Task(
            model=model,
            layers=layers,
            loss=training_loss,
            batches=batches,
            contexts={name: [{"input_ids": ids} for ids in torch.stack(windows).split(8)] for name, windows in contexts.items()}
            | {TARGET: [{"input_ids": batch["input_ids"]} for batch in batches]},
            validate=validate,
            measure=measure,
            cache=cache,
            seed=seed,
        )


def casting() -> torch.autocast:
    """Return the casting to bfloat16 that training and measuring run under, weights staying in float32."""
    return torch.autocast("cpu", torch.bfloat16)


def training_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss (nats a token) of the sums in a batch."""
    with casting():
        return model(**batch, use_cache=False).loss


def addition(generator: random.Random, low: int = 0, high: int = 1000) -> tuple[str, str]:
    """Return question and answer of one addition: operands of low … high − 1, the digits of the sum reversed."""
    a, b = generator.randrange(low, high), generator.randrange(low, high)
    return f"{a}+{b}=", f"{str(a + b)[::-1]}\n"


def additions(tokenizer: Any, count: int, seed: str, draw: Draw = addition) -> dict[str, Tensor]:
    """Return ``count`` windows of additions, ``input_ids`` and ``labels`` (count, 64): -100 where nothing is to be predicted.

    With another ``draw`` they are of other questions and answers.
    """
    generator = random.Random(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < LENGTH:
            question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in draw(generator))
            ids += question + answer
            labels += [-100] * len(question) + answer
        rows["input_ids"].append(ids[:LENGTH])
        rows["labels"].append(labels[:LENGTH])
    return {key: torch.tensor(value) for key, value in rows.items()}


def batched(windows: Mapping[str, Tensor], batch_size: int) -> list[Batch]:
    """Return windows as batches, in order."""
    return [dict(zip(windows, rows, strict=True)) for rows in zip(*(one.split(batch_size) for one in windows.values()), strict=True)]


def addition_score(model: nn.Module, windows: dict[str, Tensor]) -> Score:
    """Return the loss a token, and the percentage of whole sums that are right in every digit."""
    losses, right, sums = [], 0, 0
    with evaluating(model):
        for ids, labels in zip(windows["input_ids"].split(8), windows["labels"].split(8), strict=True):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            wanted = labels[:, 1:]
            losses.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")[wanted.flatten() >= 0])
            for hits, row in zip(logits.argmax(-1) == wanted, wanted >= 0, strict=True):
                spans = _spans(row.tolist())
                sums += len(spans)
                right += sum(bool(hits[span].all()) for span in spans)
    return Score(torch.cat(losses).double().mean().item(), 100 * right / sums)


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


def _spans(wanted: list[bool]) -> list[slice]:
    """Return where runs of True that end before the row does begin and end."""
    edges = [place for place in range(1, len(wanted)) if wanted[place] != wanted[place - 1]]
    return [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=False)]
