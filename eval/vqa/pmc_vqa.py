"""PMC-VQA: questions with four choices about figures of medical papers (test of version 2: 33,430; checked part of version 1: 2,000).

Folder: ``test_2.csv`` with the images of ``images_2.zip`` as ``figures/…``; or, for the splits "test" and "test_clean", ``test.csv`` and
``test_clean.csv`` with those of ``images.zip`` as ``images/…`` (https://huggingface.co/datasets/xmcmic/PMC-VQA).
Table: as ``mdwiratathya/PMC-VQA_small``, split "test", which is version 2's; rows have no ids, so their places, from 0, are taken.
Prompt: question, lettered choices, and the request for a letter (LLaVA-1.5's). Score: the letter, or else the text of one choice, read as
MMBench's answers are (``multiple_choice_answer``). The paper compares texts by similarity instead, for models that cannot be asked for a
letter.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_eval.metrics import multiple_choice_answer
from corda_eval.metrics.choice import LETTERS
from corda_eval.vqa.example import LETTER_ANSWER, VqaExample, VqaTask, with_choices
from corda_eval.vqa.files import checked, existing, first, rows_of
from corda_eval.vqa.tables import Table, is_table

COLUMNS = tuple(f"Choice {letter}" for letter in "ABCD")
TABLE = Table(("image", "question", "answer label", *map(str.lower, COLUMNS)), "test")


def load(source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the questions of a split (the test of version 2) in the source's order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken.
    """
    if is_table(source):
        rows = TABLE.rows(source, split=split, limit=limit, download=download)
        return checked([_example(row, place, source, row["answer label"]) for place, row in enumerate(rows)], source)
    folder, part = Path(source).expanduser(), split or "test_2"
    path, images = folder / f"{part}.csv", folder / ("figures" if part.endswith("_2") else "images")
    with existing(path).open(encoding="utf-8", newline="") as file:
        rows = rows_of(list(first(list(csv.DictReader(file)), limit)), ("Figure_path", "Question", "Answer", *COLUMNS), path)
    examples = []
    for place, row in enumerate(rows):
        # The label's column is Answer in version 2; in version 1 that is the text.
        label = "" if None in row.values() else row.get("Answer_label") or row["Answer"]
        same = {name.lower(): row.get(name) for name in ("index", "Question", *COLUMNS)} | {"image": images / row["Figure_path"]}
        examples.append(_example(same, place, path, label))
    return checked(examples, path)


def _example(row: Mapping[str, Any], place: int, where: object, label: str) -> VqaExample:
    if label.strip() not in tuple("ABCD"):
        raise ValueError(f"{where}, row {place}, counted from 0, has the label {label!r}; expected A to D and all columns; mend it.")
    choices = tuple(re.sub(r"^\s*[A-D]\s*:", "", row[name.lower()]).strip() for name in COLUMNS)
    return VqaExample(
        row["image"],
        with_choices(row["question"].strip(), choices) + LETTER_ANSWER,
        label.strip(),
        question_id=str(row.get("index") or place),
        choices=choices,
    )


def choice_score(answer: str, example: VqaExample) -> float:
    """Return 1 if the answer names the right choice, else 0."""
    place = multiple_choice_answer(answer, example.choices)
    return float(place is not None and LETTERS[place] == example.answer)


TASK = VqaTask("pmc_vqa", load, "accuracy", choice_score)
