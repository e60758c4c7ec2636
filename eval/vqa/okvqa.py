"""OK-VQA: questions about COCO images that need outside knowledge (validation: 5,046), five people's answers, each written twice.

Folder: ``OpenEnded_mscoco_val2014_questions.json``, ``mscoco_val2014_annotations.json`` (https://okvqa.allenai.org/download.html) and the
images as ``val2014/COCO_val2014_000000000042.jpg``; the same with train for the split "train".
Prompt: LLaVA-1.5's. Score: VQA accuracy as EvalAI normalises.
"""

from pathlib import Path

from corda_eval.vqa.example import VqaExample
from corda_eval.vqa.vqav2 import coco_questions, people_task


def load(folder: str | Path, *, split: str = "val", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question has no annotation.
    """
    names = f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json"
    return coco_questions(Path(folder).expanduser(), *names, split=split, limit=limit)


TASK = people_task("okvqa", load, "evalai")
