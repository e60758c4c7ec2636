"""The image tower of the lab CLIP learns new classes; zero-shot classification of other pictures is to be kept.

Learned: handwritten digits, or the ten classes of a table of photographs. Loss: the cross-entropy (nats) of the zero-shot head: features
of length 1, cosines with the text tower's features of the classes times the logit scale. All heads are those of the untouched model.
Kept: such cross-entropies and accuracies for easy-VQA's shapes (``shapes``: "a red circle", 24 classes); with ``data`` for icons in a style
that pretraining lacked, by names that it had (``icons_seen``) or had not (``icons_unseen``); and for photographs.

What is measured is in no training and no context. Digits: the splits of ``corda_eval.vqa.digits``. Shapes: the test and the training split
of easy-VQA. Icons: ``icons_seen`` and ``icons_unseen`` are of a style of which ``train``, the context, has none. Photographs that are
learned: their rows are shuffled once, the first are for the test, the next for validation, the others for training; photographs that are
kept are in no context.
Calibrated (``calibrated``): pretrained on other pictures, the heads are so sure of themselves that two of the four kept losses are above a
guesser's. Each kept head then has one temperature, at which the loss of the untouched model on the measured items is least, so that it is
at most a guesser's, log(classes); accuracies do not depend on it.
The contexts' loss (``Task.kept_loss``): the cross-entropy of a class drawn from the model's own probabilities, over the names of shapes and
icons; its squared gradients are Fisher's information.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from corda_core.linears import evaluating
from corda_eval.lab.clip import load_lab_clip, on_white, read_pictures
from corda_eval.lab.clip_data import STYLES
from corda_eval.lab.clip_sets import ICON_PROMPT, icons, shapes
from corda_eval.study.settings.shared import batched, drawn, spread
from corda_eval.study.task import TARGET, Batch, Score, Task
from corda_eval.vqa.digits import load_digit_questions
from corda_eval.zeroshot.cifar import cifar10
from corda_eval.zeroshot.classify import class_head
from corda_eval.zeroshot.images import ClassifiedImages, LabelledImage
from corda_vlm.attention import split_attention
from corda_vlm.classifier import ZeroShotClassifier
from corda_vlm.data.pairs import OpenClipPairs
from corda_vlm.options import Count, Place
from corda_vlm.selfwritten import self_context
from corda_vlm.towers import learnable_layers, select_layers

PHOTOGRAPHS = "photographs"
DIGIT_PROMPT = 'the handwritten digit "{}".'
COMPARED = 256
"""Images of each kept thing whose predictions are compared with the base's."""
CAPTIONED = 512
"""Pictures that are learned from which the untouched model captions, where it is asked to write a context itself."""
SHARPEST = 2.0**20
"""As far as a sharpness is looked for."""
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
    kept_photograph_images: Count | None = None
    """Measured of the photographs, at most; None is as many as of the others."""
    test_images: Count = 200
    validation_images: Count = 100
    fresh_contexts: bool = False
    """Whether each seed has contexts of its own."""
    calibrated: bool = False
    """Whether each kept head has a temperature, and the predictions' KL to the base's is measured."""

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
        kept = {data.task: Prepared.of(model, data, pairs) for data in self.kept_parts()}
        kept = {name: data.calibrated(model) if self.calibrated else data for name, data in kept.items()}
        test, validation = (Prepared.of(model, target[part], pairs) for part in ("test", "validation"))
        chosen = drawn(self.steps * self.batch_size, len(target["train"].items), f"train {seed}")
        training = Prepared.of(model, replace(target["train"], items=Subset(target["train"].items, chosen)), pairs)
        images, labels = training.images.split(self.batch_size), training.labels.split(self.batch_size)
        captioned = {name: paired(pairs, seen) for name, seen in self.context(seed).items()}
        contexts = {name: [{"image": batch["image"]} for batch in batches] for name, batches in captioned.items()}
        split_attention(model)
        known = torch.cat([data.head for name, data in kept.items() if name != PHOTOGRAPHS])

        def loss(adapted: nn.Module, batch: Batch) -> Tensor:
            return ZeroShotClassifier(adapted, training.head)(batch["image"], batch["labels"])["loss"]

        def measure(adapted: nn.Module) -> dict[str, Score]:
            return {name: class_score(adapted, data) for name, data in ({TARGET: test} | kept).items()}

        return Task(
            model=model,
            layers=learnable_layers(model, select_layers(model, parts=("vision",)), [contexts["shapes"][0]]),
            loss=loss,
            batches=[{"image": some, "labels": numbers} for some, numbers in zip(images, labels, strict=True)],
            contexts=contexts | {TARGET: [{"image": some} for some in images]},
            pairs=captioned,
            written=partial(self_captioned, pairs=pairs, learned=target["train"], seed=seed),
            validate=lambda adapted: class_score(adapted, validation).loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
            guessing=math.log(len(target["train"].class_names)),
            kept_guessing={name: math.log(len(data.head)) for name, data in kept.items()} if self.calibrated else {},
            kept_kl=partial(kl_from_known, kept) if self.calibrated else None,
            kept_loss=partial(own_class_loss, known, torch.Generator().manual_seed(seed)),
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
        """Return what is to be kept, all of it."""
        kept = [shapes("test")]
        if self.data is not None:
            kept += [icons(Path(self.data), name) for name in ("icons_seen", "icons_unseen")]
        if self.kept_photographs is not None:
            kept.append(replace(cifar10(self.kept_photographs), task=PHOTOGRAPHS))
        return kept

    def kept_parts(self) -> list[ClassifiedImages]:
        """Return what is measured of what is to be kept."""
        count_of = {PHOTOGRAPHS: self.kept_photograph_images or self.kept_images}
        return [some_of(data, count_of.get(data.task, self.kept_images)) for data in self.kept()]

    def context(self, seed: int) -> dict[str, list[tuple[Image.Image, str]]]:
        """Return the pictures of the domains to be kept, with captions."""

        def places(name: str, total: int) -> list[int]:
            count = min(self.context_images, total)
            return drawn(count, total, f"{name} {seed}") if self.fresh_contexts else spread(count, total)

        known = shapes("train")
        chosen = [known.items[place] for place in places("shapes", len(known.items))]
        pictures = {"shapes": [(item.image, known.class_names[item.label]) for item in chosen]}
        if self.data is not None:
            table = read_pictures(Path(self.data) / "train.parquet")
            for name, sources, prompt in (("icons", STYLES, ICON_PROMPT), ("drawings", DRAWINGS, "{}")):
                rows = [row for row, source in enumerate(table["source"]) if source in sources]
                taken = [table[rows[place]] for place in places(name, len(rows))]
                pictures[name] = [(on_white(row["image"]), prompt.format(row["caption"])) for row in taken]
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

    sharpness: float = 1.0
    """What the logits are multiplied by: one over the temperature."""

    known: Tensor | None = None
    """(some, classes): log-probabilities that the untouched model gave some of the images, evenly spread."""

    @staticmethod
    def of(model: nn.Module, data: ClassifiedImages, pairs: OpenClipPairs) -> "Prepared":
        """Return all images, read once, and the head of their classes."""
        items = [data.items[place] for place in range(len(data.items))]
        labels = torch.tensor([item.label for item in items])
        return Prepared(pairs.read([item.image for item in items])["image"], labels, class_head(model, data, pairs))

    def calibrated(self, model: nn.Module) -> "Prepared":
        """Return the same with the sharpness that suits the untouched model, and with what this predicts."""
        logits = self.logits(model, self.images)
        sharpness = fitted_sharpness(logits, self.labels)
        return replace(self, sharpness=sharpness, known=(sharpness * logits[self.compared()]).log_softmax(-1))

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return ``sharpness · scale · cosines`` (n, classes) of a model's features with the fixed head."""
        with evaluating(model):
            classifier = ZeroShotClassifier(model, self.head)
            return self.sharpness * torch.cat([classifier(some)["logits"] for some in images.split(64)])

    def compared(self) -> list[int]:
        """Return the places of the images whose predictions are compared with the base's."""
        return spread(COMPARED, len(self.images))


def fitted_sharpness(logits: Tensor, labels: Tensor) -> float:
    """Return the β ≥ 0 with the least cross-entropy of ``β · logits`` (n, classes): at 0 that is log(classes), and it is convex in β."""
    logits = logits.double()
    right = logits.gather(1, labels[:, None]).mean()

    def slope(beta: float) -> float:
        return float(((beta * logits).softmax(-1) * logits).sum(-1).mean() - right)

    low, high = 0.0, 1.0
    while slope(high) < 0 and high < SHARPEST:
        low, high = high, 2 * high
    for _ in range(40):
        beta = (low + high) / 2
        low, high = (beta, high) if slope(beta) < 0 else (low, beta)
    return low


def kl_from_known(kept: Mapping[str, Prepared], model: nn.Module) -> dict[str, float]:
    """Return by name the mean ``KL(p_base ‖ p)`` over some images of each kept thing, nats, of calibrated predictions."""
    divergence = {}
    for name, data in kept.items():
        assert data.known is not None, "only of what is calibrated"
        log_p = data.logits(model, data.images[data.compared()]).log_softmax(-1)
        divergence[name] = F.kl_div(log_p, data.known, reduction="batchmean", log_target=True).item()
    return divergence


def class_score(model: nn.Module, data: Prepared) -> Score:
    """Return cross-entropy and accuracy of the fixed head on the model's features."""
    logits = data.logits(model, data.images)
    return Score.of(F.cross_entropy(logits, data.labels, reduction="none").tolist(), (logits.argmax(-1) == data.labels).tolist())


def paired(pairs: OpenClipPairs, seen: Sequence[tuple[Image.Image, str]]) -> list[Batch]:
    """Return pictures with their captions, 32 a batch."""
    images, captions = pairs.read([image for image, _ in seen])["image"], pairs.tokenize([caption for _, caption in seen])
    return [{"image": some, "text": texts} for some, texts in zip(images.split(32), captions.split(32), strict=True)]


def self_captioned(model: nn.Module, *, pairs: OpenClipPairs, learned: ClassifiedImages, seed: int) -> list[Batch]:
    """Return pictures that are learned from with the captions that the untouched model gives them, 32 a batch."""
    pictures = [{"image": item.image} for item in some_of(learned, CAPTIONED).items]
    written = self_context(model, pairs, pictures, count=len(pictures), seed=seed)
    return batched(list(written), pairs, 32)


def own_class_loss(known: Tensor, generator: torch.Generator, model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a class drawn from the model's own probabilities, over a head (classes, d)."""
    logits = ZeroShotClassifier(model, known)(batch["image"])["logits"]
    return F.cross_entropy(logits, torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1))


def digits(split: str) -> list[LabelledImage]:
    """Return the scans of one split."""
    return [LabelledImage(scan.question_id, scan.open_image(), int(scan.answer)) for scan in load_digit_questions(split)]  # type: ignore[arg-type]


def some_of(data: ClassifiedImages, count: int) -> ClassifiedImages:
    """Return at most ``count`` of the images, evenly spread."""
    return replace(data, items=[data.items[place] for place in spread(count, len(data.items))])
