"""MMBench and what comes in its form: questions with up to four choices and an image.

Folder: ``mmbench_dev_20230712.tsv`` (https://download.openmmlab.com/mmclassification/datasets/mmbench) or another .tsv with the columns
index, question, A, B, answer and image (base64, or the index of a row whose image is meant); perhaps C, D, hint and category.
Table: as ``lmms-lab/MMBench`` (its configuration "en") or ``lmms-lab/MMBench_EN``, split "dev", with the same columns.
Prompt: hint, question, lettered choices, and the request for a letter (LLaVA-1.5's). Headline: ``circular_accuracy``, the official score:
a question's rows, with its choices rotated (index + 1,000,000 …), count only if all are right. Also ``accuracy`` over rows, all and by
category. Answers are read by VLMEvalKit's rule without a language model (``multiple_choice_answer``); the figures that its server or a
judge gives may be higher where answers name no choice.
"""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_eval.vqa.example import LETTER_ANSWER, VqaExample, VqaTask, with_choices
from corda_eval.vqa.files import by_key, checked, existing, first, rows_of
from corda_eval.vqa.pmc_vqa import choice_score
from corda_eval.vqa.tables import Table, is_table

ROTATION = 1_000_000
"""How far apart the indices of a question's rotations are."""
NOTHING = ("", "nan", "none")
COLUMNS = ("index", "question", "A", "B", "answer", "image")
TABLE = Table(COLUMNS, "dev")


def load(source: str | Path, *, split: str | None = None, limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the rows of a folder's ``split``.tsv, or of a table, in their order, all or those of the first questions with all rotations.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or has no answers, as tables of test splits.
    """
    if is_table(source):
        return _examples(TABLE.rows(source, split=split, download=download), limit, source)
    path = Path(source).expanduser() / f"{split or 'mmbench_dev_20230712'}.tsv"
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 28))  # images are longer than the 128 KB that are allowed by default
    table = csv.DictReader(io.StringIO(existing(path).read_text(encoding="utf-8"), newline=""), delimiter="\t")
    rows = rows_of(list(table), COLUMNS, path)
    by_index = by_key(rows, "index", path)
    return _examples([{**row, "image": _image(row, by_index, f"{path}, index {row['index']}")} for row in rows], limit, path)


def _examples(rows: Sequence[Mapping[str, Any]], limit: int | None, where: object) -> list[VqaExample]:
    chosen = set(first(list(dict.fromkeys(_unrotated(str(row["index"])) for row in rows)), limit))
    return checked([_example(row, f"{where}, index {row['index']}") for row in rows if _unrotated(str(row["index"])) in chosen], where)


def _example(row: Mapping[str, Any], where: str) -> VqaExample:
    choices: list[str] = []
    for letter in "ABCD":
        choice = _filled(row.get(letter))
        if choice is None:
            break
        choices.append(choice)
    answer = (row["answer"] or "").strip()
    if answer not in tuple("ABCD")[: len(choices)]:
        raise ValueError(f"{where} has the answer {answer!r} and {len(choices)} choices; expected a letter among them; mend the row.")
    hint = _filled(row.get("hint"))
    question = f"{hint}\n{row['question']}" if hint else row["question"] or ""
    return VqaExample(
        row["image"],
        with_choices(question, choices) + LETTER_ANSWER,
        answer,
        question_id=str(row["index"]),
        choices=tuple(choices),
        kind=_filled(row.get("category")) or "",
        group=_unrotated(str(row["index"])),
    )


def _image(row: Mapping[str, str | None], by_index: Mapping[str, Mapping[str, str | None]], where: str) -> bytes:
    value = row["image"] or ""
    if value in by_index:
        value = by_index[value]["image"] or ""
    try:
        image = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError(f"{where} has an image that is no base64 ({error}); get the file again.") from error
    if not image:
        raise ValueError(f"{where} has no image; expected one in base64, or the index of a row that has it; get the file again.")
    return image


def _unrotated(index: str) -> str:
    """Return the index of the question that a row asks, whatever the order of its choices."""
    return str(int(index) % ROTATION) if index.isdecimal() else index


def _filled(value: str | None) -> str | None:
    return None if value is None or value.strip().lower() in NOTHING else value.strip()


TASK = VqaTask("mmbench", load, "accuracy", choice_score, max_new_tokens=1024, circular="circular_accuracy")
