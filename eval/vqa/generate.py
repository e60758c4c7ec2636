"""Generate the answers to a benchmark's questions, resume where a killed run stopped, and see what batching does to them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corda_eval.vqa.answer import Asking, answer_batch
from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.files import checked
from corda_eval.vqa.predictions import Prediction, append_predictions, read_predictions, run_header, write_header


def generate_answers(
    task: str,
    examples: Sequence[VqaExample],
    model: Any,
    processor: Any,
    asking: Asking,
    *,
    path: str | Path | None = None,
    batch_size: int = 1,
    progress: Any = iter,
) -> list[Prediction]:
    """Return the greedy answer to each question, in order.

    Args:
        task: Name of what is asked, for the file.
        examples: The questions, each with an id of its own.
        model: A LLaVA-type model, adapted or not.
        processor: Its processor.
        asking: How they are asked.
        path: File of predictions: each batch's answers are added to it, and questions that it answers already are not asked again.
        batch_size: Questions asked at once, padded on the left; 1 is the reference, others may change answers.
        progress: Wraps the iterable of batches, a progress bar for instance.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If two questions have one id, an image cannot be read, or the file is of another run or broken.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    examples = checked(examples, task)
    done: dict[str, Prediction] = {}
    file = None if path is None else Path(path).expanduser()
    if file is not None:
        options = {"batch_size": batch_size, **asdict(asking), "system": asking.system or None}
        header = run_header(task, examples, model, processor, options)
        done = read_predictions(file, header, [example.question_id for example in examples])
        if not done:
            write_header(file, header)
    # By places in the whole: a resumed run asks the batches that an unbroken one would have asked.
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    for batch in progress([batch for batch in batches if any(example.question_id not in done for example in batch)]):
        start = time.perf_counter()
        answers = answer_batch(model, processor, batch, asking)
        seconds = (time.perf_counter() - start) / len(batch)
        new = [
            Prediction(example.question_id, answer, seconds)
            for example, answer in zip(batch, answers, strict=True)
            if example.question_id not in done
        ]
        if file is not None:
            append_predictions(file, new)
        done |= {prediction.question_id: prediction for prediction in new}
    return [done[example.question_id] for example in examples]


@dataclass(frozen=True)
class BatchCheck:
    """What batching changed."""

    num_examples: int
    differing: Sequence[tuple[str, str, str]]
    """Question id, answer asked alone, answer in the batch, where the two differ."""


def check_batch_invariance(
    examples: Sequence[VqaExample],
    model: Any,
    processor: Any,
    asking: Asking,
    *,
    batch_size: int,
    progress: Any = iter,
) -> BatchCheck:
    """Return which answers differ when questions are asked in batches instead of one by one.

    Args:
        examples: The questions; a few hundred tell enough.
        model: A LLaVA-type model.
        processor: Its processor.
        asking: How they are asked.
        batch_size: The size that is tried, at least 2.
        progress: Wraps the iterable of batches, once for each of the two runs.

    Raises:
        ValueError: If ``batch_size`` is less than 2, two questions have one id, or an image cannot be read.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; expected at least 2, to compare with questions asked one by one.")
    alone, batched = (
        generate_answers("questions", examples, model, processor, asking, batch_size=size, progress=progress) for size in (1, batch_size)
    )
    pairs = [(single.question_id, single.answer, other.answer) for single, other in zip(alone, batched, strict=True)]
    return BatchCheck(len(examples), [pair for pair in pairs if pair[1] != pair[2]])
