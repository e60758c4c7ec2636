"""Zero-shot classification: the head, the logits and the accuracy are open_clip's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import Subset
from two_towers import coloured, hugging_clip, hugging_siglip, open_clips, real
from vlm.families import build

import corda_vlm
from corda_eval.zeroshot.cifar import CIFAR10, TEMPLATES, cifar10
from corda_eval.zeroshot.classify import class_head, classify_images, cosine_batches, image_features
from corda_eval.zeroshot.folders import table
from corda_eval.zeroshot.imagenet import names, templates
from corda_eval.zeroshot.images import ClassifiedImages, LabelledImage, image_batches
from corda_eval.zeroshot.tally import Tally
from corda_vlm.data.sources import DataConfig

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran")


def cosines_of(
    model: Any, head: torch.Tensor, data: ClassifiedImages, pairs: Any, *, dtype: Any = None, batch_size: int = 256
) -> torch.Tensor:
    batches = image_batches(data.items, pairs.read, batch_size=batch_size, dtype=dtype)
    return torch.cat([cosines for _, _, cosines in cosine_batches(model, head, data, batches, dtype=dtype)])


def pictures(count: int = 12) -> ClassifiedImages:
    items = [LabelledImage(f"p{number}", coloured(number), number % 3) for number in range(count)]
    return ClassifiedImages("pictures", items, ["red", "blue thing", "green"], ["a {}.", "the {}!"])


def test_the_head_is_open_clips_with_imagenets_names_and_prompts() -> None:
    model, pairs = open_clips()
    chosen = [names()[number] for number in (0, 134, 517, 657, 744, 836, 837)]
    data = ClassifiedImages("imagenet", [], chosen, templates())
    expected = open_clip.build_zero_shot_classifier(model, pairs.tokenizer, chosen, open_clip.OPENAI_IMAGENET_TEMPLATES)  # type: ignore[attr-defined]
    head = class_head(model, data, pairs)
    torch.testing.assert_close(head, expected.T, rtol=0, atol=1e-6)
    assert torch.equal(head[3], head[4])
    assert torch.equal(head[5], head[6])
    assert len(names()) == 1000
    assert len(templates()) == 80


def open_clips_accuracy(logits: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...]) -> list[float]:
    """Return open_clip's ``accuracy`` of a batch, from its definition: the share whose label is among the k largest."""
    result = logits.topk(max(topk), 1, True, True)[1] == target[:, None]
    return [result[:, :k].any(1).double().mean().item() for k in topk]


def test_accuracy_on_photographs_is_open_clips() -> None:
    data = cifar10(real("cifar10-test.parquet"))
    data = replace(data, items=Subset(data.items, range(0, 5000, 25)))  # sorted by class
    model, pairs = open_clips()
    result = classify_images(model, data, pairs, batch_size=64, workers=2)
    classifier = open_clip.build_zero_shot_classifier(model, pairs.tokenizer, CIFAR10, TEMPLATES)  # type: ignore[attr-defined]
    images = torch.stack([pairs.preprocess(item.image) for item in data.items])  # type: ignore[attr-defined]
    labels = torch.tensor([item.label for item in data.items])
    with torch.no_grad():
        features, _, scale = model(images)
    logits = 100.0 * features @ classifier
    cosines = cosines_of(model, class_head(model, data, pairs), data, pairs, batch_size=64)
    torch.testing.assert_close(100.0 * cosines, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cosines, features @ classifier, rtol=0, atol=1e-6)
    acc1, acc5 = open_clips_accuracy(logits, labels, (1, 5))
    assert result.metrics["acc1"] == pytest.approx(acc1, abs=1e-9)
    assert result.metrics["acc5"] == pytest.approx(acc5, abs=1e-9)
    assert labels.bincount().tolist() == [20] * 10
    hits = logits.argmax(1) == labels
    recalls = [hits[labels == number].double().mean() for number in labels.unique()]
    assert result.metrics["mean_per_class_recall"] == pytest.approx(torch.stack(recalls).mean().item(), abs=1e-9)
    confidence = (scale * features @ classifier).softmax(1).max(1).values
    assert result.metrics["ece"] == pytest.approx(calibration_error(confidence, hits), abs=1e-5)
    assert result.metrics["ece_scale_100"] == pytest.approx(calibration_error(logits.softmax(1).max(1).values, hits), abs=1e-5)
    assert result.num_examples == 200
    assert result.records[7]["answer"] == labels[7]
    assert result.examples_per_second > 0


def test_a_thousand_classes_and_their_photographs() -> None:
    data = table(DataConfig(str(real("imagenet1k-sample.parquet")), limit=40), class_names=names(), templates=templates()[:2])
    model, pairs = open_clips()
    expected = open_clip.build_zero_shot_classifier(model, pairs.tokenizer, names(), templates()[:2])  # type: ignore[attr-defined]
    head = class_head(model, data, pairs)
    torch.testing.assert_close(head, expected.T, rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = model(torch.stack([pairs.preprocess(item.image) for item in data.items]))[0] @ expected  # type: ignore[attr-defined]
    result = cosines_of(model, head, data, pairs, batch_size=16)
    torch.testing.assert_close(result, logits, rtol=0, atol=1e-6)
    assert [record["answer"] for record in classify_images(model, data, pairs).records] == [item.label for item in data.items]


def calibration_error(confidences: torch.Tensor, hits: torch.Tensor) -> float:
    """Return the error from its definition, bin by bin."""
    total = 0.0
    for lower in range(15):
        inside = (confidences >= lower / 15) & ((confidences < (lower + 1) / 15) | (lower == 14))
        if inside.any():
            total += inside.double().mean().item() * abs(hits[inside].double().mean() - confidences[inside].double().mean()).item()
    return total


@pytest.mark.parametrize("make", [hugging_clip, hugging_siglip])
def test_transformers_models_give_the_same_logits_as_their_forward(make: Any) -> None:
    model, pairs = make()
    data = replace(pictures(), templates=["{}"])
    cosines = cosines_of(model, class_head(model, data, pairs), data, pairs, batch_size=5)
    with torch.no_grad():
        output = model(**pairs.read([item.image for item in data.items]), **pairs.tokenize(list(data.class_names)))
    expected = output.logits_per_image - getattr(model, "logit_bias", torch.zeros(1))
    torch.testing.assert_close(model.logit_scale.exp() * cosines, expected, rtol=0, atol=1e-5)
    result = classify_images(model, data, pairs)
    labels = torch.tensor([item.label for item in data.items])
    assert result.metrics["acc1"] == (expected.argmax(1) == labels).double().mean()
    assert "acc5" not in result.metrics


def test_images_of_any_shape_come_with_their_masks() -> None:
    model, batch = build("siglip2")
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    with torch.no_grad():
        expected = model(**batch).image_embeds
    torch.testing.assert_close(image_features(model, inputs), expected)


def test_adapted_models_are_evaluated_as_they_are() -> None:
    model, pairs = open_clips()
    data = pictures()
    adapted = corda_vlm.prepare(model, [(coloured(number), "red") for number in range(4)], rank=2, processor=pairs)
    before = classify_images(adapted, data, pairs)
    assert before.scores == classify_images(open_clips()[0], data, pairs).scores
    adapted.train()
    classify_images(adapted, data, pairs)
    assert adapted.training


def test_of_equal_logits_the_lowest_class_comes_first() -> None:
    tally = Tally()
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0, -1.0]] * 4)
    tally.add(list("abcd"), torch.tensor([1, 2, 4, 5]), logits, {})
    result = tally.result("ties", 6, 1.0)
    assert tally.predictions == [1, 1, 1, 1]
    assert tally.ranks == [0, 1, 4, 5]
    assert result.metrics == {"acc1": 0.25, "acc5": 0.75, "mean_per_class_recall": 0.25}


def test_names_twice_tie_exactly() -> None:
    model, pairs = hugging_clip()
    data = pictures()
    doubled = replace(data, class_names=["blue thing", "red", "red", "green", "blue thing"])
    for cosines in cosines_of(model, class_head(model, doubled, pairs), doubled, pairs, batch_size=5).split(5):
        assert torch.equal(cosines[:, 1], cosines[:, 2])
        assert torch.equal(cosines[:, 0], cosines[:, 4])


def test_a_group_of_classes_answers_with_its_best() -> None:
    model, pairs = hugging_clip()
    data = replace(pictures(), class_names=["red", "blue thing", "green", "grey"], groups=[[0, 3], [1], [2]])
    head = class_head(model, data, pairs)
    plain = cosines_of(model, head, replace(data, groups=None), pairs)
    grouped = cosines_of(model, head, data, pairs)
    assert torch.equal(grouped, torch.stack([plain[:, [0, 3]].amax(1), plain[:, 1], plain[:, 2]], 1))
    assert classify_images(model, data, pairs).num_examples == 12


def test_lower_precision_is_close() -> None:
    model, pairs = open_clips()
    data = pictures()
    head = class_head(model, data, pairs, dtype=torch.bfloat16)
    assert head.dtype == torch.float32
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(3))
    result = cosines_of(model, head, data, pairs, dtype=torch.bfloat16)
    exact = cosines_of(model, class_head(model, data, pairs), data, pairs)
    torch.testing.assert_close(result, exact, rtol=0, atol=0.03)


def test_what_cannot_be_scored_is_named() -> None:
    model, pairs = hugging_clip()
    with pytest.raises(ValueError, match="pictures has no images"):
        classify_images(model, replace(pictures(), items=[]), pairs)
    with pytest.raises(ValueError, match="p2 has the label 2; expected 0 to 1"):
        classify_images(model, replace(pictures(), class_names=["red", "blue"]), pairs)
    with pytest.raises(ValueError, match="0 template"):
        classify_images(model, replace(pictures(), templates=[]), pairs)
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="of image p0 are not all finite"):
        classify_images(model, pictures(), pairs)
