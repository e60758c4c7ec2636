"""Which tokens count for which layer."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corda_core import TokenWeights
from corda_core.collect import attention_mask_of
from corda_vlm.towers import has_two_towers, image_tokens, is_open_clip, known_family


def token_weights(model: nn.Module, weights: Mapping[str, float]) -> TokenWeights:
    """Return how much each token counts for each layer.

    In the language model padding counts nothing, and the tokens of an image and of text as ``weights`` says; in a text tower of open_clip
    what comes behind the token that is read counts nothing; in a vision tower neither do patches that only fill an image up; in a
    projector all tokens count alike.
    """
    placeholders, two_towers = image_tokens(model), has_two_towers(model)
    family = known_family(model)
    if weights["image"] != weights["text"] and not placeholders:
        raise ValueError(
            f'tokens weighs images and text apart, but {type(model).__name__} has no image among its text; leave tokens at "all".'
        )

    def weigh(name: str, batch: Mapping[str, Any]) -> Tensor | None:
        if family is None:
            return None
        part = family.part_of(name)
        if part == "vision":
            return _patch_mask(model, name, batch)
        if part != "language" or (two_towers and not re.search(r"\.(encoder|resblocks)\.", name)):  # a tower's head reads one token
            return None
        mask = _caption_mask(model, batch) if is_open_clip(model) else attention_mask_of(name, batch)
        if weights["image"] == weights["text"]:
            return mask
        is_image = torch.isin(batch["input_ids"], torch.tensor(placeholders, device=batch["input_ids"].device))
        return torch.where(is_image, weights["image"], weights["text"]) * (1 if mask is None else mask)

    return weigh


def _patch_mask(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which patches are part of an image (images, patches), for layers that read patches one by one; None if all are.

    SigLIP 2 gives the mask by patch; Idefics and SmolVLM by pixel (samples, images, H, W), with images of zeros that fill a sample up.
    """
    mask = batch.get("pixel_attention_mask")
    if mask is None or ".encoder." not in name:
        return None
    if mask.ndim == 2:
        return mask
    config: Any = model.config
    size = config.vision_config.patch_size
    pixels = batch["pixel_values"].flatten(0, 1)
    real = mask.flatten(0, 1)[pixels.flatten(1).any(1)]
    patches = real.unfold(1, size, size).unfold(2, size, size)
    return (patches.sum((-1, -2)) > 0).flatten(1)


def _caption_mask(model: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens of open_clip's captions (batch, tokens) can reach the one that is read; None if all can.

    With causal attention that is read at its end-of-text token, the largest id, all behind it is padding.
    """
    tower = getattr(model, "text", model)
    kind = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    pad_id = getattr(getattr(tower, "config", None), "pad_token_id", None)  # a text tower of transformers masks its padding
    if pad_id is not None:
        return batch["text"] != pad_id
    if kind != "argmax" or getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        return None
    text = batch["text"]
    return torch.arange(text.shape[1], device=text.device) <= text.argmax(-1, keepdim=True)
