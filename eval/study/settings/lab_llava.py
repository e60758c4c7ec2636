"""The lab LLaVA learns to read handwritten digits; questions about shapes, technical English and facts are to be kept.

Learned: "What digit is written?" over scikit-learn's scans. Loss: nats a token of the answer and the turn's end; accuracy: answers right
in every token. Training, validation and test are the splits of ``corda_eval.vqa.digits``, which share no scan.
Kept: easy-VQA (``easy_vqa``, the same two scores) on its test split, of which the context, its training split, has no picture; Python's
reference manual (``docs``, nats a token) on topics that the context lacks; the accuracy of the 100 facts (``facts``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from corda_eval.lab.base import load_lab
from corda_eval.study.settings.shared import (
    COMPARED,
    WINDOW,
    Whole,
    answer_loss,
    answer_score,
    batched,
    casting,
    drawn,
    guess_of,
    kept_scores,
    self_written,
    spread,
    text_context,
    text_loss,
    unpadded,
)
from corda_eval.study.task import TARGET, Score, Task
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.example import VqaExample
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count
from corda_vlm.towers import learnable_layers, select_layers

PARTS = ("vision", "projector", "language")
NUM_ANSWERS = 13
"""Of easy-VQA."""


@dataclass(frozen=True)
class LabLlavaDigits:
    """Options of the setting."""

    steps: Count = 60
    batch_size: Count = 4
    """Digits a step, about 35 tokens each."""
    context_questions: Count = 192
    """Of easy-VQA."""
    context_windows: Count = 64
    """Of 128 tokens of text."""
    self_samples: Count = 192
    """That the base writes, where it is asked to."""
    test_digits: Count = 100
    validation_digits: Count = 24
    """Measured eleven times in a training."""
    kept_questions: Count = 200
    kept_windows: Count = 16
    """Of 128 tokens, measured."""
    facts: Whole = 100
    """Asked of the 100; 0 leaves them out."""
    fresh_contexts: bool = False
    """Whether each seed has contexts of its own."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, processor = load_lab(torch.float32)
        model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
        model.requires_grad_(False)
        tokenizer, collate = processor.tokenizer, Collator(processor, with_labels=True, trim_logits=True)
        digits = load_digit_questions("train")
        training = [digits[place].as_item() for place in drawn(self.steps * self.batch_size, len(digits), f"train {seed}")]
        asked = {name: batched(items, collate, 16) for name, items in self.asked().items()}
        known, held_out = held_out_text()
        fresh = f"context {seed}" if self.fresh_contexts else None
        windows = {"docs": text_windows(held_out, tokenizer, WINDOW, self.kept_windows)}
        contexts = {
            "easy_vqa": unpadded(some_of(load_easy_vqa("train"), self.context_questions, fresh), Collator(processor)),
            "docs": text_context(known, tokenizer, self.context_windows, fresh),
            TARGET: unpadded(training, Collator(processor)),
        }

        def measure(adapted: nn.Module) -> dict[str, Score]:
            answered = {name: answer_score(adapted, asked[name]) for name in (TARGET, "easy_vqa")}
            return answered | kept_scores(adapted, tokenizer, windows, self.facts)

        return Task(
            model=model,
            layers=learnable_layers(model, select_layers(model, parts=PARTS), [contexts["easy_vqa"][0]]),
            loss=answer_loss,
            batches=batched(training, collate, self.batch_size),
            contexts=contexts,
            validate=lambda adapted: answer_score(adapted, asked["validation"]).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=math.log(10) / 2,  # a digit, and the turn's end
            kept_guessing={"easy_vqa": guess_of(asked["easy_vqa"], NUM_ANSWERS)},
            written=partial(self_written, processor=processor, items=training, count=self.self_samples, seed=seed, cache=cache),
            held_out={"easy_vqa": asked["easy_vqa"][:2], "docs": [{"input_ids": torch.stack(windows["docs"][:COMPARED])}]},
            casting=casting,
            kept_loss=partial(text_loss, image_token=model.config.image_token_id),
        )

    def asked(self) -> dict[str, list[dict[str, object]]]:
        """Return the questions that are measured."""
        return {
            TARGET: some_of(load_digit_questions("test"), self.test_digits),
            "validation": some_of(load_digit_questions("validation"), self.validation_digits),
            "easy_vqa": some_of(load_easy_vqa("test"), self.kept_questions),
        }


def some_of(examples: Sequence[VqaExample], count: int, seed: str | None = None) -> list[dict[str, object]]:
    """Return at most ``count`` of a split's questions with their answers: evenly spread, or drawn with a seed."""
    count = min(count, len(examples))
    places = spread(count, len(examples)) if seed is None else drawn(count, len(examples), seed)
    return [examples[place].as_item() for place in places]
