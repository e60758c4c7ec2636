"""PMC-VQA: questions with four choices about figures of medical papers (test of version 2: 33,430; checked part of version 1: 2,000).

Folder: ``test_2.csv`` with the images of ``images_2.zip`` as ``figures/…``; or, for the splits "test" and "test_clean", ``test.csv`` and
``test_clean.csv`` with those of ``images.zip`` as ``images/…`` (https://huggingface.co/datasets/xmcmic/PMC-VQA).
Prompt: question, lettered choices, and the request for a letter (LLaVA-1.5's). Score: the letter, or else the text of one choice. The
paper compares texts by similarity instead, for models that cannot be asked for a letter.
"""

import csv
import re
from pathlib import Path

from corda_eval.metrics import multiple_choice_answer
from corda_eval.vqa.example import LETTER_ANSWER, VqaExample, VqaTask, with_choices
from corda_eval.vqa.files import checked, existing, first, rows_of

COLUMNS = tuple(f"Choice {letter}" for letter in "ABCD")


def load(folder: str | Path, *, split: str = "test_2", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken.
    """
    folder = Path(folder).expanduser()
    path = folder / f"{split}.csv"
    with existing(path).open(encoding="utf-8", newline="") as file:
        rows = rows_of(list(first(list(csv.DictReader(file)), limit)), ("Figure_path", "Question", "Answer", *COLUMNS), path)
    examples = []
    for place, row in enumerate(rows):
        # The label's column is Answer in version 2; in version 1 that is the text.
        label = (row.get("Answer_label") or row["Answer"] or "").strip()
        if label not in tuple("ABCD") or None in row.values():
            raise ValueError(f"{path}, row {place}, counted from 0, has the label {label!r}; expected A to D and all columns; mend it.")
        choices = tuple(re.sub(r"^\s*[A-D]\s*:", "", row[name]).strip() for name in COLUMNS)
        examples.append(
            VqaExample(
                folder / ("figures" if split.endswith("_2") else "images") / row["Figure_path"],
                with_choices(row["Question"].strip(), choices) + LETTER_ANSWER,
                label,
                question_id=str(row.get("index") or place),
                choices=choices,
            )
        )
    return checked(examples, path)


def choice_score(answer: str, example: VqaExample) -> float:
    """Return 1 if the answer names the right choice, else 0."""
    place = multiple_choice_answer(answer, example.choices)
    return float(place is not None and "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place] == example.answer)


TASK = VqaTask("pmc_vqa", load, "accuracy", choice_score)
