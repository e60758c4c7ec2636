"""OK-VQA: questions about COCO images that need outside knowledge (validation: 5,046), five people's answers each, each written twice.

Folder: ``OpenEnded_mscoco_val2014_questions.json``, ``mscoco_val2014_annotations.json`` (https://okvqa.allenai.org/download.html) and the
images as ``val2014/COCO_val2014_000000000042.jpg``; the same with train for the split "train".
Table: as ``lmms-lab/OK-VQA``, split "val2014". Prompt: LLaVA-1.5's. Score: VQA accuracy as EvalAI normalises.
"""

from functools import partial

from corda_eval.vqa.tables import Table
from corda_eval.vqa.vqav2 import COLUMNS, coco_questions, people_task

FILES = ("OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json")

load = partial(coco_questions, FILES, Table(COLUMNS, "val2014"))
"""Return OK-VQA's questions: ``load(source, split=…, limit=…, download=…)``."""

TASK = people_task("okvqa", load, "evalai")
