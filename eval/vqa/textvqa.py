"""TextVQA: questions about writing in images (validation: 5,000), ten people's answers each.

Folder: ``TextVQA_0.5.1_val.json``, the images as ``train_images/003a8ae2ef43b901.jpg`` and, for ``textvqa_ocr``,
``TextVQA_Rosetta_OCR_v0.2_val.json`` (https://textvqa.org/dataset). Score: VQA accuracy as EvalAI normalises.
Prompt: LLaVA-1.5's; ``textvqa_ocr`` adds the line "Reference OCR token: …", with which LLaVA-1.5's 58.2 was measured. Without it scores are
some 10 points lower: the two are tasks of their own.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corda_eval.vqa.example import SHORT_ANSWER, VqaExample
from corda_eval.vqa.files import by_key, checked, first, most_common, people, read_json, rows_of
from corda_eval.vqa.vqav2 import people_task


def load(folder: str | Path, *, split: str = "val", limit: int | None = None, ocr: bool = False) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first, with or without the words found by OCR.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or an image has no OCR.
    """
    folder = Path(folder).expanduser()
    path = folder / f"TextVQA_0.5.1_{split}.json"
    rows = first(_data(path, ("question_id", "image_id", "question", "answers")), limit)
    tokens = _ocr_tokens(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", rows) if ocr else {}
    examples = []
    for row in rows:
        answers = people(row["answers"], f"{path}, question {row['question_id']}")
        words = f"\nReference OCR token: {', '.join(tokens[str(row['image_id'])])}" if ocr else ""
        examples.append(
            VqaExample(
                folder / "train_images" / f"{row['image_id']}.jpg",
                row["question"] + words + SHORT_ANSWER,
                most_common(answers),
                question_id=str(row["question_id"]),
                answers=answers,
            )
        )
    return checked(examples, path)


def _ocr_tokens(path: Path, rows: Sequence[Any]) -> dict[str, list[str]]:
    found = by_key(_data(path, ("image_id", "ocr_tokens")), "image_id", path)
    missing = [row for row in rows if str(row["image_id"]) not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} questions have no OCR in {path}, first question {missing[0]['question_id']}; get the "
            "file of this split."
        )
    return {image: row["ocr_tokens"] for image, row in found.items()}


def _data(path: Path, keys: tuple[str, ...]) -> list[Any]:
    whole = read_json(path)
    return rows_of(whole.get("data") if isinstance(whole, dict) else whole, keys, path)


TASK = people_task("textvqa", load, "evalai")
OCR_TASK = people_task("textvqa_ocr", partial(load, ocr=True), "evalai")
