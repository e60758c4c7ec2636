"""The lab LLaVA learns from text alone, lines such as letters to sort; questions about images and technical English are to be kept.

Text alone makes vision-language models forget what they read in images. Tower and projector see no text, so only the language model's
layers may change. Learned: one kind of ``lines``: nats a token of the answer and the line's end, answers right in every token.
Kept: easy-VQA (``easy_vqa``, the same two scores) and Python's manual (``docs``, nats a token), as in ``lab_llava``. Handwritten digits are
not among them: this model reads none, and the loss of what is not known cannot tell what was forgotten.
The contexts are drawn with the seed. What the model writes itself, where it is asked to, is on pictures of digits: none of what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corda_eval.lab.base import load_lab
from corda_eval.study.settings.lab_llava import NUM_ANSWERS, some_of
from corda_eval.study.settings.lines import guessing, lines
from corda_eval.study.settings.shared import (
    COMPARED,
    WINDOW,
    answer_loss,
    answer_score,
    batched,
    casting,
    guess_of,
    kept_scores,
    self_written,
    text_context,
    text_loss,
    unpadded,
)
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count
from corda_vlm.towers import learnable_layers, select_layers


@dataclass(frozen=True)
class LabLlavaText:
    """Options of the setting."""

    line: str = "sorting"
    """What is learned: a kind of ``corda_eval.study.settings.lines``."""
    steps: Count = 60
    batch_size: Count = 4
    """Windows of 64 tokens a step, about five lines each."""
    context_questions: Count = 192
    """Of easy-VQA."""
    context_windows: Count = 64
    """Of 128 tokens of text."""
    self_samples: Count = 192
    """That the base writes, where it is asked to."""
    test_windows: Count = 60
    """Of 64 tokens of lines, measured in the end."""
    validation_windows: Count = 4
    """Measured eleven times in a training."""
    kept_questions: Count = 300
    kept_windows: Count = 64
    """Of 128 tokens, measured."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, processor = load_lab(torch.float32)
        model.set_attn_implementation("eager")  # on a CPU faster than the fused kernel at 40 tokens
        model.requires_grad_(False)
        tokenizer = processor.tokenizer
        windows = {"docs": text_windows(held_out_text()[1], tokenizer, WINDOW, self.kept_windows)}
        asked = batched(some_of(load_easy_vqa("test"), self.kept_questions), Collator(processor, with_labels=True, trim_logits=True), 16)
        training = lines(tokenizer, self.line, self.steps * self.batch_size, "train", seed, batch_size=self.batch_size)
        test, validation = (
            lines(tokenizer, self.line, count, split)
            for count, split in ((self.test_windows, "test"), (self.validation_windows, "validation"))
        )
        contexts = self.kept_contexts(processor, f"context {seed}")

        def measure(adapted: nn.Module) -> dict[str, Score]:
            answered = {TARGET: answer_score(adapted, test), "easy_vqa": answer_score(adapted, asked)}
            return answered | kept_scores(adapted, tokenizer, windows, facts=0)

        pictured = [example.as_item() for example in load_digit_questions("train")]
        return Task(
            model=model,
            layers=learnable_layers(model, select_layers(model, parts=("language",)), [contexts["docs"][0]]),
            loss=answer_loss,
            batches=training,
            contexts=contexts | {TARGET: [{"input_ids": batch["input_ids"]} for batch in training]},
            validate=lambda adapted: answer_score(adapted, validation).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=guessing(self.line),
            kept_guessing={"easy_vqa": guess_of(asked, NUM_ANSWERS)},
            written=partial(self_written, processor=processor, items=pictured, count=self.self_samples, seed=seed, cache=cache),
            held_out={"easy_vqa": asked[:2], "docs": [{"input_ids": torch.stack(windows["docs"][:COMPARED])}]},
            casting=casting,
            kept_loss=partial(text_loss, image_token=model.config.image_token_id),
        )

    def kept_contexts(self, processor: Any, seed: str) -> dict[str, Sequence[Batch]]:
        """Return the contexts of what is to be kept."""
        questions = some_of(load_easy_vqa("train"), self.context_questions, seed)
        return {
            "easy_vqa": unpadded(questions, Collator(processor)),
            "docs": text_context(held_out_text()[0], processor.tokenizer, self.context_windows, seed),
        }
