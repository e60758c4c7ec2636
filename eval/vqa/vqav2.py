"""VQAv2: questions about COCO images, ten people's answers each (validation: 214,354 questions).

Folder: ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json`` and the images as
``val2014/COCO_val2014_000000000042.jpg`` (https://visualqa.org/download.html); the same with train for the split "train".
Table: as ``lmms-lab/VQAv2``, split "validation". Prompt: LLaVA-1.5's. Score: VQA accuracy as of 2017; ``task("official")`` and others
score as other evaluations do. LLaVA's published numbers are test-dev's, which only the evaluation server knows: those of validation do
not compare.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.metrics import vqa_accuracy
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import by_key, checked, first, most_common, people, read_json, rows_of
from corda_eval.vqa.tables import Table, is_table

COLUMNS = ("question_id", "question", "answers", "image")
"""What a table of questions that several people answered must have."""
FILES = ("v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json")


def coco_questions(
    files: tuple[str, str], table: Table, source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False
) -> list[VqaExample]:
    """Return the questions of a split (validation) in the source's order, all or the first.

    Args:
        files: Names of the two files in VQA's format, questions and annotations, with ``{}`` for the split.
        table: How the benchmark is laid out in a table.
        source: The folder, or the table.
        split: "val" or "train" of the files, or a split of the table; None takes the one that is reported.
        limit: How many.
        download: Whether an id may be fetched.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question has no annotation.
    """
    if is_table(source):
        return checked([people_example(row, source) for row in table.rows(source, split=split, limit=limit, download=download)], source)
    folder, part = Path(source).expanduser(), split or "val"
    questions, annotations = (folder / name.format(part) for name in files)
    asked = first(_part(questions, "questions", ("question_id", "image_id", "question")), limit)
    annotated = by_key(_part(annotations, "annotations", ("question_id", "answers")), "question_id", annotations)
    bare = [row["question_id"] for row in asked if str(row["question_id"]) not in annotated]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(asked)} questions of {questions} have no annotation in {annotations.name}, first question {bare[0]}; "
            "get the two files of one split."
        )
    images = [folder / f"{part}2014" / f"COCO_{part}2014_{int(row['image_id']):012d}.jpg" for row in asked]
    rows = [{**annotated[str(row["question_id"])], **row, "image": image} for row, image in zip(asked, images, strict=True)]
    return checked([people_example(row, annotations) for row in rows], questions)


def people_example(row: Mapping[str, Any], where: object, prompt: str = SHORT_ANSWER) -> VqaExample:
    """Return the example of a row with ``COLUMNS``, of the kind that ``answer_type`` or ``category`` says.

    Raises:
        ValueError: If it lacks the answers of at least two people.
    """
    answers = people(row["answers"], f"{where}, question {row['question_id']}")
    return VqaExample(
        row["image"],
        row["question"] + prompt,
        row.get("multiple_choice_answer") or most_common(answers),
        question_id=str(row["question_id"]),
        answers=answers,
        kind=str(row.get("answer_type") or row.get("category") or ""),
    )


def people_task(name: str, load: Callable[..., list[VqaExample]], variant: str) -> VqaTask:
    """Return a task whose answers are scored by how many people gave them, under the variant's name."""
    return VqaTask(name, load, f"vqa_accuracy_{variant}", partial(_score, variant=variant))


load = partial(coco_questions, FILES, Table(COLUMNS, "validation"))
"""Return VQAv2's questions: ``load(source, split=…, limit=…, download=…)``."""


def task(variant: str = "official_2017") -> VqaTask:
    """Return VQAv2 with one of the variants of VQA accuracy."""
    return people_task("vqav2", load, variant)


def _score(answer: str, example: VqaExample, variant: str) -> float:
    return vqa_accuracy(answer, example.answers, variant)


def _part(path: Path, name: str, keys: tuple[str, ...]) -> list:
    whole = read_json(path)
    if not isinstance(whole, dict) or name not in whole:
        raise ValueError(f"{path} has no list {name!r}; expected the benchmark's own file; get it again.")
    return rows_of(whole[name], keys, path)


TASK = task()
