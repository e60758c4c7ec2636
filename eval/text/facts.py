"""Facts: 100 multiple-choice questions of common knowledge, run by lm-evaluation-harness on a model in memory.

Data: ``facts.jsonl`` beside this file, written for this project (Apache-2.0). Task: ``facts.yaml``, named ``corda_facts``.
Score: the share of questions whose right choice has the highest summed log-likelihood after the question.
Guessing gives a quarter: the right answer stands equally often in each of the four places.
Note: in bfloat16 padding moves the scores by up to 0.2 nats, a question or so in a hundred; compare runs of one batch size.
"""

import time
from dataclasses import replace
from pathlib import Path

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from corda_eval.records import TaskResult
from corda_eval.text.harness import result_of, run_tasks

FACTS_FILE = Path(__file__).parent / "facts.jsonl"
TASK_FILE = Path(__file__).parent / "facts.yaml"


def facts_task(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 1, limit: int | None = None) -> TaskResult:
    """Return how many facts the model knows, scored by lm_eval without a network, as a task named "facts".

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
    config = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(FACTS_FILE.resolve())}}  # any working directory will do
    start = time.perf_counter()
    report = run_tasks(model, tokenizer, [config], batch_size=batch_size, limit=limit)
    count = len(report["samples"]["corda_facts"])
    return replace(result_of("corda_facts", report, count / (time.perf_counter() - start)), task="facts")
