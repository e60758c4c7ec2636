"""VQAv2: questions about COCO images, ten people's answers each (validation: 214,354 questions).

Folder: ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json`` and the images as
``val2014/COCO_val2014_000000000042.jpg`` (https://visualqa.org/download.html); the same with train for the split "train".
Prompt: LLaVA-1.5's. Score: VQA accuracy as of 2017; ``task("official")`` and others score as other evaluations do.
LLaVA's published numbers are test-dev's, which only the evaluation server knows: those of validation do not compare.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from corda_eval.metrics import vqa_accuracy
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import by_key, checked, first, people, read_json, rows_of


def load(folder: str | Path, *, split: str = "val", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question has no annotation.
    """
    names = f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json"
    return coco_questions(Path(folder).expanduser(), *names, split=split, limit=limit)


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
    examples = []
    for row in asked:
        notes = annotated[str(row["question_id"])]
        answers = people(notes["answers"], f"{folder / annotations}, question {row['question_id']}")
        examples.append(
            VqaExample(
                folder / f"{split}2014" / f"COCO_{split}2014_{int(row['image_id']):012d}.jpg",
                row["question"] + SHORT_ANSWER,
                notes.get("multiple_choice_answer") or max(answers, key=answers.count),
                question_id=str(row["question_id"]),
                answers=answers,
                kind=str(notes.get("answer_type") or ""),
            )
        )
    return checked(examples, folder / questions)


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
