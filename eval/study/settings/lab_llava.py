"""The lab LLaVA learns to read handwritten digits; questions about shapes, technical English and facts are to be kept.

Learned: "What digit is written?" over scikit-learn's scans. Loss: nats a token of the answer and the turn's end; accuracy: answers right
in every token. Training, validation and test are the splits of ``corda_eval.vqa.digits``, which share no scan.
Kept: easy-VQA (``easy_vqa``, the same two scores) on its test split, of which the context, its training split, has no picture; Python's
reference manual (``docs``, nats a token) on topics that the context lacks; the accuracy of the 100 facts (``facts``).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_eval.lab.base import load_lab
from corda_eval.study.settings.shared import answer_loss, answer_score, casting, drawn, spread
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.text.facts import facts_scores
from corda_eval.text.perplexity import held_out_text, mean_loss, text_windows
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.example import VqaExample
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count
from corda_vlm.towers import learnable_layers, select_layers

PARTS = ("vision", "projector", "language")
WINDOW = 128
"""Tokens of a window of text."""


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
    test_digits: Count = 100
    validation_digits: Count = 24
    """Measured eleven times in a training."""
    kept_questions: Count = 200
    kept_windows: Count = 16
    """Of 128 tokens, measured."""
    facts: Count = 100

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, processor = load_lab(torch.float32)
        model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
        model.requires_grad_(False)
        digits = load_digit_questions("train")
        training = [digits[place].as_item() for place in drawn(self.steps * self.batch_size, len(digits), f"train {seed}")]
        collate = Collator(processor, with_labels=True, trim_logits=True)
        batches = [collate(training[start : start + self.batch_size]) for start in range(0, len(training), self.batch_size)]
        asked = {
            TARGET: self._some(load_digit_questions("test"), self.test_digits),
            "validation": self._some(load_digit_questions("validation"), self.validation_digits),
            "easy_vqa": self._some(load_easy_vqa("test"), self.kept_questions),
        }
        questions = {name: [collate(items[start : start + 16]) for start in range(0, len(items), 16)] for name, items in asked.items()}
        known, held_out = held_out_text()
        windows = text_windows(held_out, processor.tokenizer, WINDOW, self.kept_windows)
        contexts: dict[str, Sequence[Batch]] = {
            "easy_vqa": unpadded(self._some(load_easy_vqa("train"), self.context_questions), Collator(processor)),
            "docs": [
                {"input_ids": ids} for ids in torch.stack(text_windows(known, processor.tokenizer, WINDOW, self.context_windows)).split(8)
            ],
            TARGET: unpadded(training, Collator(processor)),
        }

        def measure(adapted: nn.Module) -> dict[str, Score]:
            scores = {name: answer_score(adapted, questions[name]) for name in (TARGET, "easy_vqa")}
            with casting():
                scores["docs"] = Score(mean_loss(adapted, windows, batch_size=8))
                if self.facts:
                    scores["facts"] = Score(None, facts_scores(adapted, processor.tokenizer, limit=self.facts).accuracy)
            return scores

        return Task(
            model=model,
            layers=learnable_layers(model, select_layers(model, parts=PARTS), [contexts["easy_vqa"][0]]),
            loss=answer_loss,
            batches=batches,
            contexts=contexts,
            validate=lambda adapted: answer_score(adapted, questions["validation"]).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=math.log(10) / 2,  # a digit, and the turn's end
            kept_loss=partial(words_loss, image_token=model.config.image_token_id),
        )

    @staticmethod
    def _some(examples: Sequence[VqaExample], count: int) -> list[dict[str, object]]:
        """Return some of a split's questions with their answers, spread over it."""
        return [examples[place].as_item() for place in spread(count, len(examples))]


def words_loss(model: nn.Module, batch: Batch, *, image_token: int) -> Tensor:
    """Return the mean loss (nats a token) of a context batch's texts, each token but an image's after those before it."""
    ids = batch["input_ids"]
    with casting():
        return model(**batch, labels=ids.masked_fill(ids == image_token, -100), use_cache=False).loss


def unpadded(items: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Any]], size: int = 8) -> list[Batch]:
    """Return batches of samples that have as many tokens each, so that all tokens count and no mask is needed.

    The mask would be that of the language model's tokens, which the layers of the vision tower do not have.
    """
    by_length = defaultdict(list)
    for item in items:
        by_length[collate([item])["input_ids"].shape[1]].append(item)
    batches = [collate(some[start : start + size]) for some in by_length.values() for start in range(0, len(some), size)]
    return [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in batches]
