"""VizWiz: questions that blind people asked about their own photographs (validation: 4,319), ten people's answers each.

Folder: ``Annotations/val.json`` (or ``val.json``) and the images as ``val/VizWiz_val_00000000.jpg``
(https://vizwiz.org/tasks-and-datasets/vqa); the same with train. Table: as ``lmms-lab/VizWiz-VQA``, split "val".
Many questions cannot be answered, and models are told what to say then. Prompt: LLaVA-1.5's for this benchmark, which capitalises questions
as Python does: the first letter upper, all others lower. Score: VQA accuracy as EvalAI normalises (lmms-eval's), also by type of answer.
LLaVA's published numbers are the test split's, which only the evaluation server knows.
"""

from pathlib import Path

from corda_eval.vqa.example import SHORT_ANSWER, VqaExample
from corda_eval.vqa.files import checked, first, read_json, rows_of
from corda_eval.vqa.tables import Table, is_table
from corda_eval.vqa.vqav2 import COLUMNS, people_example, people_task

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
TABLE = Table(COLUMNS, "val")


def load(source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the questions of a split (validation) in the source's order, all or the first; an image's name is its question's id.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, as that of the split "test", which has no answers.
    """
    if is_table(source):
        rows, where = TABLE.rows(source, split=split, limit=limit, download=download), Path(source)
    else:
        folder, part = Path(source).expanduser(), split or "val"
        where = folder / "Annotations" / f"{part}.json"
        where = where if where.exists() else folder / f"{part}.json"
        annotated = first(rows_of(read_json(where), ("image", "question", "answers"), where), limit)
        rows = [{**row, "question_id": row["image"], "image": folder / part / row["image"]} for row in annotated]
    asked = [{**row, "question": row["question"].capitalize()} for row in rows]
    return checked([people_example(row, where, UNANSWERABLE + SHORT_ANSWER) for row in asked], where)


TASK = people_task("vizwiz", load, "evalai")
