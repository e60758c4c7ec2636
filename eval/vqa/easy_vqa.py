"""easy-VQA: short questions about one coloured shape (4,000 + 1,000 images of 64 x 64, 13 answers).

Data: the wheel ``easy-vqa`` (MIT, Victor Zhou), installed by the ``demo`` extra; read from its folder, never downloaded here.
Prompt: the question as it stands. Score: exact match of the lower-cased answer without its final period.
"""

from collections.abc import Sequence

from corda_eval.vqa.example import VqaExample, VqaTask, match_score
from corda_eval.vqa.files import first, package_folder, read_json
from corda_vlm.data.images import open_image

TRAINING_QUESTIONS = 38_575
"""In the training split."""
VALIDATION = range(9000, 9673)
"""Questions of the test split that rates are chosen on: what a demo or a suite measures with a limit begins at the first."""


def load_easy_vqa(split: str = "test", *, limit: int | None = None, indices: Sequence[int] | None = None) -> list[VqaExample]:
    """Return the questions of one split in file order, all or the first, or those at ``indices``; "validation" is the end of "test".

    Images are opened once each and shared between their questions.

    Raises:
        ValueError: If ``split`` is not "train", "test" or "validation".
        ModuleNotFoundError: If the wheel ``easy-vqa`` is not installed.
    """
    if split == "validation":
        return load_easy_vqa("test", indices=first(VALIDATION, limit))
    if split not in ("train", "test"):
        raise ValueError(f'easy-VQA has the splits "train" and "test", not "{split}".')
    folder = package_folder("easy_vqa") / "data" / split
    rows = read_json(folder / "questions.json")
    chosen = first(range(len(rows)), limit) if indices is None else [range(len(rows))[i] for i in indices]
    images = {number: open_image(folder / "images" / f"{number}.png") for number in {rows[i][2] for i in chosen}}
    return [VqaExample(images[rows[i][2]], rows[i][0], rows[i][1], question_id=str(i)) for i in chosen]


TASK = VqaTask("easy_vqa", load_easy_vqa, "accuracy", match_score, max_new_tokens=5)
