"""The image tower of the lab CLIP learns new classes; zero-shot classification of other pictures is to be kept.

Learned: handwritten digits, or the ten classes of a table of photographs. Loss: the cross-entropy (nats) of the zero-shot head: features
of length 1, cosines with the text tower's features of the classes times the logit scale. All heads are those of the untouched model.
Kept: such cross-entropies and accuracies for easy-VQA's shapes (``shapes``: "a red circle", 24 classes); with ``data`` for icons in a style
that pretraining lacked, by names that it had (``icons_seen``) or had not (``icons_unseen``); and for photographs.

What is measured is in no training and no context. Digits: the splits of ``corda_eval.vqa.digits``. Shapes: the test and the training split
of easy-VQA. Icons: ``icons_seen`` and ``icons_unseen`` are of a style of which ``train``, the context, has none. Photographs that are
learned: their rows are shuffled once, the first are for the test, the next for validation, the others for training; photographs that are
kept are in no context.
The contexts' loss (``Task.kept_loss``): the cross-entropy of a class drawn from the model's own probabilities, over the names of shapes and
icons; its squared gradients are Fisher's information.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from corda_core.linears import evaluating
from corda_eval.lab.clip import load_lab_clip, on_white, read_pictures
from corda_eval.lab.clip_data import STYLES
from corda_eval.lab.clip_sets import icons, shapes
from corda_eval.study.settings.shared import drawn, spread
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.zeroshot.cifar import cifar10
from corda_eval.zeroshot.classify import class_head
from corda_eval.zeroshot.images import ClassifiedImages, LabelledImage
from corda_vlm.attention import split_attention
from corda_vlm.classifier import ZeroShotClassifier
from corda_vlm.data.pairs import OpenClipPairs
from corda_vlm.options import Count, Place
from corda_vlm.towers import learnable_layers, select_layers

PHOTOGRAPHS = "photographs"
DIGIT_PROMPT = 'the handwritten digit "{}".'
DRAWINGS = ("openclipart", "tuxpaint")
"""Sources of ``train`` that are drawings and photographs of objects."""


@dataclass(frozen=True)
class LabClipClasses:
    """Options of the setting."""

    steps: Count = 100
    batch_size: Count = 32
    photographs: Place | None = None
    """Learned instead of the digits: a table like CIFAR-10's (``corda_eval.zeroshot.cifar``)."""
    kept_photographs: Place | None = None
    """Measured beside the digits: a table of the same kind."""
    data: Place | None = None
    """Folder that ``corda_eval.lab.clip_data`` wrote: icons to be kept, and the contexts ``icons`` and ``drawings``."""
    context_images: Count = 256
    """Of each domain to be kept."""
    kept_images: Count = 200
    """Measured of each domain, at most."""
    test_images: Count = 200
    validation_images: Count = 100

    def __post_init__(self) -> None:
        """Refuse to keep what is learned.

        Raises:
            ValueError: If photographs are to be learned and to be kept.
        """
        if self.photographs is not None and self.kept_photographs is not None:
            raise ValueError(
                "photographs and kept_photographs are both given, but the same classes cannot be learned and kept; leave out one."
            )

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        model, preprocess, tokenizer = load_lab_clip()
        model.requires_grad_(False)
        pairs = OpenClipPairs(preprocess, tokenizer)
        target = self.learned()
        kept = {data.task: Prepared.of(model, some_of(data, self.kept_images), pairs) for data in self.kept()}
        test, validation = (Prepared.of(model, target[part], pairs) for part in ("test", "validation"))
        chosen = drawn(self.steps * self.batch_size, len(target["train"].items), f"train {seed}")
        training = Prepared.of(model, replace(target["train"], items=Subset(target["train"].items, chosen)), pairs)
        images, labels = training.images.split(self.batch_size), training.labels.split(self.batch_size)
        contexts = {name: [{"image": part} for part in pairs.read(seen)["image"].split(32)] for name, seen in self.context().items()}
        split_attention(model)

        def loss(adapted: nn.Module, batch: Batch) -> Tensor:
            return ZeroShotClassifier(adapted, training.head)(batch["image"], batch["labels"])["loss"]

        known = torch.cat([data.head for name, data in kept.items() if name != PHOTOGRAPHS])
        generator = torch.Generator().manual_seed(seed)

        def kept_loss(adapted: nn.Module, batch: Batch) -> Tensor:
            logits = ZeroShotClassifier(adapted, known)(batch["image"])["logits"]
            return F.cross_entropy(logits, torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1))

        def measure(adapted: nn.Module) -> dict[str, Score]:
            return {name: class_score(adapted, data) for name, data in ({TARGET: test} | kept).items()}

        return Task(
            model=model,
            layers=learnable_layers(model, select_layers(model, parts=("vision",)), [contexts["shapes"][0]]),
            loss=loss,
            batches=[{"image": some, "labels": numbers} for some, numbers in zip(images, labels, strict=True)],
            contexts=contexts | {TARGET: [{"image": some} for some in images]},
            validate=lambda adapted: class_score(adapted, validation).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=math.log(len(target["train"].class_names)),
            kept_loss=kept_loss,
        )

    def learned(self) -> dict[str, ClassifiedImages]:
        """Return what is learned: "train", "validation" and "test"."""
        if self.photographs is None:
            names = tuple("0123456789")
            splits = {split: ClassifiedImages(TARGET, digits(split), names, (DIGIT_PROMPT,)) for split in ("train", "validation", "test")}
            return splits | {
                "validation": some_of(splits["validation"], self.validation_images),
                "test": some_of(splits["test"], self.test_images),
            }
        data = cifar10(self.photographs)
        order = random.Random(0).sample(range(len(data.items)), len(data.items))
        first, second = self.test_images, self.test_images + self.validation_images
        parts = {"test": order[:first], "validation": order[first:second], "train": order[second:]}
        if not parts["train"]:
            raise ValueError(f"{self.photographs} has {len(order)} rows, all for test and validation; ask for fewer of these.")
        return {part: replace(data, items=Subset(data.items, places)) for part, places in parts.items()}

    def kept(self) -> list[ClassifiedImages]:
        """Return what is to be kept, whole."""
        kept = [shapes("test")]
        if self.data is not None:
            kept += [icons(Path(self.data), name) for name in ("icons_seen", "icons_unseen")]
        if self.kept_photographs is not None:
            kept.append(replace(cifar10(self.kept_photographs), task=PHOTOGRAPHS))
        return kept

    def context(self) -> dict[str, list[Image.Image]]:
        """Return the pictures of the domains to be kept."""
        pictures = {"shapes": [item.image for item in some_of(shapes("train"), self.context_images).items]}
        if self.data is not None:
            table = read_pictures(Path(self.data) / "train.parquet")
            for name, sources in (("icons", STYLES), ("drawings", DRAWINGS)):
                places = [place for place, source in enumerate(table["source"]) if source in sources]
                pictures[name] = [on_white(table[places[number]]["image"]) for number in spread(self.context_images, len(places))]
        return pictures


@dataclass(frozen=True)
class Prepared:
    """Classified images as the model takes them."""

    images: Tensor
    """(n, 3, 64, 64)."""

    labels: Tensor
    """(n,)."""

    head: Tensor
    """(classes, 256), of length 1."""

    @staticmethod
    def of(model: nn.Module, data: ClassifiedImages, pairs: OpenClipPairs) -> "Prepared":
        """Return all images, read once, and the head of their classes."""
        items = [data.items[place] for place in range(len(data.items))]
        labels = torch.tensor([item.label for item in items])
        return Prepared(pairs.read([item.image for item in items])["image"], labels, class_head(model, data, pairs))


def class_score(model: nn.Module, data: Prepared) -> Score:
    """Return cross-entropy and accuracy of the fixed head on the model's features."""
    with evaluating(model):
        classifier = ZeroShotClassifier(model, data.head)
        logits = torch.cat([classifier(images)["logits"] for images in data.images.split(64)])
    return Score.of(F.cross_entropy(logits, data.labels, reduction="none").tolist(), (logits.argmax(-1) == data.labels).tolist())


def digits(split: str) -> list[LabelledImage]:
    """Return the scans of one split."""
    return [LabelledImage(scan.question_id, scan.open_image(), int(scan.answer)) for scan in load_digit_questions(split)]  # type: ignore[arg-type]


def some_of(data: ClassifiedImages, count: int) -> ClassifiedImages:
    """Return at most ``count`` of the images, evenly spread."""
    return replace(data, items=[data.items[place] for place in spread(count, len(data.items))])
