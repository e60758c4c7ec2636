"""Which tokens count for which layer."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core import TokenWeights
from corda_core.collect import attention_mask_of
from corda_vlm.towers import has_two_towers, image_tokens, is_open_clip, known_family

TokenMasks = Tensor | tuple[Tensor | None, ...] | None
IGNORED = -100
"""What labels say of a token that is not learned."""


def token_weights(model: nn.Module, weights: Mapping[str, float]) -> TokenWeights:
    """Return how much each token counts for each layer.

    In the language model padding counts nothing, and the tokens of an image and of text as ``weights`` says; in a text tower of open_clip
    what comes behind the token that is read counts nothing; in a vision tower neither do patches that only fill an image up; in a
    projector all tokens of images count alike. A decoder beside an encoder has the mask of what it writes, and cross-attention that of
    what it reads; a Q-former that of its own text beside its queries.
    """
    placeholders, two_towers = image_tokens(model), has_two_towers(model)
    if weights["image"] != weights["text"] and not placeholders:
        raise ValueError(
            f'tokens weighs images and text apart, but {type(model).__name__} has no image among its text; leave tokens at "all".'
        )
    family, decoder = known_family(model), _decoder_of(model)
    known: list[tuple[Tensor, bool]] = []  # of the last masks: asking waits for the device, and all layers have the same

    def has_padding(mask: Tensor) -> bool:
        found = next((padded for other, padded in known if other is mask), None)
        if found is None:
            found = not bool(mask.all())
            known[:] = [*known[-1:], (mask, found)]
        return found

    def weigh(name: str, batch: Mapping[str, Any]) -> TokenMasks:
        if family is None:
            return None
        part = family.part_of(name)
        if part == "vision":
            return _patch_mask(model, name, batch)
        if "qformer." in name:
            return _qformer_masks(model, name, batch)
        if part == "projector":
            return _own_tokens(model, name, batch, placeholders)
        if part != "language" or (two_towers and not re.search(r"\.(encoder|resblocks)\.", name)):  # a tower's head reads one token
            return None
        masks = (_caption_mask(model, batch),) if is_open_clip(model) else _text_masks(model, decoder, name, batch)
        if weights["image"] == weights["text"]:
            padded = tuple(mask for mask in masks if mask is not None)
            return padded if any(has_padding(mask) for mask in padded) else None
        is_image = torch.isin(batch["input_ids"], torch.tensor(placeholders, device=batch["input_ids"].device))
        apart = torch.where(is_image, weights["image"], weights["text"])
        return tuple(
            apart * (1 if mask is None else mask) if mask is None or mask.shape == apart.shape else weights["text"] * mask for mask in masks
        )

    return weigh


CROSS = re.compile(r"(cross|encoder_attn|encdec|encoder_decoder)[^.]*\.(.*\.)?(k|v|key|value)(_proj)?$", re.IGNORECASE)
"""Layers that read what another part of the model gives them, not the tokens of their own."""


def _decoder_of(model: Any) -> str:
    """Return the name of the module that transformers says decodes; "" if it is the whole model, or there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _text_masks(model: Any, decoder: str, name: str, batch: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """Return which tokens count for a layer that reads text; where it may read either of two texts, of different lengths, both masks."""
    read = attention_mask_of(name, batch)
    if read is not None and getattr(getattr(model, "config", None), "model_type", "") == "git" and "pixel_values" in batch:
        vision = model.config.vision_config  # GIT puts the patches and a class token before the text
        read = F.pad(read, ((vision.image_size // vision.patch_size) ** 2 + 1, 0), value=1)
    writes = "decoder_input_ids" in batch or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if name.startswith("model.dit."):  # pi0's actions
        return (None,)
    if CROSS.search(name):  # the tokens of an encoder, or else an image's
        return (read if writes else None,)
    if not writes or not name.startswith(f"{decoder}."):
        return (read,)
    labels = batch.get("labels")
    written = batch.get("decoder_attention_mask", None if labels is None else labels != IGNORED)
    if written is None:
        written = torch.ones_like(batch["decoder_input_ids"])
    elif "decoder_input_ids" in batch:
        written = written[:, -batch["decoder_input_ids"].shape[1] :]  # DiffusionGemma's begins with what the encoder read
    return (written,) if read is None else (written, read)  # T5Gemma 2's decoder reads both with the same layers


QUERIES = re.compile(r"crossattention|(intermediate|output)_query")
"""Layers of a Q-former that read nothing but its queries, or an image by them."""


def _qformer_masks(model: Any, name: str, batch: Mapping[str, Any]) -> TokenMasks:
    """Return which tokens count for a layer of a Q-former, which reads text beside its queries (InstructBLIP) or by itself (BLIP-2)."""
    if QUERIES.search(name):
        return None
    reads_itself = has_two_towers(model)
    text = batch.get("attention_mask" if reads_itself else "qformer_attention_mask")
    if text is None:  # it reads an image alone
        return None
    count = model.config.num_query_tokens
    if reads_itself:
        return (text if model.config.image_token_index is None else text[:, count:], None)  # behind the image's tokens
    images = batch["pixel_values"]
    text = text.repeat_interleave(images.shape[1] if images.ndim == 5 else 1, dim=0)  # once for each frame of a video
    return F.pad(text, (count, 0), value=1) if ".attention." in name else text


def _own_tokens(model: nn.Module, name: str, batch: Mapping[str, Any], placeholders: list[int]) -> TokenMasks:
    """Return which tokens of the text count for a layer of a projector that embeds them too (Gemma 3n): those of its own vocabulary."""
    holder: Any = model.get_submodule(name.rpartition(".")[0])
    if not hasattr(holder, "vocab_offset"):
        return None
    place = batch["input_ids"] - holder.vocab_offset
    is_placeholder = torch.isin(batch["input_ids"], torch.tensor(placeholders, device=place.device))
    return ((place >= 0) & (place < holder.vocab_size) & ~is_placeholder, None)


def _patch_mask(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which patches are part of an image (images, patches), for layers that read patches one by one; None if all are.

    SigLIP 2 gives the mask by patch; Idefics and SmolVLM by pixel (samples, images, H, W), with images of zeros that fill a sample up.
    """
    mask = batch.get("pixel_attention_mask")
    if mask is None or ".encoder." not in name:
        return None
    if mask.ndim == 2:  # of Granite Docling by tile: it reads those that are filled only
        return mask if batch["pixel_values"].ndim == 3 else None
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
