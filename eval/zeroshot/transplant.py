"""A vision-language model's vision tower, back in the model with two towers that it came from, so that its zero-shot can be measured.

LLaVA's tower is a copy of CLIP's ``vision_model`` (or SigLIP's), tuned or not; projections and the text tower are those of the original.
"""

import copy
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from corda_core.linears import base_of
from corda_vlm.towers import family_of

WRAPPER = "vision_model."
"""What some versions put in front of a tower's names."""
POOLING_HEAD = "head."
"""SigLIP's, which vision-language models leave out: it stays the original's."""


def transplanted(two_towers: Any, language_model: nn.Module) -> Any:
    """Return a copy of ``two_towers`` that has the vision tower of ``language_model``.

    Args:
        two_towers: The original: CLIP or SigLIP of transformers.
        language_model: LLaVA or another model whose vision tower came from it, adapted or not.

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
    """Return a vision-language model's vision tower; of an adapted model a plain copy that answers as the tower does now.

    Raises:
        ValueError: If it has none.
    """
    base = base_of(language_model)
    prefixes = family_of(base).vision
    if len(prefixes) != 1 or not prefixes[0]:
        raise ValueError(f"{type(base).__name__} has the vision towers {list(prefixes)}; expected one; give a LLaVA-type model.")
    tower: nn.Module = base.get_submodule(prefixes[0])
    return tower if base is language_model else _merged(tower)


def _merged(tower: nn.Module) -> nn.Module:
    """Return a copy with what the active adapters change in its weights; the language model's stay where they are."""
    whole = nn.ModuleDict({"tower": copy.deepcopy(tower)})  # the tower itself may be what trained whole
    for name, module in list(whole.named_modules()):
        if not isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            continue
        active = [] if module.disable_adapters else list(module.active_adapters)
        if isinstance(module, LoraLayer):
            module.merge(adapter_names=active)
            plain = module.get_base_layer()
        else:
            plain = module.modules_to_save[active[0]] if active else module.original_module
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, plain)
    return whole["tower"]


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
