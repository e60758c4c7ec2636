"""Facts: 100 multiple-choice questions of common knowledge, run by lm-evaluation-harness on a model in memory.

Data: ``facts.jsonl`` beside this file, written for this project (Apache-2.0). Task: ``facts.yaml``, named ``corda_facts``.
Score: accuracy in percent; the prediction is the choice with the highest summed log-likelihood after the question.
Guessing gives 25: the right answer stands equally often in each of the four places.
Note: in bfloat16 padding moves the scores by up to 0.2 nats, a question or so in a hundred; compare runs of one batch size.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from corda_eval.records import TaskResult, read_lines
from corda_eval.text.harness import result_of, run_tasks

FACTS_FILE = Path(__file__).parent / "facts.jsonl"
TASK_FILE = Path(__file__).parent / "facts.yaml"


@dataclass(frozen=True)
class Fact:
    """One question with four choices; ``answer`` is the place of the right one, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class FactsResult:
    """Score and per-question outcome, in the order of ``facts.jsonl``.

    Accuracy is in percent. A prediction is the place of the chosen answer, from 0.
    """

    accuracy: float
    num_questions: int
    hits: list[bool]
    predictions: list[int]


def load_facts() -> list[Fact]:
    """Return the questions in file order."""
    return [Fact(row["question"], tuple(row["choices"]), row["answer"]) for row in read_lines(FACTS_FILE)]


def facts_scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, limit: int | None = None) -> FactsResult:
    """Return how many facts the model knows, scored by lm_eval without a network.

    Args:
        model: A transformers model that predicts text from ``input_ids`` alone, adapted or not; a LLaVA answers without an image.
        tokenizer: The tokenizer of its language model.
        batch_size: Choices scored at once, padded on the right.
        limit: Only the first questions of the file; None for all.

    Raises:
        ModuleNotFoundError: If lm_eval is not installed.
        ValueError: If ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; ask at least one question, or all of them with None.")
    report = run_tasks(model, tokenizer, [_task_config()], batch_size=batch_size, limit=limit)
    samples = sorted(report["samples"]["corda_facts"], key=lambda sample: sample["doc_id"])
    return _result(samples)


def facts_task(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 1, limit: int | None = None) -> TaskResult:
    """Return the same as a task of a suite, named "facts".

    Raises:
        ModuleNotFoundError: If lm_eval is not installed.
    """
    start = time.perf_counter()
    report = run_tasks(model, tokenizer, [_task_config()], batch_size=batch_size, limit=limit)
    count = len(report["samples"]["corda_facts"])
    return replace(result_of("corda_facts", report, count / (time.perf_counter() - start)), task="facts")


def _task_config() -> dict[str, Any]:
    """Return the task of ``facts.yaml`` with the absolute path of its data, so that any working directory will do."""
    config = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(FACTS_FILE.resolve())}}
    return config


def _result(samples: list[dict[str, Any]]) -> FactsResult:
    """Read the per-question records of lm_eval; equal log-likelihoods count for the first choice, as in its accuracy."""
    hits = [bool(sample["acc"]) for sample in samples]
    scores = [[log_likelihood for log_likelihood, _ in sample["filtered_resps"]] for sample in samples]
    predictions = [choices.index(max(choices)) for choices in scores]
    return FactsResult(100 * sum(hits) / len(hits), len(hits), hits, predictions)
