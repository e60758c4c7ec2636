"""Measure a model on a benchmark: questions asked, answers scored, figures by the names that everybody uses."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from corda_eval.records import TaskResult
from corda_eval.vqa import digits, easy_vqa, gqa, mmbench, okvqa, pmc_vqa, pope, scienceqa, textvqa, vizwiz, vqav2
from corda_eval.vqa.answer import Asking
from corda_eval.vqa.example import VqaExample, VqaTask
from corda_eval.vqa.generate import generate_answers

TASKS = {
    task.name: task
    for task in (
        digits.TASK,
        easy_vqa.TASK,
        gqa.TASK,
        mmbench.TASK,
        okvqa.TASK,
        pmc_vqa.TASK,
        pope.TASK,
        scienceqa.TASK,
        scienceqa.IMAGE_TASK,
        textvqa.TASK,
        textvqa.OCR_TASK,
        vizwiz.TASK,
        vqav2.TASK,
    )
}
"""Each benchmark by its name."""


def answer_benchmark(
    task: VqaTask,
    examples: Sequence[VqaExample],
    model: Any,
    processor: Any,
    asking: Asking | None = None,
    *,
    predictions: str | Path | None = None,
    batch_size: int = 1,
    progress: Any = iter,
) -> TaskResult:
    """Return a model's figures on a benchmark: the mean score, also by kind of question ("accuracy:binary"), and what else it defines.

    Args:
        task: The benchmark.
        examples: Its examples, from ``task.load``.
        model: A LLaVA-type model, adapted or not.
        processor: Its processor.
        asking: How questions are asked; None asks them plainly and takes the benchmark's limit of tokens.
        predictions: File that answers are added to as they come, and that a killed run is resumed from.
        batch_size: Questions asked at once; 1 is the reference, others may change answers (``check_batch_invariance``).
        progress: Wraps the iterable of batches, a progress bar for instance.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If two questions have one id, an image cannot be read, or the file is of another run or broken.
    """
    asking = asking or Asking(task.max_new_tokens)
    answered = generate_answers(task.name, examples, model, processor, asking, path=predictions, batch_size=batch_size, progress=progress)
    answers = [prediction.answer for prediction in answered]
    return score(task, examples, answers, seconds=sum(prediction.seconds for prediction in answered))


def score(task: VqaTask, examples: Sequence[VqaExample], answers: Sequence[str], *, seconds: float = 0.0) -> TaskResult:
    """Return the figures of answers that are there already, in the order of the examples.

    Raises:
        ValueError: If there are not as many answers as examples, at least one.
    """
    if len(answers) != len(examples) or not examples:
        raise ValueError(f"There are {len(answers)} answers to {len(examples)} questions; expected one each, and at least one question.")
    scores = [task.score(answer, example) for answer, example in zip(answers, examples, strict=True)]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for example, value in zip(examples, scores, strict=True):
        if example.kind:
            by_kind[f"{task.headline}:{example.kind}"].append(value)
    records = [
        {
            "id": example.question_id,
            "question": example.question,
            "prediction": answer,
            "answers": list(example.answers or (example.answer,)),
            "score": value,
        }
        for example, answer, value in zip(examples, answers, scores, strict=True)
    ]
    metrics = {task.headline: fmean(scores)} | {kind: fmean(values) for kind, values in sorted(by_kind.items())}
    metrics |= task.more_metrics(examples, answers)
    headline = task.circular or task.headline
    if task.circular:
        scores = _worst_of_groups(examples, scores)
        metrics[headline] = fmean(scores)
    return TaskResult(task.name, metrics, headline, scores, records, len(examples) / seconds if seconds else 0.0)


def _worst_of_groups(examples: Sequence[VqaExample], scores: Sequence[float]) -> list[float]:
    """Return the lowest score of each group, in the order of their first examples."""
    groups: dict[str, list[float]] = defaultdict(list)
    for example, value in zip(examples, scores, strict=True):
        groups[example.group or example.question_id].append(value)
    return [min(values) for values in groups.values()]
