"""One tiny random model of each family, with a batch of its inputs; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 7, 8
Batch = dict[str, Any]


def ids(num_images: int, tokens: int = 4, seed: int = 0) -> Tensor:
    """Return two rows of random text with the tokens of one image (or none) each."""
    text = torch.randint(10, 64, (2, 12), generator=torch.Generator().manual_seed(seed))
    if not num_images:
        return text
    image = torch.tensor([[VISION_START, *[IMAGE] * tokens, VISION_END]]).expand(2, -1)
    return torch.cat([text[:, :3], image, text[:, 3:]], dim=1)


def batch_of(input_ids: Tensor, **more: Any) -> Batch:
    """Return a batch without padding."""
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **more}


def pixels(*shape: int) -> Tensor:
    """Return random pixel values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def llava() -> tuple[nn.Module, Batch]:
    """LLaVA 1.5 on a CLIP tower."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config), batch_of(ids(1), pixel_values=pixels(2, 3, 16, 16))


def llava_next() -> tuple[nn.Module, Batch]:
    """LLaVA-NeXT: each image as a whole and as tiles."""
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    # 4 tokens of the whole image, and two tiles side by side: 2 x 4 tokens and a line break after each of 2 rows.
    return model, batch_of(ids(1, 14), pixel_values=pixels(2, 3, 3, 16, 16), image_sizes=torch.tensor([[16, 32], [16, 32]]))


def llava_onevision() -> tuple[nn.Module, Batch]:
    """LLaVA-OneVision on a SigLIP tower and Qwen2."""
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return model, batch_of(ids(1, 14), pixel_values=pixels(2, 3, 3, 16, 16), image_sizes=torch.tensor([[16, 32], [16, 32]]))


def _qwen_batch(dim: int) -> Batch:
    input_ids = ids(1, 4)
    return batch_of(
        input_ids,
        pixel_values=pixels(2 * 16, dim),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]),
        mm_token_type_ids=(input_ids == IMAGE).long(),
    )


def _qwen_tokens() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def qwen2_vl() -> tuple[nn.Module, Batch]:
    """Qwen2-VL: fused qkv in the vision blocks, patches in one long row."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "mlp_ratio": 2}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_tokens())
    return transformers.Qwen2VLForConditionalGeneration(config), _qwen_batch(3 * 2 * 4 * 4)


def qwen2_5_vl() -> tuple[nn.Module, Batch]:
    """Qwen2.5-VL: windows, gated MLPs in the vision blocks."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_tokens())
    return transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_batch(3 * 2 * 4 * 4)


def _idefics_batch() -> Batch:
    # 16 / 4 = 4 x 4 patches, 2 x 2 of them in one token.
    images = pixels(2, 2, 3, 16, 16)
    images[1, 1] = 0  # fills the sample up
    mask = torch.ones(2, 2, 16, 16, dtype=torch.long)
    mask[1, 1] = 0
    mask[0, 1, :, 12:] = 0
    input_ids = torch.cat([ids(1, 4), torch.tensor([[IMAGE] * 4, [9] * 4])], dim=1)
    return batch_of(input_ids, pixel_values=images, pixel_attention_mask=mask)


def smolvlm() -> tuple[nn.Module, Batch]:
    """SmolVLM: connector, text_model."""
    config = transformers.SmolVLMConfig(
        image_token_id=IMAGE,
        scale_factor=2,
        vision_config={**VISION, "patch_size": 4},
        text_config={"model_type": "llama", **TEXT},
        tie_word_embeddings=False,
    )
    return transformers.SmolVLMForConditionalGeneration(config), _idefics_batch()


def idefics3() -> tuple[nn.Module, Batch]:
    """Idefics3."""
    config = transformers.Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=2,
        vision_config={**VISION, "patch_size": 4},
        text_config={"model_type": "llama", **TEXT},
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config), _idefics_batch()


def paligemma() -> tuple[nn.Module, Batch]:
    """PaliGemma: SigLIP and Gemma."""
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False, "projection_dim": 32},
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        image_token_id=IMAGE,
        projection_dim=32,
    )
    input_ids = ids(1)
    return transformers.PaliGemmaForConditionalGeneration(config), batch_of(
        input_ids, pixel_values=pixels(2, 3, 16, 16), token_type_ids=torch.zeros_like(input_ids)
    )


def _two_towers(**more: Any) -> Batch:
    return {**batch_of(torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))), **more}


def clip() -> tuple[nn.Module, Batch]:
    """CLIP of transformers."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = transformers.CLIPConfig(
        text_config={**text, "projection_dim": 16}, vision_config={**VISION, "projection_dim": 16}, projection_dim=16
    )
    return transformers.CLIPModel(config), _two_towers(pixel_values=pixels(2, 3, 16, 16))


def siglip() -> tuple[nn.Module, Batch]:
    """SigLIP, with its pooling head."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    config = transformers.SiglipConfig(text_config={**text, "projection_size": 24}, vision_config=VISION)
    batch = _two_towers(pixel_values=pixels(2, 3, 16, 16))
    del batch["attention_mask"]
    return transformers.SiglipModel(config), batch


def siglip2() -> tuple[nn.Module, Batch]:
    """SigLIP 2: patches with a mask."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    vision = {**VISION, "num_patches": 4}
    config = transformers.Siglip2Config(text_config={**text, "projection_size": 24}, vision_config=vision)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = _two_towers(pixel_values=pixels(2, 4, 3 * 8 * 8), pixel_attention_mask=mask, spatial_shapes=torch.tensor([[2, 2], [1, 2]]))
    del batch["attention_mask"]
    return transformers.Siglip2Model(config), batch


def _causal(name: str, **more: Any) -> Callable[[], tuple[nn.Module, Batch]]:
    def make() -> tuple[nn.Module, Batch]:
        kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
        config = getattr(transformers, kind)(**{**TEXT, **more})
        return getattr(transformers, f"{name}ForCausalLM")(config), batch_of(ids(0))

    return make


def gpt2() -> tuple[nn.Module, Batch]:
    """GPT-2, whose layers are Conv1D."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), batch_of(ids(0))


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "paligemma": paligemma,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "llama": _causal("Llama"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=8),
    "gemma2": _causal("Gemma2", head_dim=8),
    "gemma3": _causal("Gemma3", head_dim=8),
    "mistral": _causal("Mistral", sliding_window=None),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "gpt2": gpt2,
}


def _absolute(name: str, model: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(
        getattr(transformers, f"{name}Config")(vocab_size=64, bos_token_id=1, eos_token_id=2, **more)
    )


SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
ABSOLUTE: dict[str, Callable[[], nn.Module]] = {
    "bert": _absolute("Bert", "BertLMHeadModel", **WIDE, intermediate_size=48, is_decoder=True),
    "biogpt": _absolute("BioGpt", "BioGptForCausalLM", **WIDE, intermediate_size=48),
    "bloom": _absolute("Bloom", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "ctrl": _absolute("CTRL", "CTRLLMHeadModel", **SMALL, dff=48),
    "gpt_bigcode": _absolute("GPTBigCode", "GPTBigCodeForCausalLM", **SMALL),
    "gpt_neo": _absolute(
        "GPTNeo",
        "GPTNeoForCausalLM",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=4,
    ),
    "mpt": _absolute("Mpt", "MptForCausalLM", d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "openai-gpt": _absolute("OpenAIGPT", "OpenAIGPTLMHeadModel", **SMALL),
    "opt": _absolute("OPT", "OPTForCausalLM", **WIDE, ffn_dim=48, word_embed_proj_dim=32),
    "roberta": _absolute("Roberta", "RobertaForCausalLM", **WIDE, intermediate_size=48, is_decoder=True),
    "xglm": _absolute("XGLM", "XGLMForCausalLM", **{**WIDE, "d_model": 32, "num_layers": 2, "attention_heads": 4}, ffn_dim=48),
}
"""Causal language models without rotary positions: learned ones, fixed ones, or distances (ALiBi), each counted in its own way."""


def build(family: str) -> tuple[nn.Module, Batch]:
    """Return the family's model, the same on each call, and its batch."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family]()
    return model.eval(), batch
