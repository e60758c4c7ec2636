"""A tiny random model of any type that transformers knows, from its config class alone, with rows of its inputs; nothing is downloaded."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

Row = dict[str, Any]

SIZES: tuple[tuple[str, int], ...] = (
    (r".*head_dim|rotary_dim|d_kv|head_size|d_head|.*_d_head", 16),
    (r"vocab_size|.*_vocab_size|vocab_size_.*", 128),
    (r".*lora_rank", 16),
    (r".*num_experts_per_tok(en)?|.*top_k_experts|moe_k|moe_top_?k|num_selected_experts|.*experts_per_tok", 2),
    (r"(n_group|topk_group|num_expert_group|num_expert_groups|mamba_n_groups|n_groups|num_groups)", 1),
    (r".*(num_|n_)(local_|routed_)?experts|num_moe_experts|moe_num_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r".*num_(hidden_)?layers|n_layers?|.*depth|num_blocks|num_.*_layers|(encoder|decoder)_layers|layers|L", 2),
    (r".*(attention_heads|attn_heads|num_heads)|n_heads?|num_.*_heads|.*_heads|heads", 2),
    (r".*(intermediate_size|ffn_dim|d_ff|mlp_dim|mlp_hidden_size|ffn_hidden_size|n_inner|intermediate_dim)|dff|inner_dim", 48),
    (
        r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|projection_dim|projection_size|embedding_size)|word_embed_proj_dim|output_proj_dims|adapter_out_dim|width|dim|hidden",
        32,
    ),
    (r".*state_size|.*d_state|ssm_state_size", 8),
    (r"image_size|img_size|resolution", 32),
    (r"num_query_tokens|latent_query_num", 4),
    (r"mm_tokens_per_image", 4),
    (r"codebook_size|num_embeddings", 8),
    (r"patch_size", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|seq_length", 256),
)
"""What a number of a config is lowered to, by the first pattern that its name matches whole."""

IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": 5, "video": 6, "audio": 7, "sep": 3, "cls": 4, "mask": 8}
"""Tokens with a meaning; further ones follow from 9 on, and words from 40 on."""
IMAGE, WORDS, VOCABULARY = 5, 40, 128


class Ids(dict[str, int]):
    """Small numbers for special tokens, a new one for each new name."""

    def __missing__(self, name: str) -> int:
        self[name] = max(8, *self.values()) + 1
        return self[name]


def smaller(values: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    """Return a config's values with everything small, its layers of one kind thinned to the first of each."""
    values = {
        key: value for key, value in values.items() if key not in ("transformers_version", "architectures", "dtype", "id2label", "label2id")
    }
    count = next((values[key] for key in LAYERS if isinstance(values.get(key), int)), 0)
    kept = _kinds(values, count)
    heads = next((values[key] for key in ("num_attention_heads", "num_heads", "n_heads") if isinstance(values.get(key), int)), 0)
    grouped = {
        key: 1 if value < heads else 2 for key, value in values.items() if re.search("(key_value|kv)_heads", key) and type(value) is int
    }
    return grouped | {key: _smaller(key, value, count, kept, ids) for key, value in values.items() if key not in grouped}


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers")


def _kinds(values: Mapping[str, Any], count: int) -> list[int]:
    """Return the first layer of each kind, at least two."""
    lists = [value for value in values.values() if isinstance(value, (list, tuple)) and len(value) == count and count]
    own = values.get("per_layer_config") or {}
    kinds: dict[Any, int] = {}
    for index in range(count):
        kinds.setdefault((*(str(one[index]) for one in lists if isinstance(one[index], (str, bool))), str(index) in map(str, own)), index)
    kept = sorted(kinds.values())
    return kept if len(kept) > 1 else [0, 1][: count or 2]


def _smaller(key: str, value: Any, count: int, kept: list[int], ids: Ids) -> Any:
    if value is None and (key == "head_dim" or re.fullmatch(r"(image|video|audio)_token_(id|index)", key)):
        return 16 if key == "head_dim" else ids[key.partition("_")[0]]
    if isinstance(value, bool) or value is None:
        return value
    if key == "per_layer_config":
        return {kept.index(int(index)): smaller(own, ids) for index, own in value.items() if int(index) in kept}
    if key in LAYERS and kept:
        return len(kept)
    if isinstance(value, Mapping):
        return dict(value) if "rope" in key or not all(isinstance(each, str) for each in value) else smaller(value, ids)
    if re.search(r"(_|^)token_(id|index)s?$", key):
        name = re.split(r"_token_(?:id|index)", key)[0]
        return [ids[f"{name}{place}"] for place in range(len(value))] if isinstance(value, list) else ids[name] if value >= 0 else value
    if isinstance(value, (list, tuple)):
        if count and len(value) == count:
            return [_smaller(key, value[index], 0, [], ids) for index in kept]
        if value and all(isinstance(one, int) and not isinstance(one, bool) for one in value) and re.search(r"index|layer", key):
            return list(range(min(len(value), len(kept)))) if min(value) >= 0 else [-1, -2][: len(value)]
        return list(value)
    if isinstance(value, int):
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value)
        return min(value, size) if value > 0 else value
    return value


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}}


TILES = [[32, 64], [64, 32]]
OVERRIDES: dict[str, dict[str, Any]] = {
    # What the default config leaves open, or its model takes from a checkpoint's.
    **{
        kind: {"text_config": _rope(4, 2, 2)}
        for kind in ("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl", "hunyuan_vl", "paddleocr_vl")
    },
    "glm4v_moe": {"text_config": _rope(2, 1, 1, partial_rotary_factor=0.5)},
    "ernie4_5_vl_moe": {"text_config": _rope(3, 3, 2)},
    "cohere_compass": {
        "text_config": {"rope_parameters": {kind: _rope(4, 2, 2)["rope_parameters"] for kind in ("full_attention", "sliding_attention")}}
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1]},
        "vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + place)}Z": 20 + place for place in range(8)}},
    },
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1]}},
    "emu3": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1]},
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 9, **{f"<|visual token {place:06d}|>": 20 + place for place in range(8)}},
    },
    "diffusion_gemma": {"canvas_length": 6, "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    },
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "vision_config": {"hidden_size": 64},
        "image_grid_pinpoints": TILES,
    },
    "perception_lm": {
        "projector_pooling_ratio": 1,
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 64,
                "img_size": [28, 28],
                "depth": 2,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [2, 2],
            },
        },
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 8, "text_config": _rope(4, 2, 2)},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 8},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {"text_config": {"sliding_window": 4}},
    # Sizes that follow from others.
    "apertus1p5": {
        "image_token_offset": 100,
        "audio_token_offset": 108,
        "audio_config": {"codebook_dim": 32, "num_filters": 2},
        "vision_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1]},
    },
    "fast_vlm": {
        "vision_config": {
            "hidden_size": 256,
            "model_args": {
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [8, 16, 32, 64, 128],
                "mlp_ratios": [1, 1, 1, 1, 1],
                "inference_mode": True,
            },
        }
    },
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "videoprism": {"vision_config": {"tubelet_size": [1, 8, 8]}},
    "dots3_note": {
        "text_config": {"per_layer_config": {2: {"head_dim": 32}, 3: {"head_dim": 32}}},
        "vision_config": {"adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "florence2": {
        "vision_config": {"depths": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2]}
    },
    "gemma3n": {
        "text_config": {"num_kv_shared_layers": 0},
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256},
        "vision_soft_tokens_per_image": 1,
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "instructblipvideo": {"video_token_index": IMAGE},
    "align": {"projection_dim": 640},
    "blip-2": {"qformer_config": {"use_qformer_text_input": True}},
    "tipsv2": {"vision_config": {"out_features": ["stage2"], "out_indices": [2]}},
    "llama4": {"vision_config": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}},
    "llava_next": {"image_grid_pinpoints": TILES},
    "llava_next_video": {"image_grid_pinpoints": TILES},
    "llava_onevision": {"image_grid_pinpoints": TILES},
    "molmo2": {"image_patch_id": IMAGE, "vision_config": {"image_size": [32, 32], "num_position_embeddings": 16}},
    "mistral4": {"qk_rope_head_dim": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1], "pad_token_id": 0},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "num_global_layers": 2},
    },
}
"""What a type's small config must have besides."""

PRESENT: dict[str, dict[str, Any]] = {kind: {"vision_config": {}} for kind in ("gemma4", "gemma4_unified", "diffusion_gemma")}
"""What a type's config must be made with before it is lowered."""


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with others over them, at any depth."""
    own = {key: merged(values.get(key) or {}, value) if isinstance(value, Mapping) else value for key, value in more.items()}
    return {**values, **own}


def tiny_config(kind: str, config_class: type | None = None) -> Any:
    """Return a small config of a type."""
    config_class = config_class or CONFIG_MAPPING[kind]
    values = config_class(**PRESENT.get(kind, {})).to_dict()
    return config_class(**merged(_with_mrope(smaller(values, Ids(IDS))), OVERRIDES.get(kind, {})))


def _with_mrope(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with sections of rotary positions that add up to half of the small heads' rotated sizes."""
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping):
        sections = rope.get("mrope_section")
        if sections:
            size = values.get("qk_rope_head_dim") or values.get("head_dim") or 16
            half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
            values["rope_parameters"] = {
                **rope,
                "mrope_section": [half - (len(sections) - 1) * (half // 3), *[half // 3] * (len(sections) - 1)],
            }
    return {key: _with_mrope(value) if isinstance(value, dict) and "model_type" in value else value for key, value in values.items()}


def tiny_model(kind: str, class_name: str) -> nn.Module:
    """Return a random model of the type, the same on each call, no parameter of which is zero: gates that start closed are open."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, class_name)(tiny_config(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.05 * noise)
    return model


def text(seed: int, length: int) -> Tensor:
    """Return a row of random words."""
    return torch.randint(WORDS, VOCABULARY - 8, (1, length), generator=torch.Generator().manual_seed(seed))


def noise(seed: int, *shape: int) -> Tensor:
    """Return random pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vision_of(config: Any) -> Any:
    """Return the config of the vision tower."""
    return next((getattr(config, key) for key in ("vision_config", "encoder_config", "encoder") if getattr(config, key, None)), config)


def _size(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])


def image_of(kind: str, model: Any, seed: int) -> Row:
    """Return the arguments that are one image, by the names that the model's forward gives them."""
    names = inspect.signature(type(model).forward).parameters
    vision = vision_of(model.config)
    if kind in IMAGES:
        return IMAGES[kind](vision, seed)
    patch = _size(getattr(vision, "patch_size", 8))
    if "image_grid_thw" in names:
        depth = 3 * getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * patch**2
        return {"pixel_values": noise(seed, 16, depth), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if "spatial_shapes" in names:
        mask = torch.ones(1, 16, dtype=torch.long)
        return {"pixel_values": noise(seed, 1, 16, 3 * patch**2), "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": mask}
    size = _size(getattr(vision, "image_size", 32))
    image: Row = {"pixel_values": noise(seed, 1, 3, size, size)}
    if "pixel_attention_mask" in names:
        image = {"pixel_values": noise(seed, 1, 1, 3, size, size), "pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.long)}
    if "image_sizes" in names:
        image["image_sizes"] = torch.tensor([[size, size]])
    return image


def _grid(*shape: int, **more: Any) -> Callable[[Any, int], Row]:
    return lambda _, seed: {"pixel_values": noise(seed, *shape), **{key: torch.tensor([value]) for key, value in more.items()}}


def _patches(key: str, size: int) -> Callable[[Any, int], Row]:
    """Return flattened patches, the first two numbers of each its row and column."""
    places = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], dim=-1)[None]
    return lambda _, seed: {key: torch.cat([places.float(), noise(seed, 1, 16, size)], dim=-1)}


def _positions(_: Any, seed: int) -> Row:
    places = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], dim=-1)[None]
    return {"pixel_values": noise(seed, 1, 16, 3 * 64), "image_position_ids": places}


def _boxes(row: Row) -> dict[str, Any]:
    low = torch.rand(1, row["input_ids"].shape[1], 2, generator=torch.Generator().manual_seed(0)) / 2
    return {"bbox": torch.cat([low, low + 0.3], dim=-1)}


ALL = torch.ones(1, 1, dtype=torch.bool)
IMAGES: dict[str, Callable[[Any, int], Row]] = {
    "deepseek_vl_hybrid": lambda _, seed: {"pixel_values": noise(seed, 1, 3, 32, 32), "high_res_pixel_values": noise(seed, 1, 3, 32, 32)},
    "diffusion_gemma": _positions,
    "fast_vlm": _grid(1, 3, 128, 128),  # which its tower makes 32 times smaller
    "fuyu": _grid(1, 16, 192),
    "gemma4": _positions,
    "gemma4_unified": lambda vision, seed: {**_positions(vision, seed), "pixel_values": noise(seed, 1, 16, 3 * 24 * 24)},
    "granite_docling": lambda _, seed: {"pixel_values": noise(seed, 1, 1, 3, 32, 32), "pixel_attention_mask": ALL},
    "idefics": _grid(1, 1, 3, 32, 32),
    "inkling2": _grid(4, 16, 16, 3, image_grid_thw=[1, 2, 2]),
    "inkling2_loop": _grid(4, 16, 16, 3, image_grid_thw=[1, 2, 2]),
    "inkling_mm_model": _grid(4, 2, 8, 8, 3),
    "instructblip": lambda _, seed: {"pixel_values": noise(seed, 1, 3, 32, 32), "qformer_input_ids": text(seed + 5, 6 - seed)},
    "instructblipvideo": lambda _, seed: {"pixel_values": noise(seed, 1, 2, 3, 32, 32), "qformer_input_ids": text(seed + 5, 6 - seed)},
    "kimi_k25": _grid(16, 3, 8, 8, image_grid_thw=[1, 4, 4]),
    "kosmos-2.5": _patches("flattened_patches", 32),
    "llava": _grid(1, 3, 32, 32),
    **{
        kind: _grid(1, 3, 3, 32, 32, image_sizes=[32, 64])
        for kind in ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")
    },
    **{kind: _grid(1, 3, 8, 128, target_sizes=[4, 4]) for kind in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "mllama": _grid(1, 1, 4, 3, 32, 32, aspect_ratio_ids=[1], aspect_ratio_mask=[[1, 1, 1, 1]]),
    "molmo2": lambda _, seed: {
        "pixel_values": noise(seed, 1, 16, 192),
        "image_token_pooling": torch.arange(16).view(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    },
    "nemotron_h_omni": _grid(16, 192, image_grid_hw=[4, 4]),
    "paddleocr_vl": _grid(16, 3, 8, 8, image_grid_thw=[1, 4, 4]),
    "perception_lm": _grid(1, 1, 3, 28, 28),
    "pi0": lambda _, seed: {"pixel_values": noise(seed, 1, 1, 3, 32, 32), "pixel_attention_mask": ALL},
    "pix2struct": _patches("flattened_patches", 32),
    "video_llama_3": _grid(16, 192, image_grid_thw=[1, 4, 4], image_merge_sizes=2),
    "videoprism": lambda _, seed: {"pixel_values_videos": noise(seed, 1, 16, 3, 32, 32)},
}
"""Images in forms of a type's own."""

TOKENS: dict[str, int] = {
    "deepseek_vl": 16,
    "deepseek_vl_hybrid": 16,
    "janus": 16,
    "mllama": 1,
    "fuyu": 16,
    "pi0": 16,
    "udop": 0,
    "blip-2": 4,
    "instructblip": 4,
    "instructblipvideo": 8,
    "diffusion_gemma": 1,
    "perception_lm": 4,
    "emu3": 20,
    "dots3_note": 4,
    "granite4_vision": 14,
}
"""How many tokens an image has, where ``get_image_features`` does not tell."""


def count_tokens(kind: str, model: Any, image: Row) -> int:
    """Return how many tokens of the text an image has."""
    if kind in TOKENS:
        return TOKENS[kind]
    if not hasattr(model, "get_image_features") or hasattr(model, "get_text_features"):
        return 0
    with torch.no_grad():
        features = model.get_image_features(**image)
    features = (
        getattr(features, "pooler_output", features) if getattr(features, "pooler_output", 0) is not None else features.last_hidden_state
    )
    rows = torch.cat([each.flatten(0, -2) for each in features]) if isinstance(features, (list, tuple)) else features.flatten(0, -2)
    return len(rows)


def rows_of(kind: str, model: Any, lengths: tuple[int, ...] = (12, 9)) -> list[Row]:
    """Return rows of different length, each with an image if the model sees any, each a batch of one."""
    names = inspect.signature(type(model).forward).parameters
    rows = []
    if hasattr(model, "get_text_features"):  # pairs of an image and a caption, which are read to one length
        lengths = (lengths[0],) * len(lengths)
    for seed, length in enumerate(lengths):
        image = image_of(kind, model, seed) if _sees(names, kind) else {}
        words = text(seed, length)
        count = count_tokens(kind, model, image) if image else 0
        ids = torch.cat([words[:, :3], torch.full((1, count), IMAGE), words[:, 3:]], dim=1)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
        is_image = (ids == IMAGE).long()
        row |= {name: is_image for name in ("mm_token_type_ids", "token_type_ids") if name in names and image}
        if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
            row |= {"decoder_input_ids": text(seed + 9, 6), "decoder_attention_mask": torch.ones(1, 6, dtype=torch.long)}
        rows.append({key: value for key, value in (row | MORE.get(kind, lambda row: {})(row)).items() if value is not None})
    return rows


def _sees(names: Mapping[str, Any], kind: str) -> bool:
    return kind in IMAGES or any(name in names for name in ("pixel_values", "flattened_patches", "pixel_values_videos"))


def _where_images(row: Row) -> dict[str, Any]:
    return {"image_embeds_position_mask": (row["input_ids"] == IMAGE).long()}


NO_TEXT: dict[str, Any] = {"input_ids": None, "attention_mask": None}
MORE: dict[str, Callable[[Row], dict[str, Any]]] = {
    "diffusion_gemma": lambda row: {
        "decoder_input_ids": text(7, 6),
        "decoder_attention_mask": torch.cat([row["attention_mask"], torch.ones(1, 6, dtype=torch.long)], dim=1),
        "decoder_position_ids": row["input_ids"].shape[1] + torch.arange(6)[None],
        "self_conditioning_logits": noise(8, 1, 6, VOCABULARY),
    },
    "idefics": lambda row: {"image_attention_mask": torch.ones(1, row["input_ids"].shape[1], 1, dtype=torch.long)},
    "instructblip": lambda row: {"qformer_attention_mask": torch.ones_like(row["qformer_input_ids"])},
    "instructblipvideo": lambda row: {"qformer_attention_mask": torch.ones_like(row["qformer_input_ids"])},
    "kosmos-2": _where_images,
    "kosmos-2.5": _where_images,
    "mllama": lambda row: {"cross_attention_mask": torch.ones(1, row["input_ids"].shape[1], 1, 4, dtype=torch.long)},
    "pi0": lambda row: {
        "state": noise(3, 1, 32),
        "noise": noise(4, 1, 50, 32),
        "timestep": torch.tensor([0.5]),
        "actions": noise(5, 1, 50, 32),
    },
    "pix2struct": lambda row: {"input_ids": None, "attention_mask": torch.ones(1, 16, dtype=torch.long)},
    "pp_formulanet": lambda row: NO_TEXT,
    "udop": _boxes,
    "vision-encoder-decoder": lambda row: NO_TEXT,
}
"""What else a type's rows have, or (None) lack."""


def batch_of(rows: list[Row]) -> Row:
    """Return rows as one batch, those that are shorter padded behind."""
    batch = {key: _joined(key, rows) for key in rows[0]}
    both = batch.get("decoder_attention_mask")
    if both is not None and both.shape != batch["decoder_input_ids"].shape:  # what the encoder read, then what the decoder writes
        batch["decoder_attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(batch["decoder_input_ids"])], dim=1)
    return batch


def _joined(key: str, rows: list[Row]) -> Any:
    values = [row[key] for row in rows]
    if not isinstance(values[0], Tensor):
        return values[0]
    if key == "image_token_pooling":  # places among all patches of the batch
        return torch.cat([value + 16 * place for place, value in enumerate(values)])
    if key == "pixel_values" and "target_sizes" in rows[0]:  # patches side by side
        return torch.cat(values, dim=-1)
    longest = max(value.shape[1] if value.ndim > 1 else 0 for value in values)
    if key.startswith(("pixel", "flattened")) or all(value.ndim < 2 or value.shape[1] == longest for value in values):
        return torch.cat(values)
    return torch.cat([torch.cat([value, value.new_zeros(1, longest - value.shape[1], *value.shape[2:])], dim=1) for value in values])
