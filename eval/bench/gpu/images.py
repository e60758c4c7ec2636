"""Zero-shot classification of ViT-B/32 and ViT-L/14 in bfloat16: images a second of our loop against open_clip's own.

Both get the same batches of prepared images from this machine's memory: what decoding costs is measured by ``corda_eval.bench.zeroshot``.
"""

from argparse import Namespace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from corda_eval.bench.gpu.measure import Record, Speeds, seconds_once
from corda_eval.bench.process import in_turns

CLASSES, BATCH, ROUNDS = 1000, 256, 5
ARCHITECTURES = {"ViT-B-32": 32, "ViT-L-14": 16}
"""Batches a round."""
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1},
}
"""A model for CPUs."""


def run(record: Record) -> None:
    """Measure."""
    # Imported here: they belong to the extra `open-clip`.
    import open_clip
    import open_clip_train.zero_shot as theirs

    from corda_eval.zeroshot.classify import cosine_batches
    from corda_eval.zeroshot.images import ClassifiedImages
    from corda_eval.zeroshot.tally import Tally

    theirs.accuracy, theirs.tqdm = _accuracy, lambda batches, **_: batches  # theirs fails with numpy 2.4
    speeds, device, small = Speeds.of(record.device), record.device, record.small
    batch = 8 if small else BATCH
    data = ClassifiedImages("random", (), [f"class {number}" for number in range(CLASSES)])
    for name, num_batches in ({"small": 2} if small else ARCHITECTURES).items():
        torch.manual_seed(0)
        model = open_clip.CLIP(**SMALL) if small else open_clip.create_model(name, pretrained=None, device=device)
        model.eval()
        images, labels = _batches(model, batch, num_batches)
        head = torch.nn.functional.normalize(torch.randn(CLASSES, _width(model), device=device), dim=-1)

        def ours(model: Any = model, images: Any = images, labels: Any = labels, head: Tensor = head) -> None:
            tally = Tally()
            batches = (([""] * len(label), label, {"image": image}) for image, label in zip(images, labels, strict=True))
            for ids, label, cosines in cosine_batches(model, head, data, batches, dtype=torch.bfloat16):
                tally.add(ids, label.to(device), cosines, {"ece": 100.0})

        def open_clips(model: Any = model, images: Any = images, labels: Any = labels, head: Tensor = head) -> None:
            options = Namespace(device=str(device), precision="amp_bf16", batch_size=batch)
            theirs.run(model, head.T, list(zip(images, labels, strict=True)), options)

        sides = {"ours": ours, "open_clip": open_clips}
        seconds = _in_turns(sides, record)
        total = batch * num_batches
        floor = total * 2 * _vision_products(model) / speeds.bfloat16
        for side, spent in seconds.items():
            record.measured(f"{name}, {side}", spent, "s", floor=floor, from_counts=f"{total} images' products with weights")
            record.measured(f"{name}, {side}, images a second", total / spent, "images/s")
        record.measured(f"{name}, ours / open_clip", seconds["open_clip"] / seconds["ours"], "of images/s", aim=">= 1.0")


def _in_turns(sides: dict[str, Any], record: Record) -> dict[str, float]:
    """Return the median seconds of each side's rounds, after one of each that warms up."""
    for side in sides.values():
        side()
    timed: dict[str, list[float]] = {name: [] for name in sides}
    for _, name in in_turns(list(sides), 2 if record.small else ROUNDS):
        timed[name].append(seconds_once(sides[name], record.device)[0])
    return {name: median(seconds) for name, seconds in timed.items()}


def _batches(model: Any, size: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches of random images and labels, in memory that the device reads by itself."""
    pixels = model.visual.image_size
    high, wide = pixels if isinstance(pixels, tuple) else (pixels, pixels)
    distinct = [torch.randn(size, 3, high, wide) for _ in range(min(count, 4))]
    on_cuda = next(model.parameters()).is_cuda
    distinct = [images.pin_memory() if on_cuda else images for images in distinct]
    labels = [torch.randint(CLASSES, (size,)) for _ in range(count)]
    return [distinct[number % len(distinct)] for number in range(count)], labels


def _width(model: Any) -> int:
    return int(model.text_projection.shape[-1])


def _vision_products(model: Any) -> int:
    """Return how many products with weights an image takes: each token with each weight of a block."""
    visual = model.visual
    tokens = int(visual.positional_embedding.shape[0])
    return tokens * sum(parameter.numel() for parameter in visual.transformer.parameters())


def _accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Return how many are right, as theirs does, where numpy does not take an array for a number."""
    hits = output.topk(max(topk), 1, True, True)[1] == target[:, None]
    return [hits[:, :k].any(1).sum().item() for k in topk]
