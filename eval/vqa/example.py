"""The one shape that every question about an image has here."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class VqaExample:
    """One question about one image."""

    image: Image.Image
    question: str
    answer: str

    def as_item(self) -> dict[str, object]:
        """Return the example in the form that ``corda_vlm.prepare`` and ``corda_vlm.fine_tune`` read."""
        return {"image": self.image, "question": self.question, "answer": self.answer}
