"""ScienceQA: school questions with choices, of which about half have an image (test: 4,241, of which 2,017 with an image).

Folder: ``problems.json``, ``pid_splits.json`` and the images as ``images/test/11/image.png`` (or ``test/11/image.png``)
(https://github.com/lupantech/ScienceQA). Table: as ``lmms-lab/ScienceQA`` or ``derek-thomas/ScienceQA``; rows have no ids, so their
places, from 0, are taken. The task ``scienceqa_image`` holds the questions with an image alone: LLaVA's "SQA".
Prompt: "Context: hint", question, lettered choices, and the request for a letter. Score: LLaVA's reading of the letter.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.metrics import scienceqa_answer
from corda_eval.metrics.choice import LETTERS
from corda_eval.vqa.example import LETTER_ANSWER, VqaExample, VqaTask, with_choices
from corda_eval.vqa.files import checked, first, read_json, rows_of
from corda_eval.vqa.tables import Table, is_table

COLUMNS = ("question", "choices", "answer")
TABLE = Table(COLUMNS, "test")


def load(
    source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False, only_images: bool = False
) -> list[VqaExample]:
    """Return the questions of a split (test) in the order of ``pid_splits.json`` or of the table, all or the first, or those with an image.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, there is no such split, or a question of it is missing.
    """
    if is_table(source):
        rows = [(str(place), row) for place, row in enumerate(TABLE.rows(source, split=split, download=download))]
        return checked(_examples(rows, source, limit, only_images), source)
    folder = Path(source).expanduser()
    return checked(_examples(_problems(folder, split or "test"), folder / "problems.json", limit, only_images), folder / "problems.json")


def _problems(folder: Path, split: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the ids and problems of a split of the official files."""
    path, problems, splits = folder / "problems.json", read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise ValueError(f"{path} or pid_splits.json is no object; expected the benchmark's own files; get them again.")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has the splits {sorted(splits)}, not {split!r}; take one of them.")
    ids = [str(number) for number in splits[split]]
    missing = [number for number in ids if number not in problems]
    if missing:
        raise ValueError(f"{len(missing)} of {len(ids)} questions of {split!r} are not in {path}, first {missing[0]!r}; get it again.")
    rows = rows_of([problems[number] for number in ids], COLUMNS, path)
    images = folder / "images" if (folder / "images").is_dir() else folder
    files = [images / row["split"] / number / row["image"] if row.get("image") else None for number, row in zip(ids, rows, strict=True)]
    return [(number, {**row, "image": file}) for number, row, file in zip(ids, rows, files, strict=True)]


def _examples(rows: list[tuple[str, Mapping[str, Any]]], where: object, limit: int | None, only_images: bool) -> list[VqaExample]:
    chosen = [(number, row) for number, row in rows if row.get("image") or not only_images]
    return [_example(number, row, where) for number, row in first(chosen, limit)]


def _example(number: str, problem: Mapping[str, Any], where: object) -> VqaExample:
    choices, answer, hint = tuple(problem["choices"]), problem["answer"], (problem.get("hint") or "").strip()
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}, question {number} has the answer {answer!r}; expected a place among its {len(choices)} choices; mend it."
        )
    context = f"Context: {hint}\n" if hint else ""
    return VqaExample(
        problem.get("image"),
        with_choices(context + problem["question"], choices) + LETTER_ANSWER,
        LETTERS[answer],
        question_id=number,
        choices=choices,
        kind="image" if problem.get("image") else "text",
    )


def _score(answer: str, example: VqaExample) -> float:
    return float(scienceqa_answer(answer) == example.answer)


TASK = VqaTask("scienceqa", load, "accuracy", _score, max_new_tokens=1024)
IMAGE_TASK = VqaTask("scienceqa_image", partial(load, only_images=True), "accuracy", _score, max_new_tokens=1024)
