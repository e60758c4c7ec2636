"""Names scored against a cached prefix have the likelihoods of whole texts."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from two_towers import coloured
from vlm.families import build

from corda_eval.zeroshot.images import ClassifiedImages, LabelledImage
from corda_eval.zeroshot.likelihood import classify_by_likelihood, name_scores, name_tokens
from corda_vlm.data.samples import Collator

QUESTION = "what color is the shape ?"
NAMES = ["red", "blue", "green circle", "a red circle", "two blue", "circle in a red shape", "one"]


def pictures(count: int) -> ClassifiedImages:
    items = [LabelledImage(f"p{number}", coloured(number), number % len(NAMES)) for number in range(count)]
    return ClassifiedImages("pictures", items, NAMES)


@torch.no_grad()
def whole_scores(model: Any, processor: Any, data: ClassifiedImages) -> Tensor:
    """Return log p(name | image, question) from one forward pass over the whole text, for each pair."""
    collate = Collator(processor, with_labels=True)
    rows = []
    for item in data.items:
        for name in data.class_names:
            batch = collate([{"image": item.image, "question": QUESTION, "answer": name}])
            labels = batch.pop("labels")[:, 1:]
            result = model(**batch).logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            rows.append((result * (labels >= 0)).sum())
    return torch.stack(rows).reshape(len(data.items), -1)


@pytest.mark.parametrize("rows", [1, 6, 64])
def test_scores_are_those_without_a_cache(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: int) -> None:
    data = pictures(5)
    inputs = Collator(processor)([{"image": item.image, "question": QUESTION} for item in data.items])
    result = name_scores(llava, inputs, name_tokens(NAMES, processor, QUESTION), rows=rows)
    torch.testing.assert_close(result.float(), whole_scores(llava, processor, data), rtol=0, atol=1e-4)


def test_padding_on_the_left_changes_nothing(llava: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    data = pictures(2)
    items = [{"image": item.image, "question": question} for item, question in zip(data.items, (QUESTION, "what ?"), strict=True)]
    names = name_tokens(NAMES, processor, QUESTION)
    both = name_scores(llava, Collator(processor)(items), names)
    for place in (0, 1):
        alone = name_scores(llava, Collator(processor)(items[place : place + 1]), names)
        torch.testing.assert_close(both[place : place + 1], alone, rtol=0, atol=1e-4)


def test_the_likeliest_name_is_the_answer(llava: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    data = pictures(9)
    llava.train()
    result = classify_by_likelihood(llava, data, processor, question=QUESTION, batch_size=4)
    assert llava.training
    expected = whole_scores(llava.eval(), processor, data)
    labels = torch.tensor([item.label for item in data.items])
    assert [record["prediction"] for record in result.records] == expected.argmax(1).tolist()
    assert result.metrics["acc1"] == (expected.argmax(1) == labels).double().mean()
    lengths = torch.tensor([len(token) for token in name_tokens(NAMES, processor, QUESTION)])
    assert result.metrics["acc1_per_token"] == ((expected / lengths).argmax(1) == labels).double().mean()
    assert set(result.metrics) == {"acc1", "acc5", "mean_per_class_recall", "ece", "acc1_per_token", "acc5_per_token"}
    torch.testing.assert_close(
        torch.tensor([record["confidence"] for record in result.records]), expected.softmax(1).max(1).values, rtol=0, atol=1e-4
    )


def test_names_of_one_token_and_names_twice(llava: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    data = replace(pictures(3), class_names=["red", "one", "red", "green", "one"])
    result = classify_by_likelihood(llava, data, processor, question=QUESTION)
    assert all(record["prediction"] in (0, 1, 3) for record in result.records)
    inputs = Collator(processor)([{"image": coloured(0), "question": QUESTION}])
    scores = name_scores(llava, inputs, [torch.tensor([5]), torch.tensor([6])])
    with torch.no_grad():
        torch.testing.assert_close(scores[0].float(), llava(**inputs).logits[0, -1].log_softmax(-1)[[5, 6]])


def test_models_with_their_own_positions_are_refused(processor: LlavaProcessor) -> None:
    model = tiny_llava()
    model.model.rope_deltas = None
    with pytest.raises(ValueError, match="numbers positions in three dimensions"):
        classify_by_likelihood(model, pictures(1), processor, question=QUESTION)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "smolvlm", "paligemma"])
def test_families_whose_images_take_several_tiles_or_read_both_ways(family: str) -> None:
    model, batch = build(family)
    names = [torch.tensor(name) for name in ([9, 2], [10, 11, 2], [12], [13, 14, 15, 2])]
    result = name_scores(model, batch, names, rows=4)
    for place, name in enumerate(names):
        whole = dict(batch)
        whole["input_ids"] = torch.cat([batch["input_ids"], name.repeat(2, 1)], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if family == "paligemma":  # a prompt is read in both directions, an answer from left to right
            whole["token_type_ids"] = torch.cat([batch["token_type_ids"], torch.ones_like(name).repeat(2, 1)], 1)
        with torch.no_grad():
            logits = model(**whole).logits[:, -len(name) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(result[:, place], logits.gather(2, name.repeat(2, 1)[..., None]).sum((1, 2)), rtol=0, atol=1e-4)


def test_a_processor_that_does_not_know_its_patches_is_told(llava: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    old = copy.copy(processor)
    old.patch_size = old.vision_feature_select_strategy = None
    result, expected = (classify_by_likelihood(llava, pictures(3), given, question=QUESTION) for given in (old, processor))
    assert (result.records, result.metrics) == (expected.records, expected.metrics)
