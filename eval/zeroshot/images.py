"""Labelled images, and their batches as worker processes make them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from corda_vlm.classifier import Template
from corda_vlm.data.images import UNREADABLE, open_image, why_unreadable

NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow tells apart, but reads by other programs or not at all."""
PLAIN_TEMPLATE = "a photo of a {}."

ImageBatch = tuple[list[str], Tensor, dict[str, Tensor]]
"""Ids, labels (batch,), and what the image tower reads."""


@dataclass(frozen=True)
class LabelledImage:
    """One image of a test set."""

    id: str
    image: Image.Image
    label: int


@dataclass(frozen=True)
class ClassifiedImages:
    """A test set: images, and the names of their classes."""

    task: str
    """Its usual name, such as "imagenet1k"."""

    items: Any
    """A sequence of ``LabelledImage``, each read when asked for; ``torch.utils.data.Subset`` takes some of them."""

    class_names: Sequence[str]

    templates: Sequence[Template] = (PLAIN_TEMPLATE,)
    """Prompts, as texts with ``{}`` or functions of a name; a class's feature is their mean."""

    groups: Sequence[Sequence[int]] | None = None
    """Where several classes are one answer: the classes of each, whose highest logit counts; labels then are places in here."""


@dataclass(frozen=True)
class Each(Sequence[Any]):
    """What a function gives for each of some keys, when it is asked for: all images of a test set are more than the memory holds."""

    read: Callable[[Any], Any]
    keys: Sequence[Any]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        """Return what is read for the key at a place."""
        return self.read(self.keys[index])


def open_file(file: Path) -> Image.Image:
    """Return the image of a file, in RGB.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return open_image(file)
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as an image ({why_unreadable(error)}); expected a whole image; get it again.") from error


@cache
def suffixes() -> frozenset[str]:
    """Return how names of pictures end that Pillow reads here, plugins included, in small letters."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, form in known.items() if form in Image.OPEN and form not in NO_PICTURES)


def class_folders(folder: str | Path) -> list[Path]:
    """Return a folder's subfolders, sorted by name, without hidden ones and those that macOS puts into archives.

    Raises:
        FileNotFoundError: If there is no such folder, or none in it.
    """
    path = Path(folder).expanduser()
    classes = sorted(part for part in path.iterdir() if part.is_dir() and not _is_hidden(part.name)) if path.is_dir() else []
    if not classes:
        raise FileNotFoundError(f"{path} has no subfolders; expected one for each class, with its images inside; name the folder of these.")
    return classes


def labelled_files(folder: str | Path, labels: dict[Path, int], *, border: int = 0) -> Each:
    """Return the images inside class folders, by class folder and file name; hidden files and folders do not count.

    Their ids are the files' names from the folder on; ``border`` pixels are cut off on each side.

    Raises:
        FileNotFoundError: If there are none.
    """
    visible = [(file, label) for part, label in labels.items() for file in _visible_files(part)]
    pairs = [(file, label) for file, label in visible if file.suffix.lower() in suffixes()]
    if not pairs:
        raise FileNotFoundError(
            f"The folders of {folder} hold no images; expected files that end as {sorted(suffixes())} do; unpack or convert them."
        )
    left = [file for file, _ in visible if file.suffix.lower() not in suffixes() and (guess_type(file.name)[0] or "").startswith("image/")]
    if left:
        warnings.warn(f"{len(left)} picture(s) such as {left[0]} are of a kind that Pillow does not read, and do not count.", stacklevel=3)
    return Each(partial(_labelled_file, Path(folder).expanduser(), border), pairs)


def _labelled_file(folder: Path, border: int, pair: tuple[Path, int]) -> LabelledImage:
    file, label = pair
    image = open_file(file)
    if border:
        image = image.crop((border, border, image.width - border, image.height - border))
    return LabelledImage(file.relative_to(folder).as_posix(), image, label)


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files under a folder, sorted."""
    for file in sorted(folder.rglob("*")):
        if not any(map(_is_hidden, file.relative_to(folder).parts)) and file.is_file():
            yield file


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


@dataclass(frozen=True)
class _Collate:
    """Items -> batch; a class, so that worker processes can be given it."""

    read: Callable[[list[Image.Image]], dict[str, Tensor]]
    dtype: torch.dtype | None

    def __call__(self, items: list[LabelledImage]) -> ImageBatch:
        inputs = self.read([open_image(item.image) for item in items])  # towers' own ways to RGB differ
        if self.dtype is not None:
            inputs = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        return [item.id for item in items], torch.tensor([item.label for item in items]), inputs


def image_batches(
    items: Any,
    read: Callable[[list[Image.Image]], dict[str, Tensor]],
    *,
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
) -> DataLoader[ImageBatch]:
    """Return the batches of a test set in its order.

    Args:
        items: A sequence of ``LabelledImage``.
        read: Makes the image tower's inputs: ``read`` of a ``PairCollator``.
        batch_size: Images in a batch.
        workers: Processes that read and prepare images; 0 does it in this one.
        dtype: Precision of the inputs; half of it halves what passes between processes.
    """
    return DataLoader(
        items, batch_size=batch_size, num_workers=workers, collate_fn=_Collate(read, dtype), pin_memory=torch.cuda.is_available()
    )
