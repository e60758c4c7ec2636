"""Fused attention split and fused again; open_clip and timm models."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

import corda_vlm
from corda_core import lora_layers
from corda_vlm.attention import SplitAttention, fuse_attention, split_attention
from corda_vlm.towers import family_of

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*never ran", "ignore:.*of no family")

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}


def clip(**vision: Any) -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=16, vision_cfg={**VISION, **vision}, text_cfg=TEXT).eval()


def custom_text_clip() -> Any:
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg={**TEXT, "pool_type": "argmax"}).eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate((5, 8, 12)):
        text[row, :length] = torch.randint(10, 400, (length,), generator=generator)
        text[row, 0], text[row, length - 1] = 49406, 49407
    return {"image": torch.randn(3, 3, 16, 16, generator=generator), "text": text}


def features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        image, text, _ = model(**inputs)
    return torch.cat([image, text])


@pytest.mark.parametrize("make", [clip, custom_text_clip])
def test_splitting_and_fusing_is_the_identity(make: Any) -> None:
    model, inputs = make(), batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = features(model, inputs)
    assert split_attention(model) == 4
    assert sum(isinstance(module, SplitAttention) for module in model.modules()) == 4
    torch.testing.assert_close(features(model, inputs), expected, rtol=1e-5, atol=1e-6)
    model.train()
    split = model(**inputs)[0]
    model.eval()
    assert fuse_attention(model) == 4
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(features(model, inputs), expected)
    model.train()
    torch.testing.assert_close(model(**inputs)[0], split, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 12}, {"bias": False}, {"batch_first": False}])
def test_every_shape_of_torch_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleList([nn.MultiheadAttention(16, 4, **{"batch_first": True, **options})])
    query, key, value = torch.randn(3, 5, 16), torch.randn(3, 7, options.get("kdim", 16)), torch.randn(3, 7, options.get("vdim", 16))
    if options.get("batch_first") is False:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    forbidden = torch.rand(5, 7) > 0.7
    forbidden[:, 0] = False
    masks = (None, forbidden, torch.where(forbidden, -torch.inf, 0.0))
    expected = [holder[0](query, key, value, need_weights=False, attn_mask=mask)[0] for mask in masks]
    assert split_attention(holder) == 1
    for mask, output in zip(masks, expected, strict=True):
        torch.testing.assert_close(holder[0](query, key, value, need_weights=False, attn_mask=mask)[0], output, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="weights were asked for"):
        holder[0](query, key, value, need_weights=True)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"inner_norm": True}, {"qkv_bias": False}])
def test_attention_of_open_clip(options: dict[str, Any]) -> None:
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    holder = nn.ModuleList([Attention(16, 4, **options)])
    x, mask = torch.randn(3, 5, 16), torch.full((5, 5), -torch.inf).triu(1)
    expected = holder[0](x), holder[0](x, attn_mask=mask)
    assert split_attention(holder) == 1
    torch.testing.assert_close((holder[0](x), holder[0](x, attn_mask=mask)), expected, rtol=1e-5, atol=1e-6)
    assert fuse_attention(holder) == 1
    assert torch.equal(holder[0](x), expected[0])


def test_attention_that_computes_something_else_is_left_alone() -> None:
    from open_clip.transformer import Attention

    holder = nn.ModuleList(
        [Attention(16, 4, scaled_cosine=True), Attention(16, 4, scale_heads=True), nn.MultiheadAttention(16, 4, add_bias_kv=True)]
    )
    assert split_attention(holder) == 0


@pytest.mark.parametrize("make", [clip, custom_text_clip])
@pytest.mark.parametrize("protect", ["start", "strict"])
def test_open_clip_from_preparation_to_a_normal_checkpoint(make: Any, protect: str) -> None:
    model, inputs = make(), batch()
    keys = list(model.state_dict())
    expected = features(model, inputs)
    pictures = [(Image.new("RGB", (16, 16), (20 * i, 90, 255 - 20 * i)), f"picture {i}") for i in range(12)]

    def preprocess(image: Image.Image) -> Tensor:
        return torch.tensor(list(image.tobytes()), dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1) / 255

    def tokenizer(captions: list[str]) -> Tensor:
        rows = [[49406, *[ord(letter) for letter in caption[:10]], 49407] for caption in captions]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    adapted = corda_vlm.prepare(model, pictures, rank=2, processor=corda_vlm.OpenClipPairs(preprocess, tokenizer), protect=protect)
    layers = lora_layers(adapted)
    assert len(layers) == 4 * 6  # two towers of two blocks: q, k, v, out and two of the MLP
    assert {family_of(model).part_of(name) for name in layers} == {"vision", "language"}
    torch.testing.assert_close(features(adapted, inputs), expected, rtol=1e-5, atol=1e-6)
    image, text, scale = adapted(**inputs)
    nn.functional.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    for name, layer in layers.items():
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0, name
        layer.lora_B["default"].weight.data += 0.01
    tuned = features(adapted, inputs)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    merged = corda_vlm.merge(adapted)
    assert list(merged.state_dict()) == keys
    torch.testing.assert_close(features(merged, inputs), tuned, rtol=1e-5, atol=1e-5)
    fresh = make()
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(features(fresh, inputs), features(merged, inputs), rtol=1e-5, atol=1e-6)  # torch has two paths


@pytest.mark.parametrize("options", [{"parts": ["language"]}, {"parts": ["vision"]}, {"budget": "rank"}, {"variant": "corda++"}])
def test_names_that_end_alike_in_both_towers(options: dict[str, Any], tmp_path: Any) -> None:
    """``transformer.….c_fc`` is also the end of ``visual.transformer.….c_fc``, and PEFT goes by ends."""
    model, inputs = clip(), batch()
    inputs = {key: value.repeat(30, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    inputs["image"] = torch.randn(inputs["image"].shape)
    adapted = corda_vlm.prepare(model, [inputs] * 5, rank=3, **options, **({"candidates": 1} if "variant" in options else {}))
    layers = lora_layers(adapted)
    assert {family_of(model).part_of(name) for name in layers} == set(options.get("parts", ["vision", "language"]))
    for layer in layers.values():
        layer.lora_B["default"].weight.data += 0.02
    expected = features(adapted, inputs)
    corda_vlm.export(adapted, tmp_path)
    fresh = clip()
    split_attention(fresh)
    torch.testing.assert_close(features(PeftModel.from_pretrained(fresh, tmp_path), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_images_are_converted_for_a_tower_of_lower_precision(precision: torch.dtype) -> None:
    model = clip().to(precision)
    pictures = [(Image.new("RGB", (16, 16), (20 * i, 90, 9)), "a") for i in range(4)]
    adapted = corda_vlm.prepare(
        model,
        pictures,
        rank=2,
        processor=corda_vlm.OpenClipPairs(lambda _: torch.randn(3, 16, 16), lambda captions: batch()["text"][:1].repeat(len(captions), 1)),
    )
    assert len(lora_layers(adapted)) == 24


def test_padding_of_captions_does_not_count() -> None:
    model = clip()
    split_attention(model)
    config = corda_vlm.CordaConfig(parts=["language"], targets=["q_proj"])
    covariances = corda_vlm.collect_context(model, [batch()], config)
    assert {covariance.num_tokens for covariance in covariances.values()} == {5 + 8 + 12}


def test_fusing_under_an_adapter_is_refused() -> None:
    model = clip()
    adapted = corda_vlm.prepare(model, [batch()], rank=2)
    with pytest.raises(ValueError, match="still carries an adapter; merge"):
        fuse_attention(adapted)


def test_timm_tower() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5
    ).eval()
    inputs = {"x": torch.randn(8, 3, 32, 32)}
    expected = model(**inputs)
    adapted = corda_vlm.prepare(model, [inputs], rank=2, targets=["qkv", "attn.proj", "fc1", "fc2"])
    assert torch.equal(adapted(**inputs), expected)
    assert {name.rpartition(".")[2] for name in lora_layers(adapted)} == {"qkv", "proj", "fc1", "fc2"}
    assert not any("patch_embed" in name for name in lora_layers(adapted))
    torch.testing.assert_close(corda_vlm.merge(adapted)(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_open_clip_with_a_timm_tower() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    model = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).eval()
    inputs = {**batch(), "image": torch.randn(3, 3, 224, 224)}
    expected = features(model, inputs)
    adapted = corda_vlm.prepare(model, [inputs], rank=2, parts=["vision"])
    torch.testing.assert_close(features(adapted, inputs), expected, rtol=1e-5, atol=1e-6)
    kinds = {name.rpartition(".")[2] for name in lora_layers(adapted)}
    assert {"qkv", "proj", "fc1", "fc2"} <= kinds
    assert corda_vlm.merge(adapted).state_dict().keys() == open_clip.CustomTextCLIP(16, vision, TEXT).state_dict().keys()
