"""ScienceQA: school questions with choices, of which about half have an image (test: 4,241, of which 2,017 with an image).

Folder: ``problems.json``, ``pid_splits.json`` and the images as ``images/test/11/image.png`` (or ``test/11/image.png``)
(https://github.com/lupantech/ScienceQA). The task ``scienceqa_image`` holds the questions with an image alone: LLaVA's "SQA".
Prompt: "Context: hint", question, lettered choices, and the request for a letter. Score: LLaVA's reading of the letter.
"""

from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.metrics import scienceqa_answer
from corda_eval.vqa.example import LETTER_ANSWER, VqaExample, VqaTask, with_choices
from corda_eval.vqa.files import checked, first, read_json, rows_of


def load(folder: str | Path, *, split: str = "test", limit: int | None = None, only_images: bool = False) -> list[VqaExample]:
    """Return the questions of a split in the order of ``pid_splits.json``, all or the first, or those with an image.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, there is no such split, or a question of it is missing.
    """
    folder = Path(folder).expanduser()
    path, problems, splits = folder / "problems.json", read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise ValueError(f"{path} or pid_splits.json is no object; expected the benchmark's own files; get them again.")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has the splits {sorted(splits)}, not {split!r}; take one of them.")
    ids = [str(number) for number in splits[split]]
    missing = [number for number in ids if number not in problems]
    if missing:
        raise ValueError(f"{len(missing)} of {len(ids)} questions of {split!r} are not in {path}, first {missing[0]!r}; get it again.")
    rows_of([problems[number] for number in ids], ("question", "choices", "answer"), path)
    chosen = first([number for number in ids if problems[number].get("image") or not only_images], limit)
    images = folder / "images" if (folder / "images").is_dir() else folder
    return checked([_example(number, problems[number], images, path) for number in chosen], path)


def _example(number: str, problem: dict[str, Any], images: Path, path: Path) -> VqaExample:
    choices, answer, hint = tuple(problem["choices"]), problem["answer"], (problem.get("hint") or "").strip()
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{path}, question {number} has the answer {answer!r}; expected a place among its {len(choices)} choices; mend it."
        )
    context = f"Context: {hint}\n" if hint else ""
    name = problem.get("image")
    return VqaExample(
        images / problem["split"] / number / name if name else None,
        with_choices(context + problem["question"], choices) + LETTER_ANSWER,
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[answer],
        question_id=number,
        choices=choices,
        kind="image" if name else "text",
    )


def _score(answer: str, example: VqaExample) -> float:
    return float(scienceqa_answer(answer) == example.answer)


TASK = VqaTask("scienceqa", load, "accuracy", _score)
IMAGE_TASK = VqaTask("scienceqa_image", partial(load, only_images=True), "accuracy", _score)
