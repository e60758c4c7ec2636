"""The one shape that every question about an image has here, and what makes a benchmark of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from corda_eval.metrics import exact_match
from corda_eval.metrics.choice import LETTERS
from corda_vlm.data.images import UNREADABLE, open_image, why_unreadable

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
"""How LLaVA-1.5's training data and evaluations end a question. What stands in front of all, vicuna's system sentence, is an option of who
asks: ``generate_answers``."""


@dataclass(frozen=True)
class VqaExample:
    """One question about one image."""

    image: Image.Image | Path | bytes | Callable[[], bytes] | None
    """A picture, its file, what is in its file, a function that reads that, or None for a question about text alone."""

    question: str
    """The whole prompt: question, choices, and how to answer."""

    answer: str
    """The right answer; where people disagree, the one that most gave. For a multiple choice its letter."""

    question_id: str = ""
    """Unique in its benchmark."""

    answers: tuple[str, ...] = ()
    """What each of several people answered."""

    choices: tuple[str, ...] = ()
    """What there is to choose from, the first being A."""

    kind: str = ""
    """What scores are also given by: type of answer, category."""

    group: str = ""
    """What the examples of one group share: one question asked in several ways, see ``VqaTask.circular``."""

    def as_item(self) -> dict[str, object]:
        """Return the example in the form that ``corda_vlm.prepare`` and ``corda_vlm.fine_tune`` read."""
        image = self.image if isinstance(self.image, (Image.Image, Path)) else self.open_image()
        return {"image": image, "question": self.question, "answer": self.answer}

    def open_image(self) -> Image.Image | None:
        """Return the picture in RGB.

        Raises:
            ValueError: If it cannot be read.
        """
        if self.image is None:
            return None
        source = self.image() if callable(self.image) else self.image
        try:
            return open_image(source)
        except UNREADABLE as error:
            name = f"of {len(source)} bytes" if isinstance(source, bytes) else source
            raise ValueError(
                f"question {self.question_id!r}: the image {name} cannot be read ({why_unreadable(error)}); get the file again, or mend it."
            ) from error


@dataclass(frozen=True)
class VqaTask:
    """A benchmark: where its examples come from, how answers are scored."""

    name: str

    load: Callable[..., list[VqaExample]]
    """``load(source, split=…, limit=…, download=…)`` of a folder or table that the benchmark's file describes; without a source of what
    comes with its package: ``load(split=…, limit=…)``."""

    headline: str
    """Name of the mean score, also given by kind."""

    score: Callable[[str, VqaExample], float]
    """Score of one answer as the model gave it, from 0 to 1."""

    max_new_tokens: int = 128
    """Where an answer that does not end by itself is cut; that of LLaVA-1.5's evaluations."""

    more_metrics: Callable[[Sequence[VqaExample], Sequence[str]], Mapping[str, float]] = lambda examples, answers: {}
    """What else is computed from all answers."""

    circular: str = ""
    """Name of the mean over groups, each of which scores as its worst example. Where there is one, it is the result's headline, and the
    groups' scores are the result's."""


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with a lettered line for each choice."""
    return question + "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def match_score(answer: str, example: VqaExample) -> float:
    """Return 1 if the answer is the right one in any case, without its final period, else 0: ``VqaTask.score`` of many benchmarks."""
    return float(exact_match(answer, example.answer))
