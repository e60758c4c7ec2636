"""COCO and Flickr30k: photographs with about five captions each, for retrieval.

Data: Karpathy's splits as he published them (``dataset_coco.json``, ``dataset_flickr30k.json``) or as BLIP did
(``coco_karpathy_test.json``), with the images' folder; nothing is downloaded. The test splits have 5,000 and 1,000 images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda_core.files import read_json
from corda_eval.zeroshot.images import Each, open_file
from corda_eval.zeroshot.retrieval import CaptionedImages


def karpathy(
    annotations: str | Path,
    images: str | Path,
    *,
    split: str = "test",
    task: str | None = None,
    captions_per_image: int | None = None,
    limit: int | None = None,
) -> CaptionedImages:
    """Return one split.

    Args:
        annotations: The JSON file.
        images: Folder that the file's image names start from.
        split: Which split of Karpathy's own file; BLIP's have one each.
        task: What the results are called; by default as the file.
        captions_per_image: How many captions of each image count, from its first; None takes all.
        limit: Only the first images, with all their captions.

    Raises:
        FileNotFoundError: If there is no such file, or an image of the split is missing.
        ValueError: If the file is not of either form, or has no such split.
    """
    path, folder = Path(annotations).expanduser(), Path(images).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; expected Karpathy's or BLIP's annotations in JSON; correct the path, or get them.")
    rows = read_json(path)
    try:
        pairs = _karpathys(rows["images"], split) if isinstance(rows, dict) else [(row["image"], row["caption"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of Karpathy's or BLIP's form ({error!r}); expected one of these; get the file again.") from error
    if not pairs:
        raise ValueError(f"{path} has no images in the split {split!r}; expected some; name another split.")
    pairs = pairs[:limit]
    files = [folder / name for name, _ in pairs]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"There is no {missing[0]}, as for {len(missing)} of {path.name}'s {len(files)} images; expected all; name their folder."
        )
    captions = [[caption] if isinstance(caption, str) else list(caption) for _, caption in pairs]
    return CaptionedImages(task or path.stem, Each(open_file, files), captions, captions_per_image)


def _karpathys(rows: Sequence[Any], split: str) -> list[tuple[str, list[str]]]:
    return [
        (f"{row['filepath']}/{row['filename']}" if "filepath" in row else row["filename"], [text["raw"] for text in row["sentences"]])
        for row in rows
        if row["split"] == split
    ]
