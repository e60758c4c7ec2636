"""How many samples stand in a batch changes no covariance, no training loss and no answer, in any family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import ABSOLUTE, FAMILIES, build
from test_processors import PROCESSORS, idefics3, items, picture, qwen2_vl, sized, template, tokenizer
from torch import nn

import corda_vlm
from corda_vlm.context import collator_for
from corda_vlm.data.limits import limits_of
from corda_vlm.data.samples import Collator

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*never ran", "ignore:.*ran, but what")

TEXTS = [
    {"question": "what is this ?", "answer": "red"},
    {"question": "what color is a red picture ? what is blue ?", "answer": "a blue picture"},
    {"question": "red ?", "answer": "blue"},
    {"question": "what color ?", "answer": "red red red"},
]
PAIRS = [(picture(20, 16), "a red picture"), (picture(16, 20, "blue"), "blue"), (picture(16, 16), "what is this ? a red picture")]


def llava() -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer(), chat_template=template(), **options)


def clip() -> Any:
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer())


def siglip() -> Any:
    return transformers.SiglipProcessor(transformers.SiglipImageProcessor(size={"height": 16, "width": 16}), tokenizer())


class SiglipSmall(transformers.Siglip2Processor):
    """With four patches of the tiny model's size."""

    def __call__(self, **inputs: Any) -> Any:
        return super().__call__(**inputs, **({"patch_size": 8, "max_num_patches": 4} if "images" in inputs else {}))


def siglip2() -> Any:
    return SiglipSmall(transformers.Siglip2ImageProcessor(), tokenizer())


READERS = {**PROCESSORS, "llava": llava, "qwen2_5_vl": qwen2_vl, "smolvlm": idefics3, "clip": clip, "siglip": siglip, "siglip2": siglip2}


def parts_of(family: str) -> tuple[Any, Any, list[Any]]:
    """Return a model, what reads its samples, and samples of different lengths."""
    if family in ABSOLUTE:
        torch.manual_seed(0)
        return ABSOLUTE[family]().eval(), tokenizer(), TEXTS
    model, reader = build(family)[0], READERS.get(family, tokenizer)()
    if family in ("clip", "siglip", "siglip2"):
        return model, reader, PAIRS
    return (sized(model, reader), reader, items()) if family in READERS else (model, reader, TEXTS)


@pytest.mark.parametrize("family", [*FAMILIES, *ABSOLUTE])
def test_the_batch_size_changes_no_covariance(family: str) -> None:
    model, reader, samples = parts_of(family)
    collected = [corda_vlm.collect_context(model, samples, corda_vlm.CordaConfig(batch_size=size, rank=2), reader) for size in (1, 8)]
    for name, covariance in collected[0].items():
        other, tolerance = collected[1][name], 1e-5 * float(covariance.matrix.norm())
        assert covariance.num_tokens == other.num_tokens
        torch.testing.assert_close(covariance.matrix, other.matrix, rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *ABSOLUTE) if "clip" not in name])
def test_the_batch_size_changes_no_loss(family: str) -> None:
    if family.startswith("siglip"):
        pytest.skip("a contrastive loss is one of the whole batch")
    model, reader, samples = parts_of(family)
    collate = replace(collator_for(model, reader), with_labels=True)

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).loss * (batch["labels"] >= 0).sum()

    torch.testing.assert_close(loss(collate(samples)), sum(loss(collate([sample])) for sample in samples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "llama", "qwen2_vl"])
def test_the_batch_size_changes_no_answer(family: str) -> None:
    model, reader, samples = parts_of(family)
    asked = [{key: value for key, value in sample.items() if key != "answer"} for sample in samples]
    collate = collator_for(model, reader)
    for parameter in model.parameters():  # so that answers differ
        parameter.data.mul_(3)

    def answers(some: list[Any]) -> torch.Tensor:
        batch = collate(some)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        return tokens[:, batch["input_ids"].shape[1] :]

    together = answers(asked)
    assert len(set(map(tuple, together.tolist()))) > 1
    assert torch.equal(together, torch.cat([answers([question]) for question in asked]))


def test_positions_are_told_to_those_who_count_from_the_left() -> None:
    counted = {
        family: limits_of(parts_of(family)[0]) for family in ("gpt2", "gpt_neo", "roberta", "llama", "qwen2_vl", "paligemma", "bloom")
    }
    assert [family for family, limits in counted.items() if limits.needs_positions] == ["gpt2", "gpt_neo"]
    assert counted["roberta"].max_tokens == 64 - 1  # its table begins with padding's place
    assert counted["bloom"].max_tokens is None
    assert limits_of(nn.Linear(2, 2)).max_tokens is None


def test_texts_alone_have_the_token_types_of_a_mixed_batch() -> None:
    model, reader, samples = parts_of("paligemma")
    collate = replace(collator_for(model, reader), with_labels=True)
    mixed, alone = collate(samples), collate(samples[3:])
    length = alone["input_ids"].shape[1]
    assert torch.equal(mixed["token_type_ids"][3, -length:], alone["token_type_ids"][0])
    assert torch.equal(alone["token_type_ids"], (alone["labels"] >= 0).long())


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("length", [None, 6, 500])
def test_captions_are_as_long_as_the_text_tower_reads(family: str, length: int | None) -> None:
    model, reader, _ = parts_of(family)
    if length is not None:
        reader.tokenizer.model_max_length = length
    model.config.text_config.max_position_embeddings = 9
    ids = collator_for(model, reader)([(picture(16, 16), "a red picture " * 20), (picture(16, 16), "red")])["input_ids"]
    assert ids.shape[1] == min(9, length or 9)


def test_what_can_be_told_no_positions_takes_samples_of_one_length() -> None:
    """Bart's decoder counts from the left of a batch: padding would move all tokens behind it."""
    config = transformers.BartConfig(
        vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, pad_token_id=0
    )
    limits = limits_of(transformers.BartForCausalLM(config))
    assert limits.padding_shifts
    assert not any(limits_of(build(family)[0]).padding_shifts for family in FAMILIES)
    collate = Collator(tokenizer(), limits=limits)
    assert len(collate(TEXTS[:1] * 2)["input_ids"]) == 2
    with pytest.raises(ValueError, match="set batch_size to 1"):
        collate(TEXTS)
