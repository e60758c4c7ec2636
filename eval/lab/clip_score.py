"""Score the lab CLIP: zero-shot classification and retrieval of pictures that its pretraining did not have.

python -m corda_eval.lab.clip_score --data runs/clip_data --cifar10 cifar10-test.parquet --imagenet imagenet1k-sample.parquet
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from corda_eval.lab.clip import load_lab_clip
from corda_eval.lab.clip_sets import drawings, icons, shapes
from corda_eval.zeroshot import imagenet
from corda_eval.zeroshot.cifar import cifar10
from corda_eval.zeroshot.classify import classify_images
from corda_eval.zeroshot.folders import table
from corda_eval.zeroshot.retrieval import retrieve
from corda_vlm.data.pairs import OpenClipPairs


def score(
    data: Annotated[Path, typer.Option(help="Folder that clip_data wrote.")],
    model: Annotated[Path | None, typer.Option(help="Folder that clip_pretrain wrote; by default what is shipped.")] = None,
    cifar10_table: Annotated[Path | None, typer.Option("--cifar10", help="Table of CIFAR-10's columns image and label.")] = None,
    imagenet_table: Annotated[Path | None, typer.Option("--imagenet", help="Table of photographs, labels 0 … 999.")] = None,
) -> None:
    """Print the scores as JSON: percent right, and how many images and classes there were."""
    towers, preprocess, tokenizer = load_lab_clip(model)
    pairs = OpenClipPairs(preprocess, tokenizer)
    sets = [shapes("test"), icons(data, "icons_seen"), icons(data, "icons_unseen")]
    if cifar10_table is not None:
        sets.append(cifar10(cifar10_table))
    if imagenet_table is not None:
        sets.append(table(imagenet_table, class_names=imagenet.names(), templates=imagenet.templates(), task="imagenet"))
    scores: dict[str, Any] = {}
    for images in sets:
        result = classify_images(towers, images, pairs, progress=partial(tqdm, desc=images.task))
        percent = {key: round(100 * result.metrics[key], 2) for key in ("acc1", "acc5")}
        scores[images.task] = percent | {"images": len(images.items), "classes": len(images.class_names)}
    result = retrieve(towers, drawings(data), pairs)
    scores["drawings"] = {key: round(100 * value, 2) for key, value in result.metrics.items() if "recall" in key} | {
        "captions": result.num_examples
    }
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    typer.run(score)
