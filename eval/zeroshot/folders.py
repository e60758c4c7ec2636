"""Any images with classes: a folder of class folders, parquet files, a folder of ``save_to_disk``, an id of the datasets hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from corda_eval.zeroshot.images import PLAIN_TEMPLATE, ClassifiedImages, Each, LabelledImage, class_folders, labelled_files
from corda_vlm.classifier import Template
from corda_vlm.data.items import Items, load_items
from corda_vlm.data.sources import DataConfig


def image_folder(
    folder: str | Path,
    *,
    class_names: Mapping[str, str] | None = None,
    templates: Sequence[Template] = (PLAIN_TEMPLATE,),
    task: str | None = None,
) -> ClassifiedImages:
    """Return the images of class folders, numbered in their sorted order.

    Args:
        folder: Has one subfolder a class.
        class_names: Name of each subfolder's class; by default the subfolder's, with spaces for underscores.
        templates: Prompts.
        task: What the results are called; by default as the folder.

    Raises:
        FileNotFoundError: If there are no class folders or no images.
        ValueError: If ``class_names`` lacks a folder.
    """
    classes = class_folders(folder)
    unnamed = [path.name for path in classes if class_names is not None and path.name not in class_names]
    if unnamed:
        raise ValueError(f"class_names has no name for the folder {unnamed[0]!r} of {folder}; expected one for each; add it.")
    chosen = [path.name.replace("_", " ") if class_names is None else class_names[path.name] for path in classes]
    items = labelled_files(folder, {path: number for number, path in enumerate(classes)})
    return ClassifiedImages(task or Path(folder).name, items, chosen, tuple(templates))


def table(
    source: str | Path | DataConfig,
    *,
    image: str = "image",
    label: str = "label",
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: Sequence[Template] = (PLAIN_TEMPLATE,),
    task: str | None = None,
) -> ClassifiedImages:
    """Return the images of a table's rows.

    Args:
        source: A file, folder or id as ``DataConfig.source``; or a whole ``DataConfig``, for splits and limits.
        image: Column of the image.
        label: Column of the class: its number, or its name.
        class_names: Names in order, or a name for each of the table's own; by default those that the table's own type of column has. A
            table's own names are found among them by name (``class_numbers``), whatever their order is; numbers without names are places.
        templates: Prompts.
        task: What the results are called; by default as the source.

    Raises:
        ValueError: If there are no names, a class of the table is not among them, or a column is missing.
    """
    given = source if isinstance(source, DataConfig) else DataConfig(str(source))
    config = replace(given, columns={"image": image, "text": label}, prompt=None)
    items = load_items(config)
    stored = getattr(items.rows, "class_names", {}).get(label)
    known = stored if class_names is None else list(class_names)
    if not known:
        raise ValueError(f"{config.source} does not name the classes of {label!r}; expected their names in order; give class_names.")
    names = class_names.values() if isinstance(class_names, Mapping) else known
    by_number = stored is None and isinstance(items.rows[0][label], int)
    numbers = None if by_number else class_numbers(stored or known, known, config.source)
    images = Each(partial(_labelled_row, items, label, numbers), range(len(items)))
    return ClassifiedImages(task or Path(config.source).stem, images, tuple(names), tuple(templates))


def class_numbers(own: Sequence[str], class_names: Sequence[str], source: str) -> dict[str, int]:
    """Return the place among ``class_names`` of each class that a data set has names of its own for, by that name and by its plain form.

    Names are the same if they differ in capitals, or in spaces, underscores and hyphens only.

    Raises:
        ValueError: If one is not among them.
    """
    backwards = reversed(list(enumerate(class_names)))  # of equal names the first counts
    places = {_plain(name): number for number, name in backwards}
    if list(map(_plain, own)) == list(map(_plain, class_names)):  # as it should be, even where two classes have one name
        return places | {name: number for number, name in reversed(list(enumerate(own)))}
    strange = [name for name in own if _plain(name) not in places]
    if strange:
        raise ValueError(
            f"{source} calls {len(strange)} of its {len(own)} classes, such as {strange[0]!r}, by none of the names given; expected the "
            "same names, in whatever order; give class_names as {the table's name: the name to ask by}."
        )
    return places | {name: places[_plain(name)] for name in own}


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _labelled_row(items: Items, label: str, numbers: Mapping[str, int] | None, place: int) -> LabelledImage:
    """Return the image of a row, whose number, from 0, is its id; ``numbers`` is None where the column has the numbers of classes."""
    item = items[place]
    row = items.places[place]
    where = items.name_of(row)
    if "image" not in item:
        raise ValueError(f"{where} has no image; expected one; name its column with image, or remove the row.")
    try:
        text = item["text"]
        number = int(text) if numbers is None else numbers[text if text in numbers else _plain(text)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} has the class {item['text']!r}, which is no number or known name; correct {label!r}.") from error
    return LabelledImage(str(row), item["image"], number)
