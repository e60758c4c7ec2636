"""What a study can teach, one file each."""

from pathlib import Path
from typing import Protocol

from corda_eval.study.settings.lab_clip import LabClipClasses
from corda_eval.study.settings.lab_llava import LabLlavaDigits
from corda_eval.study.settings.lab_llava_text import LabLlavaText
from corda_eval.study.settings.smollm2 import SmolLm2Lines
from corda_eval.study.settings.smollm2_wordnet import SmolLm2Wordnet
from corda_eval.study.task import Task


class Setting(Protocol):
    """A base model and what it is to learn and to keep: a frozen dataclass of options."""

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data; the seed is of training and context, what is measured is always the same.

        Raises:
            ModuleNotFoundError: If a package with data is missing; names the command that installs it.
            FileNotFoundError: If a file is; says how to get it.
        """
        ...


SETTINGS: dict[str, type[Setting]] = {
    "lab_clip_classes": LabClipClasses,
    "lab_llava_digits": LabLlavaDigits,
    "lab_llava_text": LabLlavaText,
    "smollm2_lines": SmolLm2Lines,
    "smollm2_wordnet": SmolLm2Wordnet,
}
"""By the name that stands in a study's config."""
