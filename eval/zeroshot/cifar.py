"""CIFAR-10 and CIFAR-100: photographs of 32 x 32 pixels, 10,000 in each test set (Krizhevsky 2009).

Data: the official Python version (``cifar-10-batches-py``, ``cifar-100-python``), read by torchvision, which compares its pickles'
checksums before it opens them; or a table as in ``folders.py``. Nothing is downloaded. Prompts and names: those of CLIP's paper.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torchvision

from corda_eval.zeroshot.folders import class_numbers, table
from corda_eval.zeroshot.images import ClassifiedImages, Each, LabelledImage
from corda_vlm.data.sources import DataConfig

ADJECTIVES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
TEMPLATES = tuple(
    prompt
    for article in ("a", "the")
    for prompt in (
        *(f"a {adjective}photo of {article} {{}}." for adjective in ADJECTIVES),
        f"a photo of {article} small {{}}.",
        f"a photo of {article} big {{}}.",
    )
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple((Path(__file__).parent / "cifar100_names.txt").read_text().splitlines())


def cifar10(source: str | Path | DataConfig, *, image: str = "image", label: str = "label") -> ClassifiedImages:
    """Return the test images: of the folder that holds ``cifar-10-batches-py``, or all rows of a table with these columns."""
    if _has(source, "cifar-10-batches-py"):
        return ClassifiedImages("cifar10", _official(torchvision.datasets.CIFAR10, source, CIFAR10), CIFAR10, TEMPLATES)
    return table(source, image=image, label=label, class_names=CIFAR10, templates=TEMPLATES, task="cifar10")


def cifar100(source: str | Path | DataConfig, *, image: str = "image", label: str = "fine_label") -> ClassifiedImages:
    """Return the test images: of the folder that holds ``cifar-100-python``, or all rows of a table with these columns."""
    if _has(source, "cifar-100-python"):
        return ClassifiedImages("cifar100", _official(torchvision.datasets.CIFAR100, source, CIFAR100), CIFAR100, TEMPLATES)
    return table(source, image=image, label=label, class_names=CIFAR100, templates=TEMPLATES, task="cifar100")


def _has(source: str | Path | DataConfig, folder: str) -> bool:
    return not isinstance(source, DataConfig) and (Path(source).expanduser() / folder).is_dir()


def _official(kind: Any, source: Any, names: Sequence[str]) -> Each:
    try:
        dataset = kind(str(Path(source).expanduser()), train=False, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(f"{source} does not hold all of {kind.__name__} ({error}); unpack its archive there again.") from error
    numbers = class_numbers(dataset.classes, names, str(source))
    return Each(partial(_labelled, dataset, [numbers[name] for name in dataset.classes]), range(len(dataset)))


def _labelled(dataset: Any, numbers: Sequence[int], place: int) -> LabelledImage:
    image, label = dataset[place]
    return LabelledImage(str(place), image, numbers[label])
