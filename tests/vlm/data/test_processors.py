"""Samples through the real processors of each family: tokens of images, labels, padding; and ``prepare`` from samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import IMAGE, VIDEO, VISION_END, VISION_START, build
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import corda_vlm
from corda_core import lora_layers
from corda_vlm.data.samples import Collator

SPECIAL = {
    "<pad>": 0,
    "<s>": 1,
    "</s>": 2,
    "<unk>": 3,
    "<image>": IMAGE,
    "<video>": VIDEO,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
    "<fake_token_around_image>": 9,
    "<global-img>": 10,
    "<row_1_col_1>": 11,
    "<end_of_utterance>": 12,
}
WORDS = ["\n", "user", "assistant", "what", "color", "is", "this", "?", "red", "blue", "a", "picture"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE {% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def tokenizer(qwen: bool = False) -> PreTrainedTokenizerFast:
    names = {**SPECIAL, **{word: 20 + place for place, word in enumerate(WORDS)}}
    if not qwen:
        names = {name: number for name, number in names.items() if "vision" not in name}
    names |= {f"<unused{number}>": number for number in range(max(names.values())) if number not in names.values()}
    backend = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([name for name in SPECIAL if name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>", "boi_token": "<|vision_start|>"},
    )


def template(image: str = "<image>") -> str:
    return TEMPLATE.replace("IMAGE", image)


def llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
        ),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(),
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]),
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template(),
    )


def qwen2_vl() -> Any:
    return transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(
            patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 24 * 24}
        ),
        tokenizer(qwen=True),
        transformers.Qwen2VLVideoProcessor(),
        chat_template=template("<|vision_start|><image><|vision_end|>"),
    )


def idefics3() -> Any:
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(do_image_splitting=False, size={"longest_edge": 16}, max_image_size={"longest_edge": 16}),
        tokenizer(),
        image_seq_len=4,
        chat_template=template(),
    )


def paligemma() -> Any:
    images = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, tokenizer())


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "idefics3": idefics3,
    "paligemma": paligemma,
}


def picture(width: int, height: int, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def items() -> list[dict[str, Any]]:
    """Wide, tall and square images, two in one sample, and none."""
    return [
        {"image": picture(32, 16), "question": "what color is this ?", "answer": "red"},
        {"image": picture(16, 32, "blue"), "question": "what color is this ?", "answer": "a blue picture"},
        {"image": [picture(16, 16), picture(24, 16)], "question": "<image> <image> what is this ?", "answer": "red"},
        {"image": None, "question": "what is red ?", "answer": "a color"},
    ]


def sized(model: Any, processor: Any) -> Any:
    """Return the model with room for the tokens that a processor added."""
    model.resize_token_embeddings(max(64, len(processor.tokenizer)))
    return model


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*ran, but what")
@pytest.mark.parametrize("family", PROCESSORS)
def test_samples_become_batches_and_adapters(family: str) -> None:
    processor = PROCESSORS[family]()
    model = sized(build(family)[0], processor)
    batch = Collator(processor, with_labels=True)(items())
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    per_image = (batch["input_ids"] == IMAGE).sum(1)
    assert per_image[3] == 0
    assert (per_image[:3] > 0).all()
    with torch.no_grad():
        loss = model(**batch).loss
    assert torch.isfinite(loss)
    # A batch is its samples one by one: nothing of a sample depends on what stands beside it.
    model.eval()
    with torch.no_grad():
        together = model(**{key: value for key, value in Collator(processor)(items()).items()}).logits[:, -1]
        alone = torch.cat([model(**Collator(processor)([item])).logits[:, -1] for item in items()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    adapted = corda_vlm.prepare(model, items(), processor=processor, rank=2, parts=["vision", "projector", "language"])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-6, atol=1e-6)
    adapted(**batch).loss.backward()
    assert all(layer.lora_B["default"].weight.grad is not None for layer in lora_layers(adapted).values())


@pytest.mark.parametrize("family", PROCESSORS)
def test_each_family_writes_a_context_that_it_reads(family: str) -> None:
    processor = PROCESSORS[family]()
    model = sized(build(family)[0], processor).eval()
    written = corda_vlm.self_context(model, processor, items(), count=16, max_tokens=12)
    batch = Collator(processor)([*written])
    assert len(batch["input_ids"]) == 16
    assert int(((batch["input_ids"] == IMAGE).sum(1) > 0).sum()) == sum("image" in item for item in written) >= 12
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("family", PROCESSORS)
def test_labels_are_the_responses(family: str) -> None:
    processor = PROCESSORS[family]()
    batch = Collator(processor, with_labels=True)(items()[:2])
    shown = [processor.tokenizer.decode(row[row != -100]).split() for row in batch["labels"]]
    assert [[word for word in words if word not in SPECIAL] for words in shown] == [["red"], ["a", "blue", "picture"]]


@pytest.mark.parametrize("family", PROCESSORS)
def test_pairs_of_image_and_text(family: str) -> None:
    processor = PROCESSORS[family]()
    model = sized(build(family)[0], processor)
    batch = Collator(processor)([(picture(16, 16), "a red picture"), (None, "a blue picture")])
    if family == "qwen2_vl":
        assert (batch["input_ids"] == VISION_START).sum() == (batch["input_ids"] == VISION_END).sum() == 1
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_weights_of_image_tokens_reach_the_language_model(family: str) -> None:
    processor = PROCESSORS[family]()
    model = sized(build(family)[0], processor)
    batch = Collator(processor)(items())
    image = int((batch["input_ids"] == IMAGE).sum())
    both = int(batch["attention_mask"].sum())
    for tokens, expected in (("image", image), ("text", both - image), ("all", both)):
        covariances = corda_vlm.collect_context(model, items(), corda_vlm.CordaConfig(tokens=tokens, rank=2), processor)
        assert {covariance.num_tokens for covariance in covariances.values()} == {expected}


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran")
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_images_and_captions(family: str) -> None:
    if family == "clip":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        processor: Any = transformers.CLIPProcessor(images, tokenizer())
    else:
        processor = transformers.SiglipProcessor(transformers.SiglipImageProcessor(size={"height": 16, "width": 16}), tokenizer())
        processor.tokenizer.model_max_length = 16
    model, _ = build(family)
    pairs = [(picture(20, 16, "red"), "a red picture"), {"image": picture(16, 20, "blue"), "caption": "blue"}]
    adapted = corda_vlm.prepare(model, pairs, processor=processor, rank=2)
    assert any(name.startswith("text_model") for name in lora_layers(adapted))
    assert any(name.startswith("vision_model") for name in lora_layers(adapted))
    losses = corda_vlm.fine_tune(adapted, pairs, processor, steps=30, batch_size=2, learning_rate=1e-2, seed=0)
    assert losses[-1][1] < losses[0][1]
