"""Put an adapter plan on a model as a PEFT LoRA."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from corda_core.decompose import Mode
from corda_core.modules import LINEAR_TYPES, base_digest, gathered_whole, is_quantized, is_shared, unwrapped
from corda_core.plan import AdapterInit, AdapterPlan
from corda_core.quantize import KINDS, check_quantizable, quantize_linears_
from corda_core.whiten import shortened

Protect = Literal["start", "strict", "whitened"]
Residual = Literal["offset", "subtract"]

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
    """PEFT's model of LoRA layers, which knows that CorDA's factors cannot be added up by themselves."""

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


@dataclass(frozen=True)
class Attachment:
    """What ``attach`` was called with: all that loading the adapter again takes, but for what was trained."""

    plan: AdapterPlan
    alpha: float
    protect: Protect
    residual: Residual
    quantize: str | None
    train_fully: tuple[str, ...]


def attach(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    alpha: float | None = None,
    protect: Protect = "start",
    residual: Residual = "offset",
    quantize: str | None = None,
    train_fully: Sequence[str] = (),
    adapter_name: str = "default",
) -> PeftModel:
    """Return the model with the planned adapters on it; its outputs are bit for bit what they were.

    - ``protect="start"`` (as published): A and B train from A0 and B0; the change is ``s (B A − B0 A0)``, s = alpha / r.
    - ``protect="strict"``: A stays frozen at A0, whose rows carry the least context energy, and B trains from 0; the change
      is ``s B A0``, an ordinary LoRA with half the trainable parameters.
    - ``protect="whitened"``: the change is ``s B Ã P``, P ∝ (C + λI)^(−1/2). Ã trains from ``A0 P⁻¹``, which is strict's start, and B
      from 0; whatever they become, ``‖ΔW (C + λI)^(1/2)‖_F ≈ s √μ₀ ‖B Ã‖_F`` is small where the factors are.

    A0 and B0 are divided by √s each, so that ``s B0 A0`` is the planned component whatever alpha is.

    Args:
        model: The base that the plan was made from, or an equal copy; or one that carries other adapters, which stay and become inactive.
        plan: As from ``corda_core.plan``.
        alpha: LoRA's alpha; None takes the rank, so s = 1.
        protect: "start", "strict" or "whitened"; the latter two need a plan in KPM, "whitened" one made with ``whiten=True``.
        residual: "offset" leaves the base weights alone. "subtract" writes ``W − s B0 A0`` into them, the papers' form:
            one product less per step, but equal to the base only up to rounding.
        quantize: "nf4" or "fp4": bitsandbytes holds the adapted layers' base weights in 4 bits from here on. With
            ``residual="subtract"`` it is the residual that is quantised (Q-CorDA); the outputs are then those of quantised weights.
        train_fully: Modules that train whole beside the adapters (a projector), by their full names; PEFT's ``modules_to_save``.
        adapter_name: PEFT's name for the adapter.

    Raises:
        ValueError: If the plan belongs to another base, options contradict each other, or PEFT adapted other layers.
    """
    base = base_of(model)
    _check_options(plan, protect, residual)
    _check_base(model, plan, residual, quantize, train_fully, adapter_name)
    alpha = plan.rank if alpha is None else alpha
    ranks = {name: init.rank for name, init in plan.layers.items()}
    config = lora_config(base, ranks, plan.rank, alpha / plan.rank)
    config.modules_to_save = list(train_fully) or None
    peft_model = _with_lora(model, config, adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    _check_layers({name: layer.r[adapter_name] for name, layer in layers.items()}, ranks)
    _check_whole(peft_model, train_fully, adapter_name)
    if residual == "subtract":
        for name, layer in layers.items():
            _subtract_(layer.get_base_layer(), plan.layers[name])
    if quantize is not None:  # PEFT has layers of its own kind on quantised ones
        base = peft_model.unload()
        quantize_linears_(base, plan.layers, quantize)
        base.is_loaded_in_4bit = True  # where PEFT looks for whether to take them
        peft_model = _with_lora(base, config, adapter_name)
        base.is_loaded_in_4bit = False  # transformers would look for its own quantiser
        layers = lora_layers(peft_model, adapter_name)
    for name, layer in layers.items():
        _fill(layer, plan.layers[name], adapter_name, protect, offset=residual == "offset")
    if protect != "strict":
        peft_model.peft_config[adapter_name].init_lora_weights = NOT_PLAIN
    attachment = Attachment(plan, alpha, protect, residual, quantize, tuple(train_fully))
    peft_model.peft_config[adapter_name].corda = attachment  # no field of PEFT's config: it is not written to its JSON
    return peft_model


def attachment_of(model: nn.Module, adapter_name: str = "default") -> Attachment:
    """Return what an adapter was attached with.

    Raises:
        ValueError: If the model carries no CorDA adapter of this name.
    """
    found = getattr(getattr(unwrapped(model), "peft_config", {}).get(adapter_name), "corda", None)
    if found is None:
        raise ValueError(f"The model carries no CorDA adapter named {adapter_name!r}; expected one from prepare, attach or load.")
    return found


def base_of(model: nn.Module) -> Any:
    """Return the model that PEFT has put adapters into, or the model itself."""
    model = unwrapped(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the layers that carry this adapter, by their full names in the base model."""
    return {name: layer for name, layer in base_of(model).named_modules() if isinstance(layer, LoraLayer) and adapter_name in layer.r}


def whole_modules(model: nn.Module, adapter_name: str = "default") -> dict[str, ModulesToSaveWrapper]:
    """Return what trains whole beside this adapter, by full names in the base model."""
    modules = base_of(model).named_modules()
    return {name: one for name, one in modules if isinstance(one, ModulesToSaveWrapper) and adapter_name in one.modules_to_save}


def change_factors(layer: LoraLayer, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """Return the change of one layer against the untouched base as ``(A', B')``, ``ΔW = B' A'`` (m, n), float32, scaling included."""
    A, B = _factors(layer, adapter_name)
    return A.detach().float(), B.detach().float() * layer.scaling[adapter_name]


def lora_config(base: nn.Module, ranks: dict[str, int], rank: int, scaling: float) -> LoraConfig:
    """Return a config whose every layer has its own rank and the one scaling.

    PEFT takes a name for the end of a longer one: ``transformer.….c_fc`` for that in ``visual.transformer.….c_fc`` too (open_clip). So
    longer ones that are not planned are excluded, and patterns of shorter ones are anchored.
    """
    linears = [name for name, module in base.named_modules() if isinstance(module, (*LINEAR_TYPES, LoraLayer))]
    longer = {name: [other for other in linears if other.endswith(f".{name}")] for name in ranks}
    odd = {f"^{re.escape(name)}" if longer[name] else name: r for name, r in ranks.items() if r != rank}
    excluded = sorted({other for others in longer.values() for other in others if other not in ranks})
    return LoraConfig(
        r=rank,
        lora_alpha=_whole_number(rank * scaling),
        target_modules=list(ranks),
        exclude_modules=excluded or None,
        rank_pattern=odd,
        alpha_pattern={name: _whole_number(r * scaling) for name, r in odd.items()},
        lora_dropout=0.0,
        bias="none",
    )


def _whole_number(value: float) -> float:
    """Return the value as an int where it is one: what most readers of ``adapter_config.json`` expect."""
    return int(value) if value == int(value) else value


def _with_lora(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    """Return the model with PEFT's layers on it, this adapter active."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    model.base_model.__class__ = ContextLoraModel  # PEFT makes its own; this one differs in a single method
    return model


def _fill(layer: LoraLayer, init: AdapterInit, adapter_name: str, protect: Protect, *, offset: bool) -> None:
    """Give one PEFT layer its starting point."""
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if protect == "strict":
        weight_a.data.copy_(init.A0)
        weight_b.data.zero_()
        # PEFT's own list of what stays frozen: it is honoured again whenever adapters are switched.
        layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {adapter_name: ("lora_A",)}
        weight_a.requires_grad_(False)
        layer.lora_variant[adapter_name] = ContextLora()
        return
    if protect == "whitened":
        assert init.whitening is not None, "_check_options sees to it"
        weight_a.data.copy_(init.whitening.undo(init.A0))
        weight_b.data.zero_()
        frozen = {"lora_Q": init.whitening.vectors.to(weight_a), "lora_lengths": init.whitening.lengths.to(weight_a)}
    else:
        root = layer.scaling[adapter_name] ** 0.5
        A0, B0 = (init.A0, init.B0) if root == 1 else (init.A0 / root, init.B0 / root)
        frozen = {"lora_A0": A0.to(weight_a), "lora_B0": B0.to(weight_b)}  # the plan's own memory where it can be
        weight_a.data.copy_(frozen["lora_A0"])
        weight_b.data.copy_(frozen["lora_B0"])
    for key, value in frozen.items():
        if not hasattr(layer, key):
            setattr(layer, key, BufferDict({}, persistent=True))
            layer.other_param_names = (*layer.other_param_names, key)  # what PEFT's delete_adapter takes away
        getattr(layer, key)[adapter_name] = value
    if offset:
        layer.lora_variant[adapter_name] = ContextLora()


def _subtract_(base: Any, init: AdapterInit) -> None:
    """Take ``B0 A0`` away from the weight of a base layer."""
    component = (init.B0 @ init.A0).to(base.weight.device)
    base.weight.data -= (component.T if isinstance(base, Conv1D) else component).to(base.weight.dtype)


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of one layer's change, without its scaling: A' (r', n), B' (m, r').

    ``protect="start"``: ``[A; A − A0]`` and ``[B − B0, B0]``, r' = 2r. Differences of factors, not of products: exactly zero at the
    start whatever kernels torch picks, and no cancellation later. "whitened": ``Ã P`` and B. Else A and B.
    """
    A, B = (gathered_whole(one[adapter_name].weight) for one in (layer.lora_A, layer.lora_B))  # whole anyway in a forward pass
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


def _check_options(plan: AdapterPlan, protect: str, residual: str) -> None:
    if protect not in ("start", "strict", "whitened"):
        raise ValueError(f'protect is {protect!r}; expected "start", "strict" or "whitened".')
    if residual not in ("offset", "subtract"):
        raise ValueError(f'residual is {residual!r}; expected "offset" or "subtract".')
    if protect != "start" and plan.mode is not Mode.KPM:
        raise ValueError(
            f'protect="{protect}" guards the directions to keep, which mode="{plan.mode}" does not have; use mode="kpm" or protect="start".'
        )
    if protect != "start" and residual == "subtract":
        raise ValueError(
            f'residual="subtract" has nothing to subtract with protect="{protect}", which starts at B = 0; leave residual at "offset".'
        )
    if protect == "whitened" and any(init.whitening is None for init in plan.layers.values()):
        raise ValueError('protect="whitened" needs a plan with the context\'s main directions; make it with plan(..., whiten=True).')


def _check_base(
    model: nn.Module, plan: AdapterPlan, residual: str, quantize: str | None, train_fully: Sequence[str], adapter_name: str
) -> None:
    """Refuse a model that this adapter cannot be put on."""
    base = base_of(model)
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize is {quantize!r}; expected one of {list(KINDS)} or None.")
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(f"The model carries an adapter named {adapter_name!r} already; give this one another adapter_name.")
        if residual == "subtract" or quantize is not None:
            raise ValueError(
                'residual="subtract" and quantize change the base weights, which other adapters on this model need as they are; '
                "leave them out, or attach to a model without adapters."
            )
    for name in train_fully:
        inside = [layer for layer in plan.layers if layer == name or layer.startswith(f"{name}.")]
        if name not in dict(base.named_modules()):
            raise ValueError(f"train_fully names {name!r}, which this model has not; expected full names of modules.")
        if inside:
            raise ValueError(f"train_fully names {name!r}, which holds the planned layer {inside[0]}; leave one of the two out.")
    digest = base_digest(base, plan.layers)
    if digest != plan.provenance["base_digest"]:
        dtype = next(base.parameters()).dtype
        raise ValueError(
            f"The plan was made for base weights {plan.provenance['base_digest'][:12]}…, but this model has {digest[:12]}… ({dtype}): "
            "attach it to the base it was made from, in the same dtype, or make a new plan."
        )
    shared = [name for name in plan.layers if residual == "subtract" and is_shared(base, base.get_submodule(name).weight)]
    if shared:
        raise ValueError(
            f'residual="subtract" would change {shared[0]}, whose weight another module uses too; leave it out with `exclude`.'
        )
    packed = [name for name in plan.layers if is_quantized(base.get_submodule(name))]
    if packed and (residual == "subtract" or quantize is not None):
        raise ValueError(
            f'residual="subtract" and quantize change the base weights, but {packed[0]} is quantised already; '
            'use residual="offset" without quantize, or the unquantised model.'
        )
    if quantize is not None:
        check_quantizable(base, plan.layers)


def _check_whole(model: PeftModel, train_fully: Sequence[str], adapter_name: str) -> None:
    others = whole_modules(model, adapter_name).keys() - set(train_fully)
    if others:
        raise ValueError(f"PEFT trains {min(others)} whole, asked for was {list(train_fully)}; please report this model.")


def _check_layers(found: dict[str, int], planned: dict[str, int]) -> None:
    wrong = {name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name)}
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"PEFT gave {name} the rank {found.get(name)}, planned was {planned.get(name)}; please report this model's layer names."
        )
