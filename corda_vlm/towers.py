"""Where the parts of a model live, family by family, and what that means for its layers and their tokens."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda_core import TokenWeights, select_linears
from corda_core.collect import attention_mask_of
from corda_core.layers import gathered
from corda_vlm.probe import Reach, probe

KINDS = {
    "attention": r".*\.(self_attn|attn|attention|self_attention|cross_attn|attn_pool)\..+",
    "mlp": r".*\.(mlp|feed_forward|ffn)\..+|.*\.fc\d",
}
"""What the words "attention" and "mlp" stand for in ``targets`` and ``exclude``."""


EMBEDDINGS = r"(^|\.)(embeddings|patch_embed)\."
"""Linear layers that embed patches: left out unless ``targets`` names them."""


@dataclass(frozen=True)
class Family:
    """Prefixes of the modules of each part; where they overlap, the longest counts."""

    vision: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    default: tuple[str, ...] = field(default=("language",), kw_only=True)
    """The parts that get adapters unless the user names some."""

    def prefixes(self, part: str) -> tuple[str, ...]:
        """Return where a part's modules live."""
        prefixes: tuple[str, ...] = getattr(self, part)
        return prefixes

    def part_of(self, name: str) -> str | None:
        """Return which part a layer belongs to."""
        hits = [
            (len(prefix), part) for part in PARTS for prefix in self.prefixes(part) if f"{name}.".startswith(f"{prefix}." if prefix else "")
        ]
        return max(hits)[1] if hits else None


LLAVA = Family(("model.vision_tower",), ("model.multi_modal_projector",), ("model.language_model",))
QWEN_VL = Family(("model.visual",), ("model.visual.merger", "model.visual.deepstack_merger_list"), ("model.language_model",))
IDEFICS = Family(("model.vision_model",), ("model.connector",), ("model.text_model",))
TWO_TOWERS = Family(
    vision=("vision_model", "visual_projection"), language=("text_model", "text_projection"), default=("vision", "language")
)
OPEN_CLIP = Family(
    vision=("visual",),
    language=("transformer", "text", "text_decoder", "token_embedding", "text_projection"),
    default=("vision", "language"),
)
WHOLE_LANGUAGE = Family(language=("",))
WHOLE_VISION = Family(vision=("",), default=("vision",))

FAMILIES: dict[str, Family] = {
    "aya_vision": LLAVA,
    "clip": TWO_TOWERS,
    "clip_vision_model": WHOLE_VISION,
    "gemma3": LLAVA,
    "glm4v": QWEN_VL,
    "idefics2": IDEFICS,
    "idefics3": IDEFICS,
    "internvl": LLAVA,
    "llava": LLAVA,
    "llava_next": LLAVA,
    "llava_next_video": LLAVA,
    "llava_onevision": LLAVA,
    "mistral3": LLAVA,
    "paligemma": LLAVA,
    "qwen2_5_vl": QWEN_VL,
    "qwen2_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "siglip": TWO_TOWERS,
    "siglip2": TWO_TOWERS,
    "siglip2_vision_model": WHOLE_VISION,
    "siglip_vision_model": WHOLE_VISION,
    "smolvlm": IDEFICS,
    "vipllava": LLAVA,
}
"""``config.model_type`` -> where its parts live. A causal language model is one part; other models that are not listed too, and the user is
told what was taken."""

PARTS = ("vision", "projector", "language")


def family_of(model: nn.Module) -> Family:
    """Return where the model's parts live; prefixes are those of this model, with or without an output layer on top."""
    known = _listed(model)
    if known is None:
        return WHOLE_LANGUAGE
    prefixes = {part: tuple(_existing(model, prefix) for prefix in known.prefixes(part)) for part in PARTS}
    return Family(prefixes["vision"], prefixes["projector"], prefixes["language"], default=known.default)


def has_two_towers(model: nn.Module) -> bool:
    """Return whether the model compares an image tower with a text tower, as CLIP does."""
    return _listed(model) in (TWO_TOWERS, OPEN_CLIP)


def is_open_clip(model: nn.Module) -> bool:
    """Return whether the model is one of open_clip's."""
    return isinstance(getattr(model, "visual", None), nn.Module) and hasattr(model, "encode_image") and hasattr(model, "encode_text")


def is_text_only(model: nn.Module) -> bool:
    """Return whether the model is a causal language model."""
    return _listed(model) is WHOLE_LANGUAGE


def is_vision_only(model: nn.Module) -> bool:
    """Return whether the model is a vision tower by itself."""
    return _listed(model) is WHOLE_VISION


def image_dtype(model: Any) -> torch.dtype:
    """Return the precision that an open_clip model's image tower wants its images in."""
    weights = (module.weight.dtype for module in model.visual.modules() if isinstance(module, nn.Conv2d))
    return next(weights, torch.float32)


def modules_of(model: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that make up these parts.

    Raises:
        ValueError: If the model has no such part.
    """
    family, modules = family_of(model), dict(model.named_modules())
    present: list[str] = []
    for part in parts:
        names = [name for name in (family.prefixes(part) if part in PARTS else ()) if name in modules and name]
        if not names:
            known = [part for part in PARTS if any(name in modules and name for name in family.prefixes(part))]
            raise ValueError(f"train_fully names {part!r}, which {type(model).__name__} does not have; expected some of {known}.")
        present += names
    return tuple(present)


def select_layers(
    model: nn.Module,
    *,
    parts: Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the linear layers of the named parts that match.

    Args:
        model: A vision-language model, a CLIP-type model, a vision tower or a causal language model.
        parts: Any of "language", "vision", "projector"; None takes the family's default: the language model of those that have one, both
            towers of CLIP.
        targets: As in ``corda_core.select_linears``; or "attention" or "mlp".
        exclude: As ``targets``.

    Raises:
        ValueError: If a part is unknown for this model, or nothing matches.
    """
    family = family_of(model)
    chosen = family.default if parts is None else tuple(parts)
    known = [part for part in PARTS if family.prefixes(part)]
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen:
        raise ValueError(f"parts: {unknown or chosen!r} is not what {type(model).__name__} has; expected some of {sorted(known)}.")
    names = select_linears(model, _pattern(targets), _pattern(exclude))
    inside = tuple(name for name in names if family.part_of(name) in chosen and (targets or not re.search(EMBEDDINGS, name)))
    if not inside:
        what = "There are linear layers" if targets is None else f"targets={targets!r} matches layers"
        raise ValueError(f"{what}, but none of them in parts={chosen!r}; the first is {names[0]}.")
    return inside


def reach_of(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> Reach:
    """Return what became of each layer in these batches, where it got furthest; under ``torch.distributed`` in any process's."""
    reaches = [reach for process in gathered([probe(model, batch, names) for batch in batches]) for reach in process]
    learnable = {name for reach in reaches for name in reach.learnable}
    ran = learnable | {name for reach in reaches for name in reach.unused}
    return Reach(
        learnable=tuple(name for name in names if name in learnable),
        unused=tuple(name for name in names if name in ran - learnable),
        not_run=tuple(name for name in names if name not in ran),
    )


def learnable_layers(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the layers that can learn from one of these batches (``corda_vlm.probe.probe``), and warn of those left out.

    Under ``torch.distributed`` from one of any process's.

    Raises:
        ValueError: If none can.
    """
    reach = reach_of(model, names, batches)
    if not reach.learnable:
        raise ValueError(
            f"None of the {len(names)} layers can learn from the first samples: {len(reach.not_run)} never ran (such as "
            f"{(reach.not_run or reach.unused)[0]}), {len(reach.unused)} ran without reaching the output; "
            "give samples that reach them (images for a vision tower), or other parts or targets."
        )
    for left_out, reason in ((reach.unused, "ran, but what they compute does not reach the output"), (reach.not_run, "never ran")):
        if left_out:
            warnings.warn(f"{len(left_out)} layer(s) {reason}, such as {left_out[0]}: left out.", stacklevel=3)
    if _listed(model) is None:
        kinds = sorted({name.rpartition(".")[2] for name in reach.learnable})
        warnings.warn(
            f"{type(model).__name__} is of no family that corda_vlm knows: took all {len(reach.learnable)} linear layers that can learn "
            f"({', '.join(kinds)}); name others with `targets`.",
            stacklevel=3,
        )
    return reach.learnable


def token_weights(model: nn.Module, weights: Mapping[str, float]) -> TokenWeights:
    """Return how much each token counts for each layer.

    In the language model padding counts nothing, and the tokens of an image and of text as ``weights`` says; in a text tower of open_clip
    what comes behind the token that is read counts nothing; in a vision tower neither do patches that only fill an image up; in a
    projector all tokens count alike.
    """
    placeholders, two_towers = image_tokens(model), has_two_towers(model)
    family, unlisted, decoder = family_of(model), _listed(model) is None, _decoder_prefix(model)
    if weights["image"] != weights["text"] and not placeholders:
        raise ValueError(
            f'tokens weighs images and text apart, but {type(model).__name__} has no image among its text; leave tokens at "all".'
        )

    def weigh(name: str, batch: Mapping[str, Any]) -> Tensor | None:
        part = family.part_of(name)
        if part == "vision":
            return _patch_mask(model, name, batch)
        if unlisted and not name.startswith(decoder):
            return None
        if part != "language" or (two_towers and not re.search(r"\.(encoder|resblocks)\.", name)):  # a tower's head reads one token
            return None
        mask = _caption_mask(model, batch) if is_open_clip(model) else attention_mask_of(name, batch)
        if weights["image"] == weights["text"]:
            return mask
        is_image = torch.isin(batch["input_ids"], torch.tensor(placeholders, device=batch["input_ids"].device))
        return torch.where(is_image, weights["image"], weights["text"]) * (1 if mask is None else mask)

    return weigh


def _listed(model: nn.Module) -> Family | None:
    """Return the family of the table; that of a causal language model for what generates text from text alone."""
    config: Any = getattr(model, "config", None)
    listed = FAMILIES.get(getattr(config, "model_type", ""))
    if listed is not None:
        return listed
    if is_open_clip(model):
        return OPEN_CLIP
    is_text = config is not None and hasattr(config, "vocab_size") and not hasattr(config, "vision_config")
    return WHOLE_LANGUAGE if is_text else None


def _existing(model: nn.Module, prefix: str) -> str:
    """Return the prefix as this model has it: models without an output layer lack the leading "model."."""
    headless = prefix.removeprefix("model.")
    return headless if headless != prefix and not hasattr(model, "model") else prefix


def _pattern(patterns: str | Sequence[str] | None) -> str | Sequence[str] | None:
    return KINDS.get(patterns, patterns) if isinstance(patterns, str) else patterns


def _decoder_prefix(model: Any) -> str:
    """Return where the language model of an unlisted model lives, as far as transformers knows; else a name that no layer has."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "\0")


def image_tokens(model: nn.Module) -> list[int]:
    """Return the ids of the tokens that stand for pieces of images and videos."""
    config: Any = getattr(model, "config", None)
    tokens = [getattr(config, key, None) for key in ("image_token_id", "image_token_index", "video_token_id")]
    return [token for token in tokens if isinstance(token, int)]


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
