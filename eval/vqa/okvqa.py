"""OK-VQA: questions about COCO images that need outside knowledge (validation: 5,046), five people's answers each, each written twice.

Folder: ``OpenEnded_mscoco_val2014_questions.json``, ``mscoco_val2014_annotations.json`` (https://okvqa.allenai.org/download.html) and the
images as ``val2014/COCO_val2014_000000000042.jpg``; the same with train for the split "train".
Table: as ``lmms-lab/OK-VQA``, split "val2014". Prompt: LLaVA-1.5's. Score: VQA accuracy as EvalAI normalises.
"""

from pathlib import Path

from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.files import checked
from corda_eval.vqa.tables import Table, is_table
from corda_eval.vqa.vqav2 import COLUMNS, coco_questions, people_example, people_task

TABLE = Table(COLUMNS, "val2014")


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
    names = f"OpenEnded_mscoco_{part}2014_questions.json", f"mscoco_{part}2014_annotations.json"
    return coco_questions(Path(source).expanduser(), *names, split=part, limit=limit)


TASK = people_task("okvqa", load, "evalai")
