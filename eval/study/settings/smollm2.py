"""SmolLM2-135M learns to answer lines of one kind or several (``lines``); texts of three kinds and facts are to be kept.

Learned: letters sorted, or sums with their digits reversed. Loss: nats a token of the answer and the line's end; accuracy: answers that are
right in every token and end there, each judged after the right beginning of its window. Of several kinds ``TARGET`` is the mean of losses
and accuracies, and each is reported beside it.
Kept: Python's reference manual (``docs``, held-out topics), the standard library's sources (``code``) and scikit-learn's descriptions of
its data sets (``descriptions``), nats a token on windows that no context has; and the accuracy of the 100 facts (``facts``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.study.settings.lines import guessing, lines
from corda_eval.study.settings.shared import (
    COMPARED,
    WINDOW,
    Whole,
    answer_loss,
    answer_score,
    casting,
    kept_scores,
    self_written,
    text_context,
    text_loss,
)
from corda_eval.study.task import TARGET, Score, Task
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_vlm.options import Count

SOURCES = ("argparse", "ast", "datetime", "decimal", "inspect", "locale", "mailbox", "optparse", "pickle", "tarfile", "typing", "zipfile")


@dataclass(frozen=True)
class SmolLm2Lines:
    """Options of the setting."""

    lines: Sequence[str] = ("sorting",)
    """What is learned, at once: "sorting", "addition"."""
    steps: Count = 60
    batch_size: Count = 4
    """Windows of 64 tokens of each kind, about five lines each, a step."""
    context_windows: Count = 48
    """Of 128 tokens, of each domain to be kept; the descriptions have no more than 57."""
    self_samples: Count = 48
    """That the base writes, where it is asked to."""
    kept_windows: Count = 16
    """Of 128 tokens, measured of each domain."""
    test_windows: Count = 24
    """Of 64 tokens of each kind of lines, measured in the end."""
    validation_windows: Count = 12
    """Measured eleven times in a training."""
    facts: Whole = 100
    """Asked of the 100; 0 leaves them out."""
    fresh_contexts: bool = False
    """Whether each seed has contexts of its own."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data.

        Raises:
            ValueError: If a kind of lines is unknown, or none is given.
        """
        if not self.lines:
            raise ValueError("The setting has no lines to learn; name at least one kind, for instance lines: [sorting].")
        model, layers, tokenizer = smollm2_model()
        model.requires_grad_(False)
        texts = kept_texts()
        fresh = f"context {seed}" if self.fresh_contexts else None
        contexts = {name: text_context(first, tokenizer, self.context_windows, fresh) for name, (first, _) in texts.items()}
        kept = {name: text_windows(second, tokenizer, WINDOW, self.kept_windows) for name, (_, second) in texts.items()}
        count = self.steps * self.batch_size
        training = {kind: lines(tokenizer, kind, count, "train", seed, batch_size=self.batch_size) for kind in self.lines}
        test = {kind: lines(tokenizer, kind, self.test_windows, "test") for kind in self.lines}
        validation = {kind: lines(tokenizer, kind, self.validation_windows, "validation") for kind in self.lines}
        learned = {kind: [{"input_ids": batch["input_ids"]} for batch in batches] for kind, batches in training.items()}
        parts = learned if len(learned) > 1 else {}

        def measure(adapted: nn.Module) -> dict[str, Score]:
            each = {kind: answer_score(adapted, batches) for kind, batches in test.items()}
            learned_scores = {TARGET: mean_score(*each.values())} | {kind: each[kind] for kind in parts}
            return learned_scores | kept_scores(adapted, tokenizer, kept, self.facts)

        return Task(
            model=model,
            layers=layers,
            loss=answer_loss,
            batches=[{key: torch.cat([batch[key] for batch in step]) for key in step[0]} for step in zip(*training.values(), strict=True)],
            contexts=contexts | parts | {TARGET: [batch for batches in learned.values() for batch in batches]},
            validate=lambda adapted: mean_score(*(answer_score(adapted, batches) for batches in validation.values())).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            learned=tuple(parts),
            guessing=mean(guessing(kind) for kind in self.lines),
            written=partial(self_written, processor=tokenizer, items=(), count=self.self_samples, seed=seed, cache=cache),
            held_out={name: [{"input_ids": torch.stack(windows[:COMPARED])}] for name, windows in kept.items()},
            casting=casting,
            kept_loss=text_loss,
        )


def mean_score(*scores: Score) -> Score:
    """Return the mean loss and the mean accuracy of what has both."""
    return Score(*(mean(getattr(score, field) for score in scores) for field in ("loss", "accuracy")))


def kept_texts() -> dict[str, tuple[str, str]]:
    """Return by domain the text for contexts and that for measuring, which share no file and no topic.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError("scikit-learn is not installed; run: pip install 'corda-vlm[demo]'")
    described = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    descriptions = [file.read_text(encoding="utf-8") for file in described if file.name.endswith(".rst")]
    return {
        "docs": held_out_text(),
        "code": library_sources(),
        "descriptions": ("\n\n".join(descriptions[::2]), "\n\n".join(descriptions[1::2])),
    }


def library_sources() -> tuple[str, str]:
    """Return the sources of some modules of the standard library, and of others."""
    sources = [Path(find_spec(name).origin).read_text(encoding="utf-8") for name in SOURCES]  # type: ignore[union-attr, arg-type]
    return "\n\n".join(sources[::2]), "\n\n".join(sources[1::2])
