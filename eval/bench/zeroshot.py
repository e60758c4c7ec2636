"""Zero-shot classification: our loop against open_clip's own (``open_clip_train.zero_shot.run``), on the same photographs.

    python -m corda_eval.bench.zeroshot cifar10-test.parquet --output runs/zeroshot.jsonl

A random ViT of open_clip, CIFAR-10's test photographs, the same head. Both sides run in one process, in turns; the table gives medians and
the medians of the pairs' ratios ours / theirs: in time, and in the processor's time of this process, which other work on the machine
disturbs less (all of it without ``workers``). Images are decoded, prepared, encoded and compared with the classes on both sides; theirs
counts top-1 and top-5, ours recall by class and calibration too.
"""

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from corda_eval.bench.process import by_side, in_turns, median_of, median_ratio, recorded
from corda_eval.records import table
from corda_eval.zeroshot.cifar import cifar10
from corda_eval.zeroshot.classify import class_head, cosine_batches
from corda_eval.zeroshot.images import ClassifiedImages, Each, image_batches
from corda_eval.zeroshot.tally import Tally
from corda_vlm.data.pairs import OpenClipPairs

VISION = {"image_size": 64, "patch_size": 16, "layers": 6, "width": 256, "head_width": 64}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}


def bench(
    source: Annotated[Path, typer.Argument(help="Parquet file of CIFAR-10's test images, with the columns image and label.")],
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 5,
    images: Annotated[int, typer.Option(help="Photographs a round.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Photographs at once.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    output: Annotated[Path | None, typer.Option(help="JSON lines, one a run, are added here.")] = None,
) -> None:
    """Run the benchmark and print its table."""
    torch.set_num_threads(threads)
    data = spread(cifar10(source), images)
    model, pairs = random_model()
    head = class_head(model, data, pairs)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    sides = {
        "ours": lambda: run_ours(model, head, data, pairs, **options),
        "open_clip": lambda: run_theirs(model, head, data, pairs, **options),
    }
    for side in sides.values():
        side()
    runs = []
    for turn, name in in_turns(list(sides), rounds):
        start, busy = time.perf_counter(), time.process_time()
        accuracy = sides[name]()
        spent = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - busy}
        run = {"side": name, "round": turn, **spent, "acc1": accuracy, "images": len(data.items)}
        runs.append(recorded({**run, **options, "threads": threads}, output))
    print(comparison(runs))


def spread(data: ClassifiedImages, count: int) -> ClassifiedImages:
    """Return some of the images, evenly over the whole: rows may be sorted by class."""
    places = [number * len(data.items) // count for number in range(min(count, len(data.items)))]
    return replace(data, items=Subset(data.items, places))


def random_model() -> tuple[Any, OpenClipPairs]:
    """Return a small model of open_clip with random weights, and what makes its inputs."""
    # Imported here: it belongs to the extra `open-clip`.
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=128, vision_cfg=VISION, text_cfg=TEXT).eval()
    preprocess = open_clip.image_transform(VISION["image_size"], is_train=False)
    return model, OpenClipPairs(preprocess, open_clip.SimpleTokenizer(context_length=TEXT["context_length"]))


def run_ours(model: Any, head: Tensor, data: ClassifiedImages, pairs: OpenClipPairs, *, batch_size: int, workers: int) -> float:
    """Return the accuracy as ``classify_images`` does, given the head."""
    tally, start = Tally(), time.perf_counter()
    scales = {"ece": model.logit_scale.exp().item(), "ece_scale_100": 100.0}
    batches = image_batches(data.items, pairs.read, batch_size=batch_size, workers=workers)
    for ids, labels, cosines in cosine_batches(model, head, data, batches):
        tally.add(ids, labels, cosines, scales)
    return tally.result(data.task, len(data.class_names), time.perf_counter() - start).metrics["acc1"]


def run_theirs(model: Any, head: Tensor, data: ClassifiedImages, pairs: OpenClipPairs, *, batch_size: int, workers: int) -> float:
    """Return the accuracy as open_clip's training script finds it."""
    from open_clip_train import zero_shot

    # Theirs fails with numpy 2.4, on an array of one number that is made a float.
    zero_shot.accuracy = _accuracy
    zero_shot.tqdm = lambda batches, **_: batches
    images: Any = Each(partial(_transformed, data.items, pairs.preprocess), range(len(data.items)))
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers)
    with torch.no_grad():
        top1, _ = zero_shot.run(model, head.T, loader, Namespace(device="cpu", precision="fp32", batch_size=batch_size))
    return float(top1)


def _transformed(items: Any, preprocess: Any, place: int) -> tuple[Tensor, int]:
    """Return one prepared image and its label, as open_clip's datasets do."""
    return preprocess(items[place].image), items[place].label


def _accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    hits = output.topk(max(topk), 1, True, True)[1] == target[:, None]
    return [hits[:, :k].any(1).sum().item() for k in topk]


def comparison(runs: list[dict[str, Any]]) -> str:
    """Return medians and the ratios of the rounds as a Markdown table."""
    sides = by_side(runs, ("ours", "open_clip"))
    rows = []
    for name, runs_of_side in sides.items():
        seconds, busy = (median_of(runs_of_side, key) for key in ("seconds", "processor_seconds"))
        ratios = [f"{median_ratio(runs_of_side, sides['open_clip'], key):.3f}" for key in ("seconds", "processor_seconds")]
        rate, accuracy = runs_of_side[0]["images"] / seconds, runs_of_side[0]["acc1"]
        rows.append([name, f"{seconds:.2f}", ratios[0], f"{busy:.2f}", ratios[1], f"{rate:.0f}", f"{accuracy:.4f}"])
    return "\n".join(table(["side", "s", "to open_clip", "processor s", "to open_clip", "images/s", "acc1"], rows))


if __name__ == "__main__":
    typer.run(bench)
