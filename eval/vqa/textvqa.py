"""TextVQA: questions about writing in images (validation: 5,000), ten people's answers each.

Folder: ``TextVQA_0.5.1_val.json``, the images as ``train_images/003a8ae2ef43b901.jpg`` and, for ``textvqa_ocr``,
``TextVQA_Rosetta_OCR_v0.2_val.json`` (https://textvqa.org/dataset). Table: as ``lmms-lab/textvqa``, split "validation", for
``textvqa_ocr`` with its ``ocr_tokens``. Score: VQA accuracy as EvalAI normalises.
Prompt: LLaVA-1.5's, which capitalises questions as Python does: the first letter upper, all others lower. ``textvqa_ocr`` adds the line
"Reference OCR token: …", with which LLaVA-1.5's 58.2 was measured; without it that model scores some 10 points lower (others do not all):
the two are tasks of their own.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.vqa.example import SHORT_ANSWER, VqaExample
from corda_eval.vqa.files import by_key, checked, first, read_json, rows_of
from corda_eval.vqa.tables import Table, is_table
from corda_eval.vqa.vqav2 import COLUMNS, people_example, people_task


def load(
    source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False, ocr: bool = False
) -> list[VqaExample]:
    """Return the questions of a split (validation) in the source's order, all or the first, with or without the words found by OCR.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or an image has no OCR.
    """
    if is_table(source):
        table = Table((*COLUMNS, "ocr_tokens") if ocr else COLUMNS, "validation")
        return checked([_example(row, source, ocr) for row in table.rows(source, split=split, limit=limit, download=download)], source)
    folder = Path(source).expanduser()
    path = folder / f"TextVQA_0.5.1_{split or 'val'}.json"
    rows = first(_data(path, ("question_id", "image_id", "question", "answers")), limit)
    tokens = _ocr_tokens(folder / f"TextVQA_Rosetta_OCR_v0.2_{split or 'val'}.json", rows) if ocr else {}
    images = [folder / "train_images" / f"{row['image_id']}.jpg" for row in rows]
    asked = [{**row, "image": image, "ocr_tokens": tokens.get(str(row["image_id"]))} for row, image in zip(rows, images, strict=True)]
    return checked([_example(row, path, ocr) for row in asked], path)


def _example(row: Mapping[str, Any], where: object, ocr: bool) -> VqaExample:
    row = {**row, "question": row["question"].capitalize()}
    return people_example(row, where, (f"\nReference OCR token: {', '.join(row['ocr_tokens'])}" if ocr else "") + SHORT_ANSWER)


def _ocr_tokens(path: Path, rows: Sequence[Any]) -> dict[str, list[str]]:
    rows_of_images = by_key(_data(path, ("image_id", "ocr_tokens")), "image_id", path)
    missing = [row for row in rows if str(row["image_id"]) not in rows_of_images]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} questions have no OCR in {path}, first question {missing[0]['question_id']}; get the "
            "file of this split."
        )
    return {image: row["ocr_tokens"] for image, row in rows_of_images.items()}


def _data(path: Path, keys: tuple[str, ...]) -> list[Any]:
    whole = read_json(path)
    return rows_of(whole.get("data") if isinstance(whole, dict) else whole, keys, path)


TASK = people_task("textvqa", load, "evalai")
OCR_TASK = people_task("textvqa_ocr", partial(load, ocr=True), "evalai")
