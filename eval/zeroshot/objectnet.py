"""ObjectNet: photographs of household objects in odd places, the 113 kinds that ImageNet-1k has too.

Data: the official ``objectnet-1.0`` folder, with ``images`` and ``mappings``; nothing is downloaded. ``mappings`` says which folder is
which object and which of ImageNet's classes, and comes with the dataset, not with this package.
Images: the red border of two pixels is cut off, as WiSE-FT does; CLIP_benchmark leaves it (``border=0``).
Answers: by the objects' own names, lower-cased, as CLIP_benchmark and WiSE-FT's zero-shot heads; or of ImageNet's classes the best
of each object's, which is WiSE-FT's rule for heads of 1,000 classes.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from corda_eval.zeroshot.imagenet import names, templates
from corda_eval.zeroshot.images import ClassifiedImages, class_folders, labelled_files

NUM_OBJECTS, NUM_IMAGES = 113, 18_574


def objectnet(folder: str | Path, *, answers: str = "objects", border: int = 2) -> ClassifiedImages:
    """Return the images of the objects that ImageNet-1k has.

    Args:
        folder: ``objectnet-1.0``.
        answers: "objects", by the objects' names; or "imagenet", the best of an object's classes among ImageNet's 1,000.
        border: Pixels cut off on each side.

    Raises:
        FileNotFoundError: If images or mappings are missing.
        ValueError: If ``answers`` is unknown or the mappings do not fit each other.
    """
    if answers not in ("objects", "imagenet"):
        raise ValueError(f"answers is {answers!r}; expected one of ['objects', 'imagenet'].")
    path = Path(folder).expanduser()
    classes = object_classes(path / "mappings")
    object_of = {name: label for name, label in _mapping(path / "mappings" / "folder_to_objectnet_label.json").items() if label in classes}
    kept = sorted(object_of)
    places = {name: place for place, name in enumerate(kept)}
    items = labelled_files(
        path / "images", {part: places[part.name] for part in class_folders(path / "images") if part.name in places}, border=border
    )
    if (len(kept), len(items)) != (NUM_OBJECTS, NUM_IMAGES):
        warnings.warn(
            f"{folder} has {len(items)} images of {len(kept)} objects, not {NUM_IMAGES} of {NUM_OBJECTS}: the figures are not ObjectNet's.",
            stacklevel=2,
        )
    labels = [object_of[name] for name in kept]
    if answers == "objects":
        return ClassifiedImages("objectnet", items, [label.lower() for label in labels], templates())
    return ClassifiedImages("objectnet", items, names(), templates(), groups=[classes[label] for label in labels])


def object_classes(mappings: Path) -> dict[str, list[int]]:
    """Return the numbers of ImageNet's classes of each object.

    Raises:
        FileNotFoundError: If a mapping is missing.
        ValueError: If a class that an object names is unknown.
    """
    number_of = {ident: int(number) for number, ident in _mapping(mappings / "pytorch_to_imagenet_2012_id.json").items()}
    lines = _text(mappings / "imagenet_to_label_2012_v2").splitlines()
    by_name = {line.strip(): number_of.get(ident) for ident, line in enumerate(lines)}
    classes = {}
    for label, joined in _mapping(mappings / "objectnet_to_imagenet_1k.json").items():
        numbers = [by_name.get(name) for name in joined.split("; ")]
        if None in numbers:
            raise ValueError(
                f"{mappings} gives {label!r} the classes {joined!r}, which it does not number; unpack all of `mappings` again."
            )
        classes[label] = [number for number in numbers if number is not None]
    return classes


def _mapping(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_text(file)))
    except ValueError as error:
        raise ValueError(f"{file} is not whole JSON ({error}); expected an object; unpack it again.") from error


def _text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}; expected ObjectNet's own mapping, which comes in its zip file; unpack `mappings` too."
        )
    return file.read_text()
