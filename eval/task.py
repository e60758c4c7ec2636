"""What every evaluation comes to, whatever it asked: figures, one score an example, and what was predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """One task done with one model."""

    task: str
    """Its usual name, such as "vqav2" or "imagenet1k"."""

    metrics: Mapping[str, float]
    """By their usual names; fractions from 0 to 1, perplexities as they are."""

    headline: str
    """Which of them is compared; higher is better, except for "perplexity" and "word_perplexity"."""

    scores: Sequence[float]
    """Each example's part of the headline, in the order of the data: what paired intervals are drawn from."""

    records: Sequence[Mapping[str, Any]]
    """One each time that something was asked, JSON values: its id, what was predicted, what is right. As many as scores, but of benchmarks
    that ask an example in several ways (MMBench)."""

    examples_per_second: float

    @property
    def num_examples(self) -> int:
        """How many examples were scored."""
        return len(self.scores)
