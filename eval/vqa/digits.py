"""Handwritten digits as questions: "What digit is written?" over scikit-learn's ``load_digits``.

Data: 1,797 scans of 8 x 8 pixels inside scikit-learn (UCI, Alpaydin and Kaynak 1998), enlarged to 64 x 64, dark on white.
Split: shuffled once with a fixed seed: 1,200 to train, 200 to validate, 397 to test. Score: exact match.
"""

from importlib.util import find_spec

import numpy as np
from PIL import Image

from corda_eval.vqa.example import VqaExample, VqaTask, match_score

QUESTION = "What digit is written?"
SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1797)}


def load_digit_questions(split: str = "test", *, limit: int | None = None) -> list[VqaExample]:
    """Return the digits of one split, each with the same question, all or the first.

    Raises:
        ValueError: If the split is unknown.
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"The digits have the splits {sorted(SPLITS)}, not {split!r}.")
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError("scikit-learn is not installed; run: pip install 'corda-vlm[demo]'")
    # Imported here: it takes a second and belongs to the extra `demo`.
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))[SPLITS[split]][:limit]
    pictures = [(_enlarged(scans.images[number]), str(scans.target[number])) for number in order]
    return [VqaExample(picture, QUESTION, digit, str(place)) for place, (picture, digit) in enumerate(pictures)]


def _enlarged(scan: np.ndarray) -> Image.Image:
    """Return an 8 x 8 scan of ink 0 … 16 as a 64 x 64 picture, dark on white."""
    paper = (255 - scan * (255 / 16)).astype(np.uint8)
    return Image.fromarray(paper).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")


TASK = VqaTask("digits", load_digit_questions, "accuracy", match_score, max_new_tokens=5)
