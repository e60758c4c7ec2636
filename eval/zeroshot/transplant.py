"""A vision-language model's vision tower, back in the model with two towers that it came from, so that its zero-shot can be measured.

LLaVA's tower is a copy of CLIP's ``vision_model`` (or SigLIP's), tuned or not; projections and the text tower are those of the original.
"""

import copy
from typing import Any

from torch import Tensor, nn

from corda_core.adapter import base_of
from corda_vlm.towers import family_of

WRAPPER = "vision_model."
"""What some versions put in front of a tower's names."""
POOLING_HEAD = "head."
"""SigLIP's, which vision-language models leave out: it stays the original's."""


def transplanted(two_towers: Any, language_model: nn.Module) -> Any:
    """Return a copy of ``two_towers`` that has the vision tower of ``language_model``.

    Args:
        two_towers: The original: CLIP or SigLIP of transformers.
        language_model: LLaVA or another model whose vision tower came from it; merged, if it was adapted.

    Raises:
        ValueError: If the towers do not have the same weights of the same shapes.
    """
    original = getattr(two_towers, "vision_model", None)
    if not isinstance(original, nn.Module):
        raise ValueError(f"{type(two_towers).__name__} has no vision_model; expected CLIP or SigLIP of transformers; give the original.")
    tuned = _plain(vision_tower(language_model).state_dict())
    wanted = _plain(original.state_dict())
    _check(tuned, wanted)
    copied = copy.deepcopy(two_towers)
    own = _plain(copied.vision_model.state_dict())
    for name, weight in tuned.items():
        own[name].copy_(weight)  # a state dict's tensors are the model's own
    return copied


def vision_tower(language_model: nn.Module) -> nn.Module:
    """Return a vision-language model's vision tower.

    Raises:
        ValueError: If it has none, or carries an adapter.
    """
    if base_of(language_model) is not language_model:
        raise ValueError(
            f"{type(language_model).__name__} carries an adapter; expected plain weights; merge it with corda_vlm.merge first."
        )
    prefixes = family_of(language_model).vision
    if len(prefixes) != 1 or not prefixes[0]:
        raise ValueError(f"{type(language_model).__name__} has the vision towers {list(prefixes)}; expected one; give a LLaVA-type model.")
    return language_model.get_submodule(prefixes[0])


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(WRAPPER): weight for name, weight in weights.items() if not name.endswith("position_ids")}


def _check(tuned: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in tuned and not name.startswith(POOLING_HEAD)]
    strange = [name for name in tuned if name not in wanted]
    if missing or strange:
        raise ValueError(
            f"The vision tower lacks the original's {missing[:3]} and has {strange[:3]} beside them; expected the same weights; "
            "give the original that the tower came from."
        )
    for name, weight in tuned.items():
        if weight.shape != wanted[name].shape:
            raise ValueError(
                f"{name} of the vision tower is {tuple(weight.shape)}, the original's {tuple(wanted[name].shape)}; expected the same; "
                "give the original that the tower came from."
            )
