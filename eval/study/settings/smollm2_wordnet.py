"""SmolLM2-135M learns to name what WordNet defines; what it knows of other nouns, and texts of two kinds, are to be kept.

Learned: ``a strong flame that burns brightly:`` and `` blaze``; nats a token of the word and the line's end, words right in every token.
Words are learned, tried and measured each by themselves (``wordnet.ROLES``), so that what counts is how well new definitions are named.
Kept: what 2,000 other nouns are a kind of (``wordnet``: the right one of four words, all of one token; nats of the four, so that a guesser
has log 4, and whether it is the likeliest); Python's manual (``docs``) and its library's sources (``code``), nats a token.
The contexts are such statements on further nouns, and the manual's other topics, drawn with the seed; none has sources.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from corda_core.linears import evaluating
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.study.settings.lines import LENGTH, windows
from corda_eval.study.settings.shared import (
    COMPARED,
    answer_loss,
    answer_score,
    casting,
    drawn,
    kept_scores,
    self_written,
    text_context,
    text_loss,
)
from corda_eval.study.settings.smollm2 import library_sources
from corda_eval.study.settings.wordnet import CHOICES, Noun, Question, nouns, questions, statement
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_vlm.options import Count, Place

KEPT_WINDOW = 48
"""Tokens of a measured window: the manual has no 500 longer ones."""
AT_ONCE = 64
"""Questions of one length."""


@dataclass(frozen=True)
class SmolLm2Wordnet:
    """Options of the setting."""

    wordnet: Place = "/usr/share/wordnet"
    """Folder of WordNet's files; ``corda_eval.study.settings.wordnet`` says how to get them."""
    steps: Count = 300
    batch_size: Count = 4
    """Windows of 64 tokens a step, about four definitions each."""
    context_windows: Count = 48
    """Of 128 tokens, of each domain."""
    self_samples: Count = 48
    """That the base writes, where it is asked to."""
    test_windows: Count = 100
    """Of 64 tokens of definitions, measured in the end."""
    validation_windows: Count = 12
    """Measured eleven times in a training."""
    kept_questions: Count = 2000
    kept_windows: Count = 500
    """Of 48 tokens, measured of each text."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data.

        Raises:
            FileNotFoundError: If WordNet is not there; says how to get it.
        """
        folder = Path(self.wordnet)
        by_role = {role: nouns(folder, role) for role in ("train", "validation", "test", "context", "asked")}
        model, layers, tokenizer = smollm2_model()
        model.requires_grad_(False)
        texts = {"docs": held_out_text(), "code": library_sources()}
        kept = {name: text_windows(held_out, tokenizer, KEPT_WINDOW, self.kept_windows) for name, (_, held_out) in texts.items()}
        asked = prepared(questions(by_role["asked"], single_tokens(by_role["asked"], tokenizer), self.kept_questions), tokenizer)
        statements = random.Random(f"context {seed}").sample(by_role["context"], len(by_role["context"]))
        known = {"wordnet": "".join(f"{statement(noun)} {noun.kind}.\n" for noun in statements), "docs": texts["docs"][0]}
        contexts = {name: text_context(text, tokenizer, self.context_windows, f"context {seed}") for name, text in known.items()}
        training = definitions(tokenizer, by_role["train"], self.steps * self.batch_size, f"train {seed}", self.batch_size)
        test = definitions(tokenizer, by_role["test"], self.test_windows, "test", 8)
        validation = definitions(tokenizer, by_role["validation"], self.validation_windows, "validation", 8)

        def measure(adapted: nn.Module) -> dict[str, Score]:
            answered = {TARGET: answer_score(adapted, test), "wordnet": choice_score(adapted, asked)}
            return answered | kept_scores(adapted, tokenizer, kept, facts=0)

        return Task(
            model=model,
            layers=layers,
            loss=answer_loss,
            batches=training,
            contexts=contexts | {TARGET: [{"input_ids": batch["input_ids"]} for batch in training]},
            validate=lambda adapted: answer_score(adapted, validation).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=guessing([noun.word for noun in by_role["train"]], tokenizer),
            kept_guessing={"wordnet": math.log(CHOICES)},
            written=partial(self_written, processor=tokenizer, items=(), count=self.self_samples, seed=seed, cache=cache),
            held_out={name: [{"input_ids": torch.stack(some[: 2 * COMPARED])}] for name, some in kept.items()}
            | {"wordnet": [{"input_ids": ids} for ids, _ in asked[:COMPARED]]},
            casting=casting,
            kept_loss=text_loss,
        )


def definitions(tokenizer: PreTrainedTokenizerBase, some: Sequence[Noun], count: int, seed: str, batch_size: int) -> list[Batch]:
    """Return ``count`` windows of definitions and the words that they define, as ``lines.windows``; all come before any comes again."""
    order = iter(drawn(LENGTH * count, len(some), seed))  # more than windows of tokens can hold

    def draw(_: random.Random) -> tuple[str, str]:
        noun = some[next(order)]
        return f"{noun.definition}:", f" {noun.word}\n"

    return windows(tokenizer, count, draw, seed, batch_size=batch_size)


def guessing(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the loss (nats a token) of who knows that the answer is one of these words, and no more."""
    tokens = fmean(len(tokenizer(f" {word}\n", add_special_tokens=False)["input_ids"]) for word in words)
    return math.log(len(words)) / tokens


def single_tokens(some: Sequence[Noun], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return which of the nouns' kinds are one token behind a space."""
    return {kind for kind in {noun.kind for noun in some} if len(tokenizer(f" {kind}", add_special_tokens=False)["input_ids"]) == 1}


def prepared(asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
    """Return questions of equal length together: tokens (batch, t), and the choices' (batch, 4)."""
    by_length = defaultdict(list)
    for question in asked:
        ids = tokenizer(question.text, add_special_tokens=False)["input_ids"]
        choices = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in question.choices]
        by_length[len(ids)].append((ids, choices))
    pairs = [(torch.tensor(ids), torch.tensor(choices)) for some in by_length.values() for ids, choices in [zip(*some, strict=True)]]
    return [batch for ids, choices in pairs for batch in zip(ids.split(AT_ONCE), choices.split(AT_ONCE), strict=True)]


def choice_score(model: nn.Module, asked: Sequence[tuple[Tensor, Tensor]]) -> Score:
    """Return how well a model chooses, as ``prepared``: the loss is that of the first choice among all, in nats."""
    losses: list[float] = []
    right: list[bool] = []
    with evaluating(model), casting():
        for ids, choices in asked:
            logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].float().gather(1, choices)
            losses += F.cross_entropy(logits, torch.zeros(len(ids), dtype=torch.long), reduction="none").tolist()
            right += (logits.argmax(1) == 0).tolist()
    return Score.of(losses, right)
