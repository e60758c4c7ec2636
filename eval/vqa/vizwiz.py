"""VizWiz: questions that blind people asked about their own photographs (validation: 4,319), ten people's answers each.

Folder: ``Annotations/val.json`` (or ``val.json``) and the images as ``val/VizWiz_val_00000000.jpg``
(https://vizwiz.org/tasks-and-datasets/vqa); the same with train. Many questions cannot be answered, and models are told what to say then.
Prompt: LLaVA-1.5's for this benchmark. Score: VQA accuracy as EvalAI normalises, also by type of answer.
"""

from pathlib import Path

from corda_eval.vqa.example import SHORT_ANSWER, VqaExample
from corda_eval.vqa.files import checked, first, most_common, people, read_json, rows_of
from corda_eval.vqa.vqav2 import people_task

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def load(folder: str | Path, *, split: str = "val", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first; an image's name is its question's id.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, as that of the split "test", which has no answers.
    """
    folder = Path(folder).expanduser()
    path = folder / "Annotations" / f"{split}.json"
    path = path if path.exists() else folder / f"{split}.json"
    examples = []
    for row in first(rows_of(read_json(path), ("image", "question", "answers"), path), limit):
        answers = people(row["answers"], f"{path}, question {row['image']}")
        examples.append(
            VqaExample(
                folder / split / row["image"],
                row["question"] + UNANSWERABLE + SHORT_ANSWER,
                most_common(answers),
                question_id=row["image"],
                answers=answers,
                kind=str(row.get("answer_type") or ""),
            )
        )
    return checked(examples, path)


TASK = people_task("vizwiz", load, "evalai")
