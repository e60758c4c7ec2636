"""What easy-VQA's pictures show: one shape in one colour, read off the questions."""

from collections.abc import Sequence
from typing import Any

from corda_eval.vqa.example import VqaExample

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def named_images(examples: Sequence[VqaExample]) -> list[tuple[Any, str, str]]:
    """Return (image, colour, shape) of the pictures whose questions tell both.

    "what color is the circle?" "red" tells both; so do two questions that tell one each.
    """
    known: dict[int, dict[bool, str]] = {}
    images: dict[int, Any] = {}
    for example in examples:
        images[id(example.image)] = example.image
        if example.question.startswith("what"):
            for word in (*example.question.rstrip("?").split(), example.answer):
                if word in COLOURS or word in SHAPES:
                    known.setdefault(id(example.image), {})[word in SHAPES] = word
    return [(images[key], words[False], words[True]) for key, words in known.items() if len(words) == 2]
