"""What the lab CLIP is measured on: pictures that its pretraining did not have."""

from collections import defaultdict
from pathlib import Path

from corda_eval.lab.clip import on_white, read_pictures
from corda_eval.lab.shapes import COLOURS, SHAPES, named_images
from corda_eval.vqa.easy_vqa import load_easy_vqa
from corda_eval.zeroshot.images import ClassifiedImages, LabelledImage
from corda_eval.zeroshot.retrieval import CaptionedImages

ICON_PROMPT, SHAPE_PROMPT = "an icon of a {}.", "{}"


def shapes(split: str) -> ClassifiedImages:
    """Return easy-VQA's pictures of one split."""
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pictures = enumerate(named_images(load_easy_vqa(split)))
    items = [LabelledImage(str(number), image, names.index(f"a {colour} {shape}")) for number, (image, colour, shape) in pictures]
    return ClassifiedImages("shapes", items, names, (SHAPE_PROMPT,))


def icons(folder: Path, name: str) -> ClassifiedImages:
    """Return the icons of a file of ``clip_data``; all their captions are classes."""
    table = read_pictures(folder / f"{name}.parquet")
    names = sorted(set(table["caption"]))
    place = {caption: number for number, caption in enumerate(names)}
    items = [LabelledImage(str(number), on_white(row["image"]), place[row["caption"]]) for number, row in enumerate(table)]
    return ClassifiedImages(name, items, names, (ICON_PROMPT,))


def drawings(folder: Path) -> CaptionedImages:
    """Return one drawing of each title that pretraining did not have."""
    by_caption = defaultdict(list)
    for row in read_pictures(folder / "drawings.parquet"):
        by_caption[row["caption"]].append(row["image"])
    return CaptionedImages("drawings", [images[0] for images in by_caption.values()], [[caption] for caption in by_caption])
