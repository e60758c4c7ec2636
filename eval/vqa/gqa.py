"""GQA: compositional questions about scenes, one right answer each (testdev, balanced: 12,578).

Folder: ``questions/testdev_balanced_questions.json`` (or the file alone) and the images as ``images/n161313.jpg``
(https://cs.stanford.edu/people/dorarad/gqa/download.html); splits "testdev_balanced", "val_balanced" and their like.
Prompt: LLaVA-1.5's. Score: the answer itself, lower-cased and without final periods; also for open and binary questions.
"""

from pathlib import Path

from corda_eval.metrics import gqa_match
from corda_eval.vqa.example import SHORT_ANSWER, VqaExample, VqaTask
from corda_eval.vqa.files import checked, first, read_json, rows_of


def load(folder: str | Path, *, split: str = "testdev_balanced", limit: int | None = None) -> list[VqaExample]:
    """Return the questions of a split in file order, all or the first.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken.
    """
    folder = Path(folder).expanduser()
    path = folder / "questions" / f"{split}_questions.json"
    path = path if path.exists() else folder / f"{split}_questions.json"
    questions = read_json(path)
    if not isinstance(questions, dict):
        raise ValueError(f"{path} holds a {type(questions).__name__}; expected question ids and questions; get the benchmark's own file.")
    rows = rows_of(list(first(list(questions.values()), limit)), ("question", "imageId", "answer"), path)
    examples = [
        VqaExample(
            folder / "images" / f"{row['imageId']}.jpg",
            row["question"] + SHORT_ANSWER,
            row["answer"],
            question_id=number,
            kind=_kind(row.get("types")),
        )
        for number, row in zip(questions, rows, strict=False)
    ]
    return checked(examples, path)


def _kind(types: object) -> str:
    """Return "open" for what the official script counts as such, else "binary"; "" where types are not given."""
    if not isinstance(types, dict) or "structural" not in types:
        return ""
    return "open" if types["structural"] == "query" else "binary"


TASK = VqaTask("gqa", load, "accuracy", lambda answer, example: float(gqa_match(answer, example.answer)))
