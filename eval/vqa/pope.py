"""POPE: is there such an object in the image? Yes or no, in three categories (3,000 questions each; the old random one 2,910).

Folder: ``coco_pope_random.json``, ``coco_pope_popular.json``, ``coco_pope_adversarial.json``, one question a line
(https://github.com/AoiDragon/POPE, ``output/coco``), and COCO's images as ``val2014/COCO_val2014_000000310196.jpg``.
Table: as ``lmms-lab/POPE``, split "test" of its configuration "default", which holds all three.
Prompt: LLaVA-1.5's. Scores: accuracy over all; accuracy, precision, recall, F1 and share of yes by category; ``mean_f1`` over them, the
figure of papers. Answers and labels are joined by question id, which is unique within a category.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_eval.metrics import pope_answer, pope_scores
from corda_eval.records import read_lines
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import by_key, checked, existing, first, rows_of
from corda_eval.vqa.tables import Table, is_table

CATEGORIES = ("random", "popular", "adversarial")
TABLE = Table(("question_id", "question", "answer", "category", "image"), "test")


def load(source: str | Path, *, split: str = "all", limit: int | None = None, download: bool = False) -> list[VqaExample]:
    """Return the questions of one category, or of "all" three; all or the first of each.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or a category is unknown.
    """
    if split not in ("all", *CATEGORIES):
        raise ValueError(f"split is {split!r}; expected one of {['all', *CATEGORIES]}.")
    chosen = CATEGORIES if split == "all" else (split,)
    if not is_table(source):
        folder = Path(source).expanduser()
        return [example for name in chosen for example in _examples(_rows(folder, name), name, limit, folder / f"coco_pope_{name}.json")]
    rows = TABLE.rows(source, download=download)
    strange = [row for row in rows if row["category"] not in CATEGORIES]
    if strange:
        raise ValueError(
            f"{source} has {len(strange)} row(s) of {len(rows)} of other categories than {list(CATEGORIES)}, first question "
            f"{strange[0]['question_id']} of {strange[0]['category']!r}; get the benchmark's own table, or mend it."
        )
    return [example for name in chosen for example in _examples([row for row in rows if row["category"] == name], name, limit, source)]


def _rows(folder: Path, category: str) -> list[Mapping[str, Any]]:
    """Return the rows of an official file with a table's columns."""
    path = folder / f"coco_pope_{category}.json"
    rows = rows_of(read_lines(existing(path)), ("question_id", "image", "text", "label"), path)
    return [{**row, "question": row["text"], "answer": row["label"], "image": folder / "val2014" / row["image"]} for row in rows]


def _examples(rows: Sequence[Mapping[str, Any]], category: str, limit: int | None, where: object) -> list[VqaExample]:
    rows = first(rows, limit)
    wrong = [row["question_id"] for row in rows if row["answer"] not in ("yes", "no")]
    if wrong:
        raise ValueError(f'{where} has {len(wrong)} label(s) that are neither "yes" nor "no", first of question {wrong[0]}; mend them.')
    examples = [
        VqaExample(row["image"], row["question"] + SHORT_ANSWER, row["answer"], question_id=f"{category}/{number}", kind=category)
        for number, row in by_key(rows, "question_id", where).items()
    ]
    return checked(examples, where)


def _more(examples: Sequence[VqaExample], answers: Sequence[str]) -> Mapping[str, float]:
    return pope_scores(answers, [example.answer for example in examples], [example.kind for example in examples])


TASK = VqaTask("pope", load, "accuracy", lambda answer, example: float(pope_answer(answer) == example.answer), more_metrics=_more)
