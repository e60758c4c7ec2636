"""LoRA layers of PEFT that hold what CorDA starts from, and the change that they make."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from peft import LoraConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers, convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from transformers.core_model_loading import revert_weight_conversion

from corda_core.decompose import shortened
from corda_core.linears import LINEAR_TYPES, base_of, expert_of, gathered_whole, is_shared
from corda_core.plan import AdapterInit

T = TypeVar("T")


class Protect(StrEnum):
    """What keeps an adapter from the directions that the context uses; see ``attach``."""

    STRICT = "strict"
    """A is frozen, B trains."""
    START = "start"
    """A and B train (as published)."""
    WHITENED = "whitened"
    """A trains where the context is short, and B."""
    NONE = "none"
    """A and B train, B from zero: an ordinary LoRA."""


NOT_PLAIN = "a CorDA adapter in training is no plain LoRA: write it with corda_core.export, and load what that wrote"
"""Stands in the saved config where PEFT expects a way to initialise: plain PEFT then refuses the folder with this sentence,
instead of loading ``B A`` without the frozen ``B0 A0`` and being silently wrong."""

FROZEN = ("lora_A0", "lora_B0", "lora_Q", "lora_lengths")
"""Where a layer keeps what an adapter starts from, and what it trains in."""


class ContextLora(LoraVariant):
    """LoRA whose factors are made from what trains and what is frozen, and whose change is zero at the start.

    - ``protect="start"``: ``W x + s (B A − B0 A0) x``, computed as ``s [B − B0, B0] [A; A − A0] x``. The papers write
      ``(W − B0 A0) x + B A x``: the same function, but here the base weight is never written and the start is bit-identical to the
      base in any precision.
    - ``protect="strict"``: ``W x + s B A x``, a plain LoRA whose A does not train.
    - ``protect="whitened"``: ``W x + s B (Ã P) x``.

    What is computed is what ``export`` writes: an exported adapter repeats these very operations.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """PEFT's hook for variants that it makes itself; ours are filled by ``attach``."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return the base's result plus the change."""
        down, up = _factors(module, active_adapter)
        # On quantised bases TRL keeps what trains in bfloat16, and what is frozen as it was.
        x, down = x.to(up.dtype), down.to(up.dtype)
        change = F.linear(F.linear(module.lora_dropout[active_adapter](x), down), up)
        return result + change * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight with the change added."""
        return orig_weight + _stored_change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the change to the base weight in place."""
        orig_weight.data += _stored_change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight with the change taken away again."""
        return orig_weight - _stored_change(module, active_adapter).to(orig_weight.dtype)


class ContextLoraModel(LoraModel):
    """PEFT's model of LoRA layers, which knows what PEFT does not: CorDA's factors cannot be added up, and weights may be shared."""

    def _check_merge_allowed(self) -> None:
        """Refuse to add a change to a weight that another module has too, as PEFT does in place.

        Raises:
            ValueError: If a layer's weight is tied, or the layer stands in two places.
        """
        super()._check_merge_allowed()
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}
        shared = next((name for name, layer in layers.items() if is_shared(self.model, _base_weight(layer))), None)
        if shared is not None:
            raise ValueError(f"PEFT would merge into the weight of {shared}, which another module uses too; merge with corda_core.merge.")

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combine plain adapters as PEFT does.

        Raises:
            ValueError: If one of them is a CorDA adapter in training: PEFT would combine ``B A`` and forget ``B0 A0``.
        """
        ours = [name for name in adapters if getattr(self.peft_config.get(name), "init_lora_weights", None) == NOT_PLAIN]
        if ours:
            raise ValueError(
                f"add_weighted_adapter got {ours[0]!r}, which is no plain LoRA; export it and load what that wrote, then combine."
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)


class _Factor(NamedTuple):
    """Stands where a LoRA layer has a module."""

    weight: Tensor


@dataclass(frozen=True)
class ExpertLora:
    """One expert's share of the adapter that PEFT has on a parameter of fused experts, seen as a LoRA layer.

    PEFT holds A as (experts · r, n), one expert after the other, and B as (m, r · experts), one component after the other. Writing into
    the factors writes into PEFT's, but not into a sharded A.
    """

    whole: ParamWrapper
    index: int
    lora_variant: ClassVar[Mapping[str, LoraVariant]] = {}
    lora_bias: ClassVar[Mapping[str, bool]] = {}

    @property
    def lora_A(self) -> dict[str, _Factor]:
        """A (r, n) by adapter; where it is sharded (FSDP2), across experts, gathered by all processes at once: a copy, to be read only."""
        adapters = self.whole.lora_A.items()
        return {key: _Factor(gathered_whole(A.weight).unflatten(0, (self.whole.num_experts, -1))[self.index]) for key, A in adapters}

    @property
    def lora_B(self) -> dict[str, _Factor]:
        """B (m, r) by adapter."""
        adapters = self.whole.lora_B.items()
        return {key: _Factor(B.weight.unflatten(1, (-1, self.whole.num_experts))[..., self.index]) for key, B in adapters}

    @property
    def r(self) -> dict[str, int]:
        """The rank by adapter."""
        ranks: dict[str, int] = self.whole.r
        return ranks

    @property
    def scaling(self) -> dict[str, float]:
        """The factor s by adapter, which all experts share."""
        scaling: dict[str, float] = self.whole.scaling
        return scaling

    @property
    def merged(self) -> bool:
        """Whether PEFT has added the change to the parameter."""
        merged: bool = self.whole.merged
        return merged


def peft_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[str, LoraLayer]]:
    """Return PEFT's own layers with this adapter and where they are in the adapted base, by the full names of what they adapt there.

    Of a parameter that is not fused experts' by its module's name, as ever.
    """
    layers = {}
    for place, layer in base_of(model).named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            path = re.sub(r"(\.base_layer)+$", "", place)  # PEFT's layers on several parameters of a module lie in one another
            layers[f"{path}.{layer.parameter_name}" if _is_fused(layer) else place] = place, layer
    return layers


def _is_fused(layer: LoraLayer) -> bool:
    return isinstance(layer, ParamWrapper) and layer.get_param().ndim == 3


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the layers that carry this adapter, by their full names in the base model; of fused experts all, planned or not, as views.

    Such a view, ``ExpertLora``, has what of a LoRA layer tells its change.
    """
    layers: dict[str, Any] = {}
    for name, (_, layer) in peft_layers(model, adapter_name).items():
        if _is_fused(layer):
            layers |= {f"{name}[{index}]": ExpertLora(layer, index) for index in range(layer.num_experts)}
        else:
            layers[name] = layer
    return layers


def _base_weight(layer: LoraLayer) -> Tensor:
    weight: Tensor = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    return weight


def stacked(factors: Mapping[int, tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return the factors (r, n) and (m, r) of some of ``count`` experts as PEFT lays them out (``ExpertLora``); zero where there is none.

    The rank is the largest: smaller ones are filled up with zeros.
    """
    largest = max(len(A) for A, _ in factors.values())
    like_A, like_B = next(iter(factors.values()))
    A, B = like_A.new_zeros(count, largest, like_A.shape[1]), like_B.new_zeros(len(like_B), largest, count)
    for index, (own_A, own_B) in factors.items():
        A[index, : len(own_A)] = own_A
        B[:, : len(own_A), index] = own_B
    return A.flatten(0, 1), B.flatten(1)


def by_stack(names: Mapping[str, T]) -> dict[str, dict[int, T]]:
    """Return what is known of experts' matrices by the parameters that hold them, and then by expert; other layers are left out."""
    stacks: dict[str, dict[int, T]] = {}
    for name, value in names.items():
        expert = expert_of(name)
        if expert is not None:
            stacks.setdefault(expert.stack, {})[expert.index] = value
    return stacks


def whole_modules(model: nn.Module, adapter_name: str = "default") -> dict[str, ModulesToSaveWrapper]:
    """Return what trains whole beside this adapter, by full names in the base model."""
    wrappers = ((name, module) for name, module in base_of(model).named_modules() if isinstance(module, ModulesToSaveWrapper))
    return {name: wrapper for name, wrapper in wrappers if adapter_name in wrapper.modules_to_save}


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that take part in a forward pass."""
    carriers = (module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return sorted({name for module in carriers if not module.disable_adapters for name in module.active_adapters})


def active_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that is active.

    Raises:
        ValueError: If none or several are.
    """
    names = active_adapters(model)
    if len(names) != 1:
        raise ValueError(f"The adapters {names} are active; expected a single one: choose it with model.set_adapter.")
    return names[0]


def change_factors(layer: LoraLayer, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """Return the change of one layer against the untouched base as ``(A', B')``, ``ΔW = B' A'`` (m, n), float32, scaling included."""
    A, B = _factors(layer, adapter_name)
    return A.detach().float(), B.detach().float() * layer.scaling[adapter_name]


@torch.no_grad()
def squared_change(model: nn.Module, adapter_name: str = "default") -> float:
    """Return ``Σ ‖ΔW‖²_F`` over all layers, from their factors, and of what trains whole ``Σ ‖w − w₀‖²``."""
    parts = []
    for layer in lora_layers(model, adapter_name).values():
        A, B = change_factors(layer, adapter_name)
        parts.append(((B.T @ B) * (A @ A.T)).sum())
    for wrapper in whole_modules(model, adapter_name).values():
        starts = wrapper.original_module.state_dict()
        for key, value in wrapper.modules_to_save[adapter_name].state_dict().items():
            if value.is_floating_point():
                parts.append((gathered_whole(value).float() - gathered_whole(starts[key]).float()).square().sum())
    return max(0.0, float(torch.stack([part.to(parts[0].device) for part in parts]).sum())) if parts else 0.0


@torch.no_grad()
def shrink_(model: nn.Module, alpha: float, adapter_name: str = "default") -> None:
    """Take what was trained back towards its start: 1 leaves it, 0 is the base, bit for bit.

    All of ``trained_tensors`` become ``(1 − alpha) · start + alpha · trained``. The change is then ``alpha ΔW``, but with
    ``protect="start"``, where A moves too: ``s (alpha (δB A0 + B0 δA) + alpha² δB δA)``.
    """
    for trained, start in trained_tensors(model, adapter_name):
        _shrink_(trained, start, alpha)
    torch.clear_autocast_cache()  # within one autocast context the weights would stay what they were


def shrink_layer_(layer: LoraLayer, alpha: float, adapter_name: str = "default") -> None:
    """Take what was trained in one layer back towards its start, as ``shrink_`` does."""
    for trained, start in _trained_factors(layer, adapter_name):
        _shrink_(trained, start, alpha)
    torch.clear_autocast_cache()


def _shrink_(trained: Tensor, start: Tensor | None, alpha: float) -> None:
    if start is None:
        trained.mul_(alpha)
    else:
        trained.copy_(torch.lerp(_placed_as(trained, start), trained, alpha))


def trained_tensors(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield what makes the difference from the base, and where each started; None is zero.

    B, with ``protect="start"`` A too, and the parameters and floating-point buffers of what trains whole. An A whose B started from zero is
    left out: what it is makes no difference to where B is zero.
    """
    for _, layer in peft_layers(model, adapter_name).values():
        yield from _trained_factors(layer, adapter_name)
    for wrapper in whole_modules(model, adapter_name).values():
        starts = wrapper.original_module.state_dict()
        trained = wrapper.modules_to_save[adapter_name].state_dict(keep_vars=True)
        yield from ((value, starts[key]) for key, value in trained.items() if value.is_floating_point())


def _trained_factors(layer: LoraLayer, adapter_name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    for key in ("lora_A", "lora_B"):
        start = dict(getattr(layer, f"{key}0", {})).get(adapter_name)
        if start is not None or key == "lora_B":
            yield getattr(layer, key)[adapter_name].weight, start


def _placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the other tensor in the type, and where the first is sharded in the shards, of the first."""
    if isinstance(tensor, DTensor) and not isinstance(other, DTensor):
        other = distribute_tensor(other, tensor.device_mesh, tensor.placements)
    return other.to(tensor.dtype)


def lora_config(base: nn.Module, ranks: dict[str, int], rank: int, scaling: float) -> LoraConfig:
    """Return a config whose every layer has its own rank and the one scaling; experts of one parameter have the largest of theirs.

    PEFT takes a name for the end of a longer one: ``transformer.….c_fc`` for that in ``visual.transformer.….c_fc`` too (open_clip). So
    longer ones that are not planned are excluded, and patterns of shorter ones are anchored.
    """
    stacks = {stack: max(own.values()) for stack, own in by_stack(ranks).items()}
    ranks = {name: r for name, r in ranks.items() if expert_of(name) is None}
    linears = [name for name, module in base.named_modules() if isinstance(module, (*LINEAR_TYPES, LoraLayer))]
    longer = {name: [other for other in linears if other.endswith(f".{name}")] for name in ranks}
    odd = {f"^{re.escape(name)}" if longer[name] else name: r for name, r in ranks.items() if r != rank}
    odd |= {stack: r for stack, r in stacks.items() if r != rank}
    excluded = sorted({other for others in longer.values() for other in others if other not in ranks})
    return LoraConfig(
        r=rank,
        lora_alpha=_whole_number(rank * scaling),
        target_modules=list(ranks),
        target_parameters=list(stacks) or None,
        exclude_modules=excluded or None,
        rank_pattern=odd,
        alpha_pattern={name: _whole_number(r * scaling) for name, r in odd.items()},
        lora_dropout=0.0,
        bias="none",
    )


def is_taken(model: nn.Module, name: str) -> bool:
    """Return whether PEFT puts an adapter on this layer if asked to.

    In some models with experts it takes ``down_proj`` and the like, wherever they are, for those of the experts of transformers before 5,
    which now are one parameter; in Mamba's it refuses what the kernels read without calling it.
    """
    config = LoraConfig(target_modules=[name])
    if expert_of(name) is not None:
        return True
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:  # it misses the layer that it would fuse this one with, or refuses it
        return False
    return name in (config.target_modules or ())


def saved_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return under which names PEFT finds the layers again in an adapter's file; those that it finds under none are left out.

    PEFT renames what it reads as transformers renames the weights of published checkpoints, and so some names that are right already:
    DeepSeek-OCR 2's ``language_model.layers`` becomes ``language_model.language_model.layers``. There the checkpoints' name is the one
    that arrives. Of experts it is the name of their module, which PEFT's layers on its parameters have.
    """
    places = {name: name if (expert := expert_of(name)) is None else expert.module for name in names}
    distinct = list(dict.fromkeys(places.values()))

    def arriving(saved: Iterable[str]) -> set[str]:
        tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(1, 1) for name in saved}
        config = LoraConfig(target_modules=distinct)
        return set(convert_peft_adapter_state_dict_for_transformers(model=model, peft_config=config, adapter_state_dict=tensors))

    same = arriving(distinct)
    saved: dict[str, str] = {}
    for name in distinct:
        key = f"base_model.model.{name}.lora_A.weight"
        if key in same:
            saved[name] = name
            continue
        (published,) = revert_weight_conversion(model, {f"{name}.lora_A.weight": torch.zeros(1, 1)})
        published = published.removesuffix(".lora_A.weight")
        if key in arriving([published]):
            saved[name] = published
    return {name: saved[place] for name, place in places.items() if place in saved}


def fill_experts(layer: ParamWrapper, inits: Mapping[int, AdapterInit], adapter_name: str, protect: Protect) -> None:
    """Give PEFT's layer on a parameter of fused experts the starting points of these; the others never get a gradient.

    Where an expert has no A, ``B A`` and its gradient are zero, so that both stay as they are.
    """
    A, _ = stacked({index: (init.A0, init.B0) for index, init in inits.items()}, layer.num_experts)
    weight_a = layer.lora_A[adapter_name].weight
    weight_a.data.copy_(A)
    layer.lora_B[adapter_name].weight.data.zero_()
    if protect is Protect.STRICT:
        _freeze_A(layer, adapter_name)


def _freeze_A(layer: LoraLayer, adapter_name: str) -> None:
    # PEFT's own list of what stays frozen: it is honoured again whenever adapters are switched.
    layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {adapter_name: ("lora_A",)}
    layer.lora_A[adapter_name].weight.requires_grad_(False)


def fill(layer: LoraLayer, init: AdapterInit, adapter_name: str, protect: Protect, *, offset: bool) -> None:
    """Give one PEFT layer its starting point."""
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    A, B, frozen = init.A0, torch.zeros_like(init.B0), dict[str, Tensor]()
    if protect is Protect.START:
        root = layer.scaling[adapter_name] ** 0.5
        A, B = (init.A0, init.B0) if root == 1 else (init.A0 / root, init.B0 / root)
        frozen = {"lora_A0": A.to(weight_a), "lora_B0": B.to(weight_b)}  # the plan's own memory where it can be
    elif protect is Protect.WHITENED:
        assert init.whitening is not None, "checked by attach"
        A = init.whitening.undo(init.A0)
        frozen = {"lora_Q": init.whitening.vectors.to(weight_a), "lora_lengths": init.whitening.lengths.to(weight_a)}
    elif protect is Protect.STRICT:
        _freeze_A(layer, adapter_name)
    weight_a.data.copy_(A)
    weight_b.data.copy_(B)
    for key, value in frozen.items():
        if not hasattr(layer, key):
            setattr(layer, key, BufferDict({}, persistent=True))
            layer.other_param_names = (*layer.other_param_names, key)  # what PEFT's delete_adapter takes away
        getattr(layer, key)[adapter_name] = value
    if offset and protect is not Protect.NONE:
        layer.lora_variant[adapter_name] = ContextLora()


def _whole_number(value: float) -> float:
    """Return the value as an int where it is one: what most readers of ``adapter_config.json`` expect."""
    return int(value) if value == int(value) else value


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of one layer's change, without its scaling: A' (r', n), B' (m, r').

    ``protect="start"``: ``[A; A − A0]`` and ``[B − B0, B0]``, r' = 2r. Differences of factors, not of products: exactly zero at the
    start whatever kernels torch picks, and no cancellation later. "whitened": ``Ã P`` and B. Else A and B.
    """
    A, B = (gathered_whole(factor[adapter_name].weight) for factor in (layer.lora_A, layer.lora_B))  # whole anyway in a forward pass
    if adapter_name in getattr(layer, "lora_A0", {}):
        # Rounded as what trains is, so that the two still cancel at the start.
        A0, B0 = layer.lora_A0[adapter_name].to(A.dtype), layer.lora_B0[adapter_name].to(B.dtype)
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    if adapter_name in getattr(layer, "lora_Q", {}):
        return shortened(A, layer.lora_Q[adapter_name].to(A.dtype), layer.lora_lengths[adapter_name].to(A.dtype)), B
    return A, B


def _stored_change(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Return ``ΔW`` laid out as the base layer stores its weight."""
    A, B = change_factors(layer, adapter_name)
    return (B @ A).T if getattr(layer, "fan_in_fan_out", False) else B @ A
