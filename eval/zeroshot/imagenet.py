"""ImageNet-1k and its shifts V2, -R, -A, -Sketch: which folder is which class.

Data: the official folders, got and unpacked by the user; nothing is downloaded. Folders are named by WordNet ids, whose sorted order is
ImageNet's (``imagenet_wnids.txt``); those of V2 by the number of the class. The validation images of ImageNet-1k come in one folder
without classes: they have to be sorted into folders first. Names and the 80 prompts are open_clip's.

-R and -A have 200 of the classes: their folders say which, and only these are answers.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

from corda_eval.zeroshot.images import ClassifiedImages, class_folders, labelled_files

NUM_SUBSET = 200


def imagenet1k(folder: str | Path) -> ClassifiedImages:
    """Return the 50,000 validation images, in a folder such as ``val`` with ``n01440764`` … ``n15075141``."""
    return _all_classes("imagenet1k", folder, 50_000)


def imagenet_sketch(folder: str | Path) -> ClassifiedImages:
    """Return the 50,889 sketches, in a folder such as ``sketch`` with ``n01440764`` … ``n15075141``."""
    return _all_classes("imagenet_sketch", folder, 50_889)


def imagenet_v2(folder: str | Path) -> ClassifiedImages:
    """Return the 10,000 images of one sampling, in a folder such as ``imagenetv2-matched-frequency-format-val`` with ``0`` … ``999``.

    Raises:
        ValueError: If a folder's name is no number of a class.
    """
    labels = {}
    for path in class_folders(folder):
        if not path.name.isdecimal() or int(path.name) >= 1000:
            raise ValueError(f"{path} is not named by a class's number; expected 0 to 999, as ImageNet-V2 has; name the folder of these.")
        labels[path] = int(path.name)  # not its place in the sorted names, where 10 comes before 2
    return _filled("imagenetv2", folder, labels, names(), 10_000)


def imagenet_r(folder: str | Path) -> ClassifiedImages:
    """Return the 30,000 renditions of 200 classes, in a folder such as ``imagenet-r``."""
    return _subset("imagenet-r", folder, 30_000)


def imagenet_a(folder: str | Path) -> ClassifiedImages:
    """Return the 7,500 hard photographs of 200 classes, in a folder such as ``imagenet-a``."""
    return _subset("imagenet-a", folder, 7_500)


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1,000 classes, in order."""
    return tuple((Path(__file__).parent / "imagenet_wnids.txt").read_text().split())


def names() -> tuple[str, ...]:
    """Return open_clip's names of the 1,000 classes, in order."""
    return tuple(_open_clip().IMAGENET_CLASSNAMES)


def templates() -> tuple[Any, ...]:
    """Return the 80 prompts of OpenAI's CLIP, as functions of a name."""
    return tuple(_open_clip().OPENAI_IMAGENET_TEMPLATES)


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ImageNet's names and prompts come from the package open_clip_torch, which is not installed; run: "
            "pip install 'corda-vlm[open-clip]'."
        ) from error
    return open_clip


def _by_wnid(folder: str | Path) -> dict[Path, int]:
    """Return the class folders and the numbers of their classes among the 1,000."""
    numbers = {wnid: number for number, wnid in enumerate(wnids())}
    classes = class_folders(folder)
    strange = [path for path in classes if path.name not in numbers]
    if strange:
        raise ValueError(f"{strange[0]} is not named by an id of ImageNet-1k's classes, such as n01440764; name the folder of these.")
    return {path: numbers[path.name] for path in classes}


def _all_classes(task: str, folder: str | Path, num_images: int) -> ClassifiedImages:
    return _filled(task, folder, _by_wnid(folder), names(), num_images)


def _subset(task: str, folder: str | Path, num_images: int) -> ClassifiedImages:
    """Return images whose possible answers are the folders' classes only."""
    labels = _by_wnid(folder)
    if len(labels) != NUM_SUBSET:
        raise ValueError(
            f"{folder} has folders of {len(labels)} classes; expected the {NUM_SUBSET} of {task}, which say what is told apart; unpack all."
        )
    chosen = sorted(labels.values())
    places = {path: chosen.index(number) for path, number in labels.items()}
    return _filled(task, folder, places, tuple(names()[number] for number in chosen), num_images)


def _filled(task: str, folder: str | Path, labels: dict[Path, int], class_names: tuple[str, ...], num_images: int) -> ClassifiedImages:
    items = labelled_files(folder, labels)
    if len(items) != num_images:
        warnings.warn(f"{folder} has {len(items)} images, {task} has {num_images}: the figures are not those of {task}.", stacklevel=4)
    return ClassifiedImages(task, items, class_names, templates())
