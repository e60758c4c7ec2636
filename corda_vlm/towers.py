"""Where the parts of a vision-language model live, per family."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda_core import TokenWeights, attention_mask_of, select_linears

PARTS: dict[str, dict[str, str]] = {
    "llava": {"vision": "model.vision_tower", "projector": "model.multi_modal_projector", "language": "model.language_model"},
}
"""``config.model_type`` -> part -> prefix of its modules. A model that is not listed is one part, "language"."""

DEFAULT_PARTS = ("language",)


def parts_of(model: nn.Module) -> dict[str, str]:
    """Return the model's parts and the prefixes of their modules; "" means the whole model."""
    return PARTS.get(getattr(model.config, "model_type", ""), {"language": ""})


def select_layers(
    model: nn.Module,
    *,
    parts: Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the linear layers of the named parts that match, without those that cannot learn.

    Args:
        model: A LLaVA model or a causal language model.
        parts: Any of "language", "vision", "projector"; None takes the language model.
        targets: As in ``corda_core.select_linears``.
        exclude: As in ``corda_core.select_linears``.

    Raises:
        ValueError: If a part is unknown for this model, or nothing matches.
    """
    known = parts_of(model)
    chosen = DEFAULT_PARTS if parts is None else tuple(parts)
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen:
        raise ValueError(f"parts: {unknown or chosen!r} is not what {type(model).__name__} has; expected some of {sorted(known)}.")
    names = select_linears(model, targets, exclude)
    inside = [name for name in names if any(name.startswith(known[part]) for part in chosen)]
    kept = tuple(name for name in inside if not _is_behind_features(model, name))
    if not kept:
        raise ValueError(f"targets={targets!r} matches layers, but none of them in parts={chosen!r}; the first match is {names[0]}.")
    return kept


def token_weights(model: nn.Module, weights: Mapping[str, float]) -> TokenWeights:
    """Return how much each token counts for each layer.

    In the language model padding counts nothing, and the tokens of an image and of text as ``weights`` says; in tower and projector
    all tokens count alike.
    """
    known = parts_of(model)
    image_token = getattr(model.config, "image_token_id", None)
    if weights["image"] != weights["text"] and image_token is None:
        raise ValueError(f'tokens weighs images and text apart, but {type(model).__name__} reads no images; leave tokens at "all".')

    def weigh(name: str, batch: Mapping[str, Any]) -> Tensor | None:
        if not name.startswith(known["language"]):
            return None
        mask = attention_mask_of(name, batch)
        if weights["image"] == weights["text"]:
            return mask
        is_image = batch["input_ids"] == image_token
        return torch.where(is_image, weights["image"], weights["text"]) * (1 if mask is None else mask)

    return weigh


def _is_behind_features(model: nn.Module, name: str) -> bool:
    """Whether a vision block runs behind the one whose output is used (LLaVA's ``vision_feature_layer``): it gets no gradient."""
    prefix = parts_of(model).get("vision")
    match = re.search(r"\.layers\.(\d+)\.", name)
    if prefix is None or not name.startswith(prefix) or match is None:
        return False
    config: Any = model.config
    blocks, used = config.vision_config.num_hidden_layers, config.vision_feature_layer
    indices: list[int] = [used] if isinstance(used, int) else list(used)
    # hidden_states[0] is what the first block reads, so state i is the output of block i − 1.
    last = max(index if index >= 0 else blocks + 1 + index for index in indices)
    return int(match.group(1)) >= last
