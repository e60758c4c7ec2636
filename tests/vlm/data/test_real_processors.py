"""Conversations through the real processor classes of the families that people use, built small here: nothing is downloaded."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import corda_vlm
from corda_core import lora_layers
from corda_vlm.checks import check_image_token
from corda_vlm.context import collator_for
from corda_vlm.data.conversation import image_token
from corda_vlm.data.samples import Collator, _joined

TEXT = "be brief system user assistant what color is this that and why ? red blue it a picture two of them no image"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE {% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
"""A short template of ChatML's kind, for classes whose checkpoints bring theirs."""


def tokenizer(tokens: Mapping[str, str] = MappingProxyType({}), more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, with special tokens by the attributes that a processor asks for ("": it lacks it), and others."""
    extra = {"image_token": "<image>", "video_token": "<video>"} | dict(tokens)
    extra = {name: token for name, token in extra.items() if token}
    special = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *extra.values(), *more])
    names = {name: place for place, name in enumerate([*special, *WORDS, "\n", ":", *map(str, range(10))])}
    backend = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    made: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **made)


def processor(name: str, images: Any, words: Any = None, image: str = "<image>", **options: Any) -> Any:
    """Return a processor by its class, with a template that writes ``image`` for a picture."""
    options = {"chat_template": TEMPLATE.replace("IMAGE", image)} | options
    kind = getattr(transformers, f"{name}Processor")
    if "video_processor" in inspect.signature(kind.__init__).parameters and "video_processor" not in options:
        options["video_processor"] = getattr(transformers, f"{options.pop('video', name)}VideoProcessor")()
    return kind(image_processor=images, tokenizer=words or tokenizer(), **options)


def images_of(name: str, **options: Any) -> Any:
    """Return an image processor by its class."""
    return getattr(transformers, f"{name}ImageProcessor")(**options)


SQUARE = {"height": 16, "width": 16}
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_MORE = ("<|vision_start|>", "<|vision_end|>")
GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
GLM_MORE = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 576}}
GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SPLIT = ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<end_of_utterance>")


def _qwen(name: str, images: str = "Qwen2VL") -> Callable[[], Any]:
    return lambda: processor(
        name,
        images_of(images, **PATCHES),
        tokenizer(QWEN | {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}, QWEN_MORE),
        "<|vision_start|><|image_pad|><|vision_end|>",
        video="Qwen3VL" if name == "Qwen3VL" else "Qwen2VL",
    )


def _glm(name: str) -> Callable[[], Any]:
    return lambda: processor(name, images_of(name, **PATCHES), tokenizer(GLM, GLM_MORE), "<|begin_of_image|><|image|><|end_of_image|>")


def _llava(**options: Any) -> Any:
    sizes = {"size": {"shortest_edge": 16}, "crop_size": SQUARE}
    return processor("Llava", images_of("CLIP", **sizes), patch_size=8, vision_feature_select_strategy="default", **options)


def _internvl() -> Any:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer(names | {"image_token": "<IMG_CONTEXT>"})
    return processor("InternVL", images_of("GotOcr2", size=SQUARE, max_patches=2), words, "<IMG_CONTEXT>", image_seq_length=4)


def _paligemma() -> Any:
    images = images_of("Siglip", size=SQUARE)
    images.image_seq_length = 4
    return processor("PaliGemma", images, chat_template=None)


def _gemma3n() -> Any:
    audio = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    features = transformers.Gemma3nAudioFeatureExtractor()
    words = tokenizer(GEMMA | audio)
    return processor(
        "Gemma3n", images_of("Siglip", size=SQUARE), words, "<image_soft_token>", feature_extractor=features, image_seq_length=4
    )


def _aya() -> Any:
    more = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    images = images_of("GotOcr2", size=SQUARE, max_patches=2)
    return processor("AyaVision", images, tokenizer(more=more), patch_size=8, img_size=16)


def _cohere2() -> Any:
    names = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    words = tokenizer(names | {"img_line_break_token": "<|IMG_LINE_BREAK|>"})
    return processor("Cohere2Vision", images_of("Cohere2Vision", size=SQUARE, max_patches=2, patch_size=4), words, "<|IMG_PATCH|>")


def _lfm2() -> Any:
    more = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *(f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)))
    images = images_of("Lfm2Vl", encoder_patch_size=8, downsample_factor=2, tile_size=32, min_image_tokens=1, max_image_tokens=4)
    return processor("Lfm2Vl", images, tokenizer(more=more))


def _llama4() -> Any:
    more = ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>")
    words = tokenizer({"image_token": "<|image|>"}, more)
    return processor("Llama4", images_of("Llama4", size=SQUARE, max_patches=2), words, "<|image|>", patch_size=4)


def _deepseek() -> Any:
    names = {"image_token": "<image_placeholder>"}
    return processor("DeepseekVL", images_of("DeepseekVL", size=SQUARE), tokenizer(names), "<image_placeholder>", num_image_tokens=4)


def _janus() -> Any:
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return processor("Janus", images_of("Janus", size=SQUARE), tokenizer(names), "<image_placeholder>", num_image_tokens=4)


def _molmo2() -> Any:
    more = ("<im_col>", "<im_end>", "<im_low>", "<im_patch>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<frame_end>")
    words = tokenizer({"image_token": "<|image|>", "video_token": "<|video|>"}, more)
    images = images_of("Molmo2", size=SQUARE, patch_size=4, max_crops=2, overlap_margins=[0, 0], pooling_size=[2, 2])
    return processor("Molmo2", images, words, "<|image|>")


def _got() -> Any:
    words = tokenizer(more=("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>"))
    return processor("GotOcr2", images_of("GotOcr2", size=SQUARE), words, "<img><imgpad></img>")


def _blip2() -> Any:
    return transformers.Blip2Processor(images_of("Blip", size=SQUARE), tokenizer({"image_token": ""}), num_query_tokens=4)


def _instructblip() -> Any:
    return transformers.InstructBlipProcessor(
        images_of("Blip", size=SQUARE), tokenizer({"image_token": ""}), qformer_tokenizer=tokenizer(), num_query_tokens=4
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "Llava": _llava,
    "LlavaNext": lambda: processor(
        "LlavaNext",
        images_of("LlavaNext", size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=[[16, 32], [32, 16]]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    "LlavaOnevision": lambda: processor(
        "LlavaOnevision",
        images_of("LlavaOnevision", size=SQUARE, image_grid_pinpoints=[[16, 32], [32, 16]]),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    ),
    "VideoLlava": lambda: processor("VideoLlava", images_of("VideoLlava", size={"shortest_edge": 16}, crop_size=SQUARE), patch_size=8),
    "Qwen2VL": _qwen("Qwen2VL"),
    "Qwen2_5_VL": _qwen("Qwen2_5_VL"),
    "Qwen3VL": _qwen("Qwen3VL"),
    "Glm4v": _glm("Glm4v"),
    "Glm46V": _glm("Glm46V"),
    "Idefics2": lambda: processor(
        "Idefics2",
        images_of("Idefics2", do_image_splitting=False, size={"shortest_edge": 16, "longest_edge": 32}),
        tokenizer({"image_boundary_token": SPLIT[0]}, SPLIT),
        image_seq_len=4,
    ),
    "Idefics3": lambda: processor(
        "Idefics3",
        images_of("Idefics3", do_image_splitting=False, size={"longest_edge": 16}, max_image_size={"longest_edge": 16}),
        tokenizer(more=SPLIT),
        image_seq_len=4,
    ),
    "PaliGemma": _paligemma,
    "Gemma3": lambda: processor("Gemma3", images_of("Gemma3", size=SQUARE), tokenizer(GEMMA), "<start_of_image>", image_seq_length=4),
    "Gemma3n": _gemma3n,
    "InternVL": _internvl,
    "Mllama": lambda: processor(
        "Mllama",
        images_of("Mllama", size=SQUARE, max_image_tiles=2),
        tokenizer({"image_token": "<|image|>"}, ["<|python_tag|>"]),
        "<|image|>",
    ),
    "Pixtral": lambda: processor(
        "Pixtral",
        images_of("Pixtral", patch_size=8, size={"longest_edge": 32}),
        tokenizer({"image_token": "[IMG]"}, ["[IMG_BREAK]", "[IMG_END]"]),
        "[IMG]",
        patch_size=8,
    ),
    "Lfm2Vl": _lfm2,
    "AyaVision": _aya,
    "Cohere2Vision": _cohere2,
    "Ovis2": lambda: processor(
        "Ovis2",
        images_of("Ovis2", size=SQUARE),
        tokenizer(more=("<IMG_COL>", "<IMG_END>", "<IMG_ROW>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>")),
        image_seq_length=4,
    ),
    "PerceptionLM": lambda: processor(
        "PerceptionLM", images_of("PerceptionLM", tile_size=16, max_num_tiles=1, size=SQUARE), patch_size=4, pooling_ratio=2
    ),
    "Llama4": _llama4,
    "DeepseekVL": _deepseek,
    "Janus": _janus,
    "Aria": lambda: processor("Aria", images_of("Aria", max_image_size=490), size_conversion={490: 4, 980: 4}),
    "Molmo2": _molmo2,
    "GotOcr2": _got,
    "Blip2": _blip2,
    "InstructBlip": _instructblip,
}
FEW = ("Llava", "Qwen2_5_VL", "Gemma3", "Mllama")
"""Those of the default run."""
ONE_IMAGE = ("PaliGemma", "Blip2", "InstructBlip", "GotOcr2")
"""They read one image a sample."""
each_family = pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS]
)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Return a picture of noise."""
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def rows(family: str) -> list[dict[str, Any]]:
    """Return rows of zero, one and two images, with a system turn, several turns, and in each form that rows have."""
    two = [picture(16, 16, 2), picture(32, 16, 3)]
    parts = [{"type": "image"}, {"type": "text", "text": "what color is this ?"}]
    return [
        {
            "image": picture(32, 16, 0),
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "why ?"},
                {"role": "assistant", "content": "it is red"},
            ],
        },
        {"image": two[:1], "question": "<image> what is that ?", "answer": "a blue picture"}
        if family in ONE_IMAGE
        else {"image": two, "question": "<image> and <image> what is that ?", "answer": "a blue picture"},
        {"messages": [{"role": "user", "content": "what is red ?"}, {"role": "assistant", "content": "a color"}]},
        {
            "image": picture(16, 32, 4),
            "conversations": [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "blue"}],
        },
    ]


ANSWERS = ["red it is red", "a blue picture", "a color", "blue"]


@each_family
def test_labels_are_the_responses_and_nothing_else(family: str) -> None:
    made = PROCESSORS[family]()
    batch = Collator(made, with_labels=True)(rows(family))
    shown = [made.tokenizer.decode(row[row != -100]).split() for row in batch["labels"]]
    assert [" ".join(word for word in words if word in WORDS) for words in shown] == ANSWERS
    learned = batch["labels"] != -100
    assert not learned.all(1).any()
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert not (batch["input_ids"][learned] == made.tokenizer.convert_tokens_to_ids(image_token(made))).any()


@each_family
def test_a_batch_is_its_rows_one_by_one(family: str) -> None:
    made = PROCESSORS[family]()
    collate = Collator(made, with_labels=True)
    together, alone = collate(rows(family)), [collate([row]) for row in rows(family)]
    for key in together:
        values = [row[key] for row in alone if key in row]
        if together[key].shape[:2] == together["input_ids"].shape:
            for joined, value in zip(together[key], values, strict=True):
                torch.testing.assert_close(joined[len(joined) - value.shape[1] :], value[0])
        else:
            torch.testing.assert_close(together[key], _joined(values))
    assert all(isinstance(value, Tensor) for value in together.values())


QUESTIONS = [("what color ?", 0), ("<image> what color ?", 1), ("<image> and <image> what color ?", 2)]


@each_family
def test_text_and_images_become_what_the_processor_makes_of_them(family: str) -> None:
    made = PROCESSORS[family]()
    for question, count in QUESTIONS[: 2 if family in ONE_IMAGE else 3]:
        pictures = [picture(16 * (place + 1), 16, place) for place in range(count)]
        asked = Collator(made)([{"image": pictures, "question": question}])
        answered = Collator(made)([{"image": pictures, "question": question, "answer": "red"}])
        length = asked["input_ids"].shape[1]
        assert torch.equal(answered["input_ids"][:, :length], asked["input_ids"])  # training reads what generation does
        assert any(key.startswith("pixel") for key in asked) == bool(count)
        if count:  # what an image's many tokens are, is what the model's config names
            repeated = int(asked["input_ids"].flatten().mode().values)
            check_image_token(SimpleNamespace(config=SimpleNamespace(image_token_id=repeated)), made)
        if made.chat_template is None:
            continue
        pieces = question.split("<image>")
        parts = [part for piece in pieces for part in ({"type": "image"}, {"type": "text", "text": piece}) if part.get("text") != ""][1:]
        parts = parts if count else [{"type": "text", "text": question}]
        text = made.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
        own = made(text=text, images=pictures, return_tensors="pt") if count else made.tokenizer([text], return_tensors="pt")
        assert asked["input_ids"].tolist() == own["input_ids"].tolist()
        for key in set(own) & set(asked):
            torch.testing.assert_close(asked[key], torch.as_tensor(own[key]), check_dtype=False)


def test_an_encoder_reads_the_question_and_a_decoder_writes_the_answer() -> None:
    made = PROCESSORS["Gemma3"]()  # T5Gemma 2's
    collate = Collator(made, with_labels=True, writes=True)
    batch = collate(rows("Gemma3"))
    written = [made.tokenizer.decode(row[row != -100]).split() for row in batch["labels"]]
    assert [" ".join(word for word in words if word in WORDS) for words in written] == ["it is red", *ANSWERS[1:]]
    read = [made.tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [text.endswith("assistant") for text in read] == [True] * 4
    assert "red" in read[0]  # an earlier answer
    assert "blue" not in read[1]
    assert bool(batch["attention_mask"][:, 0].all())  # padded on the right
    assert bool((batch["labels"][:, 0] != -100).all())
    alone = [collate([row]) for row in rows("Gemma3")]
    for place, row in enumerate(alone):
        for key in ("input_ids", "attention_mask", "token_type_ids", "labels"):
            assert torch.equal(batch[key][place, : row[key].shape[1]], row[key][0])


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran")
def test_an_encoder_decoder_is_prepared_and_trained_from_samples() -> None:
    made = processor(
        "Gemma3", images_of("Gemma3", size={"height": 32, "width": 32}), tokenizer(GEMMA), "<start_of_image>", image_seq_length=4
    )
    model: Any = tiny_model("t5gemma2", "T5Gemma2ForConditionalGeneration")
    for config in (model.config, model.config.encoder):
        config.image_token_index = config.image_token_id = made.tokenizer.image_token_id
    collate = replace(collator_for(model, made), with_labels=True)
    batch = collate(rows("Gemma3"))
    with torch.no_grad():
        logits = model(**batch).logits
        for place, row in enumerate(rows("Gemma3")):
            alone = model(**collate([row])).logits[0]
            torch.testing.assert_close(logits[place, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    adapted = corda_vlm.prepare(model, rows("Gemma3"), processor=made, rank=2, parts=["vision", "projector", "language"])
    assert any(".decoder." in f".{name}" for name in lora_layers(adapted))
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, logits)
    losses = corda_vlm.fine_tune(adapted, rows("Gemma3"), made, steps=20, batch_size=4, learning_rate=1e-2, seed=0)
    assert losses[-1][1] < losses[0][1]
