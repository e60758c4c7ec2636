"""POPE: is there such an object in the image? Yes or no, in three categories (3,000 questions each; the old random one 2,910).

Folder: ``coco_pope_random.json``, ``coco_pope_popular.json``, ``coco_pope_adversarial.json``, one question a line
(https://github.com/AoiDragon/POPE, ``output/coco``), and COCO's images as ``val2014/COCO_val2014_000000310196.jpg``.
Prompt: LLaVA-1.5's. Scores: accuracy over all; accuracy, precision, recall, F1 and share of yes by category; ``mean_f1`` over them, the
figure of papers. Answers and labels are joined by question id, which is unique within a category.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from corda_eval.metrics import pope_answer, pope_scores
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import by_key, checked, first, read_json_lines, rows_of

CATEGORIES = ("random", "popular", "adversarial")


def load(folder: str | Path, *, split: str = "all", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of one category, or of "all" three; all or the first of each.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or the category is unknown.
    """
    if split not in ("all", *CATEGORIES):
        raise ValueError(f"split is {split!r}; expected one of {['all', *CATEGORIES]}.")
    folder = Path(folder).expanduser()
    return [example for name in (CATEGORIES if split == "all" else (split,)) for example in _category(folder, name, limit)]


def _category(folder: Path, category: str, limit: int | None) -> list[VqaExample]:
    path = folder / f"coco_pope_{category}.json"
    rows = first(rows_of(read_json_lines(path), ("question_id", "image", "text", "label"), path), limit)
    wrong = [row["question_id"] for row in rows if row["label"] not in ("yes", "no")]
    if wrong:
        raise ValueError(f'{path} has {len(wrong)} label(s) that are neither "yes" nor "no", first of question {wrong[0]}; mend them.')
    examples = [
        VqaExample(
            folder / "val2014" / row["image"], row["text"] + SHORT_ANSWER, row["label"], question_id=f"{category}/{number}", kind=category
        )
        for number, row in by_key(rows, "question_id", path).items()
    ]
    return checked(examples, path)


def _more(examples: Sequence[VqaExample], answers: Sequence[str]) -> Mapping[str, float]:
    return pope_scores(answers, [example.answer for example in examples], [example.kind for example in examples])


TASK = VqaTask(
    "pope", load, "accuracy", lambda answer, example: float(pope_answer(answer) == example.answer), max_new_tokens=128, more_metrics=_more
)
