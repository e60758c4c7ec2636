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
TABLE = Table(COLUMNS, "validation")


def load(source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the questions of a split (validation) in the source's order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question has no annotation.
    """
    if is_table(source):
        rows = TABLE.rows(source, split=split, limit=limit, download=download)
        return checked([people_example(row, source) for row in rows], source)
    part = split or "val"
    names = f"v2_OpenEnded_mscoco_{part}2014_questions.json", f"v2_mscoco_{part}2014_annotations.json"
    return coco_questions(Path(source).expanduser(), *names, split=part, limit=limit)


def coco_questions(folder: Path, questions: str, annotations: str, *, split: str, limit: int | None) -> list[VqaExample]:
    """Return the questions of a pair of files in VQA's format.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question has no annotation.
    """
    asked = first(_part(folder / questions, "questions", ("question_id", "image_id", "question")), limit)
    annotated = by_key(_part(folder / annotations, "annotations", ("question_id", "answers")), "question_id", folder / annotations)
    bare = [row["question_id"] for row in asked if str(row["question_id"]) not in annotated]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(asked)} questions of {folder / questions} have no annotation in {annotations}, first question {bare[0]}; "
            "get the two files of one split."
        )
    images = [folder / f"{split}2014" / f"COCO_{split}2014_{int(row['image_id']):012d}.jpg" for row in asked]
    examples = [
        people_example({**annotated[str(row["question_id"])], **row, "image": image}, folder / annotations)
        for row, image in zip(asked, images, strict=True)
    ]
    return checked(examples, folder / questions)


def people_example(row: Mapping[str, Any], where: object, prompt: str = SHORT_ANSWER) -> VqaExample:
    """Return the example of a row with ``COLUMNS``, of the kind that ``answer_type`` or ``category`` says.

    Raises:
        ValueError: If it has not the answers of at least two people.
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
