"""The lab's suite: one target and three kept tasks, measured by the same code before and after."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from corda_eval.metrics import exact_match
from corda_eval.text.facts import facts_scores, load_facts
from corda_eval.text.perplexity import held_out_text, text_windows, window_losses
from corda_eval.vqa.answer import answer_questions
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.vqa.example import VqaExample

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
WINDOW = 256


@dataclass(frozen=True)
class Suite:
    """What is measured: examples by task, all of them fixed before any model is seen."""

    digits: list[VqaExample]
    easy_vqa: list[VqaExample]
    num_facts: int
    windows: list[Tensor]


@dataclass(frozen=True)
class Measurement:
    """Scores by task: percent, perplexity for "text"."""

    scores: dict[str, float]
    hits: dict[str, list[bool]] = field(default_factory=dict)
    """By task, whether each example was right."""

    answers: dict[str, list[str]] = field(default_factory=dict)
    """By task, what the model said to each example."""

    window_losses: list[float] = field(default_factory=list)
    """Mean loss of each window of held-out text, in nats a token."""


def load_suite(tokenizer: Any, *, digits: str, num_digits: int, easy_vqa: range, num_facts: int, num_windows: int) -> Suite:
    """Return the suite.

    Args:
        tokenizer: Cuts the held-out text into windows.
        digits: "validation" or "test".
        num_digits: How many of them.
        easy_vqa: Which questions of easy-VQA's test split.
        num_facts: How many of the 100 facts; 0 leaves them out.
        num_windows: How many windows of 256 tokens of held-out text; 0 leaves it out.
    """
    windows = text_windows(held_out_text()[1], tokenizer, WINDOW, num_windows) if num_windows else []
    return Suite(load_digit_questions(digits)[:num_digits], load_easy_vqa("test", indices=easy_vqa), num_facts, windows)


def measure(model: Any, processor: Any, suite: Suite, progress: Progress = lambda steps, _: steps) -> Measurement:
    """Return the model's scores on the suite."""
    measured = Measurement({})
    for task, examples in (("digits", suite.digits), ("easy_vqa", suite.easy_vqa)):
        answers = answer_questions(model, processor, examples, progress=lambda steps, task=task: progress(steps, task))
        _record(measured, task, answers, [exact_match(a, e.answer) for a, e in zip(answers, examples, strict=True)])
    if suite.num_facts:
        facts = load_facts()[: suite.num_facts]
        result = facts_scores(model, processor.tokenizer, limit=suite.num_facts)
        _record(measured, "facts", [fact.choices[place] for fact, place in zip(facts, result.predictions, strict=True)], result.hits)
    if suite.windows:
        measured.window_losses.extend(window_losses(model, suite.windows, progress=lambda steps: progress(list(steps), "text")))
        measured.scores["text"] = math.exp(sum(measured.window_losses) / len(measured.window_losses))
    return measured


def questions_of(suite: Suite, task: str) -> Sequence[tuple[str, str]]:
    """Return (question, right answer) of one task's examples, in the order of its answers."""
    if task == "facts":
        return [(fact.question, fact.choices[fact.answer]) for fact in load_facts()[: suite.num_facts]]
    return [(example.question, example.answer) for example in (suite.digits if task == "digits" else suite.easy_vqa)]


def _record(measured: Measurement, task: str, answers: list[str], hits: list[bool]) -> None:
    measured.answers[task], measured.hits[task] = answers, hits
    measured.scores[task] = 100 * sum(hits) / len(hits)
