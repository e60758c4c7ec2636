"""GQA: compositional questions about scenes, one right answer each (testdev, balanced: 12,578).

Folder: ``questions/testdev_balanced_questions.json`` (or the file alone) and the images as ``images/n161313.jpg``
(https://cs.stanford.edu/people/dorarad/gqa/download.html); splits "testdev_balanced", "val_balanced" and their like.
Tables: as ``lmms-lab/GQA``, two for each split: ``testdev_balanced_instructions`` and ``testdev_balanced_images``; or a folder of both.
Prompt: LLaVA-1.5's. Score: the answer itself, lower-cased and without final periods; also for open and binary questions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_eval.metrics import gqa_match
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import by_key, checked, first, read_json, rows_of
from corda_eval.vqa.tables import Table, is_table


def load(source: str | Path, *, split: str = "testdev_balanced", limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the questions of a split in the source's order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a question of a table has no image.
    """
    folder = Path(source).expanduser()
    if is_table(source) or (folder / f"{split}_instructions").is_dir():
        return checked(_from_tables(source, split, limit, download), source)
    path = folder / "questions" / f"{split}_questions.json"
    path = path if path.exists() else folder / f"{split}_questions.json"
    questions = read_json(path)
    if not isinstance(questions, dict):
        raise ValueError(f"{path} holds a {type(questions).__name__}; expected question ids and questions; get the benchmark's own file.")
    rows = rows_of(list(first(list(questions.values()), limit)), ("question", "imageId", "answer"), path)
    images = [folder / "images" / f"{row['imageId']}.jpg" for row in rows]
    return checked([_example(number, row, image) for number, row, image in zip(questions, rows, images, strict=False)], path)


def _from_tables(source: str | Path, split: str, limit: int | None, download: bool) -> list[VqaExample]:
    names = f"{split}_instructions", f"{split}_images"
    where = [Path(source) / name if Path(source).expanduser().is_dir() else source for name in names]
    part = split.partition("_")[0]
    rows = Table(("id", "imageId", "question", "answer"), part, names[0]).rows(where[0], limit=limit, download=download)
    images = by_key(Table(("id", "image"), part, names[1]).rows(where[1], download=download), "id", where[1])
    bare = [row["id"] for row in rows if str(row["imageId"]) not in images]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(rows)} questions of {source} have no image in {names[1]}, first question {bare[0]!r}; get both tables of "
            "the split."
        )
    return [_example(str(row["id"]), row, images[str(row["imageId"])]["image"]) for row in rows]


def _example(number: str, row: Mapping[str, Any], image: Any) -> VqaExample:
    return VqaExample(image, row["question"] + SHORT_ANSWER, row["answer"], question_id=number, kind=_kind(row.get("types")))


def _kind(types: object) -> str:
    """Return "open" for what the official script counts as such, else "binary"; "" where types are not given."""
    if not isinstance(types, dict) or "structural" not in types:
        return ""
    return "open" if types["structural"] == "query" else "binary"


TASK = VqaTask("gqa", load, "accuracy", lambda answer, example: float(gqa_match(answer, example.answer)))
