"""SmolLM2-135M learns two things at once: to add with the digits of the sum reversed, and to sort letters.

Additions, texts and facts are those of ``smollm2``. Sorted are four to six different letters, in lines such as ``d b a c > a b c d``.
``TARGET`` is the mean of both tasks' loss and of their accuracy; ``addition`` and ``sorting`` are reported beside it.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import torch
from torch import nn
from transformers import LlavaProcessor

from corda_eval.lab.base import lab_folder
from corda_eval.study.settings.shared import answer_score
from corda_eval.study.settings.smollm2 import SmolLm2Addition, windows
from corda_eval.study.task import TARGET, Score, Task

ADDITION, SORTING = "addition", "sorting"


def sorting(generator: random.Random) -> tuple[str, str]:
    """Return four to six different letters in random order, and in alphabetical order."""
    letters = generator.sample(ascii_lowercase, generator.randint(4, 6))
    return f"{' '.join(letters)} >", f" {' '.join(sorted(letters))}\n"


@dataclass(frozen=True)
class SmolLm2AdditionAndSorting(SmolLm2Addition):
    """Options of the setting, which are those of ``SmolLm2Addition``."""

    batch_size: int = 2
    """Windows of 64 tokens of each of the two tasks in a step, about five lines each."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        single = super().task(seed, cache)
        tokenizer = LlavaProcessor.from_pretrained(lab_folder(), local_files_only=True).tokenizer
        batches = windows(tokenizer, self.steps * self.batch_size, sorting, f"train {seed}", batch_size=self.batch_size)
        test, validation = (windows(tokenizer, count, sorting, split) for split, count in self.measured().items())

        def measure(adapted: nn.Module) -> dict[str, Score]:
            kept = single.measure(adapted)
            parts = {ADDITION: kept.pop(TARGET), SORTING: answer_score(adapted, test)}
            return {TARGET: mean_score(*parts.values())} | parts | kept

        def validate(adapted: nn.Module) -> float:
            return (single.validate(adapted) + (answer_score(adapted, validation).loss or 0.0)) / 2

        contexts = dict(single.contexts)
        learned = {ADDITION: contexts.pop(TARGET), SORTING: [{"input_ids": batch["input_ids"]} for batch in batches]}
        return replace(
            single,
            batches=[{key: torch.cat([one[key], other[key]]) for key in one} for one, other in zip(single.batches, batches, strict=True)],
            contexts=contexts | learned | {TARGET: [batch for part in learned.values() for batch in part]},
            validate=validate,
            measure=measure,
            learned=tuple(learned),
        )


def mean_score(*scores: Score) -> Score:
    """Return the mean loss and the mean accuracy of what has both."""
    losses, accuracies = ([getattr(score, field) for score in scores] for field in ("loss", "accuracy"))
    return Score(sum(losses) / len(losses), sum(accuracies) / len(accuracies))
