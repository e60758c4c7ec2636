"""Generate the answers to a benchmark's questions, go on where a killed run stopped, and see what batching does to them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_eval.vqa.answer import answer_batch
from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.files import checked
from corda_eval.vqa.predictions import Prediction, append_predictions, read_predictions, run_header, write_header


def generate_answers(
    task: str,
    examples: Sequence[VqaExample],
    model: Any,
    processor: Any,
    *,
    path: str | Path | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    system: str | None = None,
    pad_images: bool = False,
    progress: Any = iter,
) -> list[Prediction]:
    """Return the greedy answer to each question, in order.

    Args:
        task: Name of what is asked, for the file.
        examples: The questions, each with an id of its own.
        model: A LLaVA-type model, adapted or not.
        processor: Its processor.
        path: File of predictions: each batch's answers are added to it, and questions that it answers already are not asked again.
        batch_size: Questions asked at once, padded on the left; 1 is the reference, others may change answers.
        max_new_tokens: Where an answer that does not end by itself is cut.
        system: What the chat template's system turn says; None leaves that to the template.
        pad_images: Pad images to squares, as LLaVA-1.5 was trained, instead of what the processor does.
        progress: Wraps the iterable of batches, a progress bar for instance.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If two questions have one id, an image cannot be read, or the file is of another run or broken.
    """
    _check_size("batch_size", batch_size)
    _check_size("max_new_tokens", max_new_tokens)
    examples = checked(examples, task)
    done: dict[str, Prediction] = {}
    file = None if path is None else Path(path).expanduser()
    if file is not None:
        options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "system": system or None, "pad_images": pad_images}
        header = run_header(task, examples, model, processor, options)
        done = read_predictions(file, header, [example.question_id for example in examples])
        if not done:
            write_header(file, header)
    # By places in the whole: a run that goes on asks the batches that an unbroken one would have asked.
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    for batch in progress([batch for batch in batches if any(example.question_id not in done for example in batch)]):
        start = time.perf_counter()
        answers = answer_batch(model, processor, batch, max_new_tokens, system=system, pad_images=pad_images)
        share = (time.perf_counter() - start) / len(batch)
        new = [
            Prediction(example.question_id, answer, share)
            for example, answer in zip(batch, answers, strict=True)
            if example.question_id not in done
        ]
        if file is not None:
            append_predictions(file, new)
        done |= {one.question_id: one for one in new}
    return [done[example.question_id] for example in examples]


@dataclass(frozen=True)
class BatchCheck:
    """What batching changed."""

    num_examples: int
    differing: Sequence[tuple[str, str, str]]
    """Question id, answer asked alone, answer in the batch, where the two differ."""

    @property
    def share(self) -> float:
        """The share of answers that differ."""
        return len(self.differing) / self.num_examples


def check_batch_invariance(
    examples: Sequence[VqaExample],
    model: Any,
    processor: Any,
    *,
    batch_size: int,
    max_new_tokens: int = 128,
    system: str | None = None,
    pad_images: bool = False,
    progress: Any = iter,
) -> BatchCheck:
    """Return which answers differ when questions are asked in batches instead of one by one.

    Args:
        examples: The questions; a few hundred tell enough.
        model: A LLaVA-type model.
        processor: Its processor.
        batch_size: The size that is tried, at least 2.
        max_new_tokens: Where an answer that does not end by itself is cut.
        system: What the chat template's system turn says.
        pad_images: Pad images to squares.
        progress: Wraps the iterable of batches, once for each of the two runs.

    Raises:
        ValueError: If ``batch_size`` is less than 2, two questions have one id, or an image cannot be read.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; expected at least 2, to compare with questions asked one by one.")
    alone, batched = (
        generate_answers(
            "questions",
            examples,
            model,
            processor,
            batch_size=size,
            max_new_tokens=max_new_tokens,
            system=system,
            pad_images=pad_images,
            progress=progress,
        )
        for size in (1, batch_size)
    )
    pairs = zip(alone, batched, strict=True)
    return BatchCheck(len(examples), [(one.question_id, one.answer, many.answer) for one, many in pairs if one.answer != many.answer])


def _check_size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1.")
