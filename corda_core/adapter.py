"""Put an adapter plan on a model as a PEFT LoRA, and write the trained change as an ordinary LoRA for the untouched base."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from corda_core.decompose import Mode
from corda_core.files import replacing_in
from corda_core.modules import LINEAR_TYPES, base_digest, is_quantized
from corda_core.plan import AdapterInit, AdapterPlan
from corda_core.whiten import shortened

Protect = Literal["start", "strict", "whitened"]
Residual = Literal["offset", "subtract"]

NOT_PLAIN = "a CorDA adapter in training is no plain LoRA: write it with corda_core.export, and load what that wrote"
"""Stands in the saved config where PEFT expects a way to initialise: plain PEFT then refuses the folder with this sentence,
instead of loading ``B A`` without the frozen ``B0 A0`` and being silently wrong."""


class ContextLora(LoraVariant):
    """LoRA whose factors are made from what trains and what is frozen, and whose change is zero at the start.

    - ``protect="start"``: ``W x + s (B A − B0 A0) x``, computed as ``s [B − B0, B0] [A; A − A0] x``. The papers write
      ``(W − B0 A0) x + B A x``: the same function, but here the base weight is never written and the start is bit-identical to the
      base in any precision.
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


def attach(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    alpha: float | None = None,
    protect: Protect = "start",
    residual: Residual = "offset",
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
        model: The base that the plan was made from, or an equal copy.
        plan: As from ``corda_core.plan``.
        alpha: LoRA's alpha; None takes the rank, so s = 1.
        protect: "start", "strict" or "whitened"; the latter two need a plan in KPM, "whitened" one made with ``whiten=True``.
        residual: "offset" leaves the base weights alone. "subtract" writes ``W − s B0 A0`` into them, the papers' form:
            one product less per step, but equal to the base only up to rounding.
        adapter_name: PEFT's name for the adapter.

    Raises:
        ValueError: If the plan belongs to another base, options contradict each other, or PEFT adapted other layers.
    """
    _check_options(plan, protect, residual)
    if residual == "subtract" and any(is_quantized(model.get_submodule(name)) for name in plan.layers):
        raise ValueError('residual="subtract" changes the base weights, which are quantised; use residual="offset".')
    digest = base_digest(model, plan.layers)
    if digest != plan.provenance["base_digest"]:
        raise ValueError(
            f"The plan was made for base weights {plan.provenance['base_digest'][:12]}…, but this model has {digest[:12]}…: "
            "attach it to the base it was made from, or make a new plan."
        )
    alpha = plan.rank if alpha is None else alpha
    scaling = alpha / plan.rank
    ranks = {name: init.rank for name, init in plan.layers.items()}
    peft_model = get_peft_model(model, _lora_config(model, ranks, plan.rank, scaling), adapter_name=adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    _check_layers({name: layer.r[adapter_name] for name, layer in layers.items()}, ranks)
    for name, layer in layers.items():
        _fill(layer, plan.layers[name], adapter_name, protect, subtract=residual == "subtract")
    if protect != "strict":
        peft_model.peft_config[adapter_name].init_lora_weights = NOT_PLAIN
    return peft_model


def base_of(model: nn.Module) -> Any:
    """Return the model that PEFT has put adapters into, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the layers that carry this adapter, by their full names in the base model."""
    return {name: layer for name, layer in base_of(model).named_modules() if isinstance(layer, LoraLayer) and adapter_name in layer.r}


def change_factors(layer: LoraLayer, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """Return the change of one layer against the untouched base as ``(A', B')``, ``ΔW = B' A'`` (m, n), float32, scaling included."""
    A, B = _factors(layer, adapter_name)
    return A.detach().float(), B.detach().float() * layer.scaling[adapter_name]


def export(model: PeftModel, path: str | os.PathLike[str], *, adapter_name: str = "default") -> Path:
    """Write the change as an ordinary LoRA for the untouched base, and return its folder.

    ``[A; A − A0]``, ``[B − B0, B0]``: rank 2r for ``protect="start"``, r for "strict". The scaling is folded into B, so alpha equals
    the rank in every layer and each consumer reads the same function. Files are replaced one by one, whole or not at all.

    Raises:
        ValueError: If the model carries no adapter of this name.
    """
    layers = lora_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"The model carries no LoRA adapter named {adapter_name!r}; there is nothing to export.")
    tensors, ranks = {}, {}
    for name, layer in layers.items():
        A, B = change_factors(layer, adapter_name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.cpu().contiguous()
        ranks[name] = len(A)
    config = _lora_config(model.get_base_model(), ranks, max(ranks.values()), scaling=1.0)
    config.base_model_name_or_path = model.peft_config[adapter_name].base_model_name_or_path
    config.task_type = model.peft_config[adapter_name].task_type
    config.fan_in_fan_out = model.peft_config[adapter_name].fan_in_fan_out
    config.inference_mode = True
    folder = Path(path)
    with replacing_in(folder) as fresh:  # weights before the config, which names what is whole
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(fresh)
    return folder


def _lora_config(base: nn.Module, ranks: dict[str, int], rank: int, scaling: float) -> LoraConfig:
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
        lora_alpha=_whole(rank * scaling),
        target_modules=list(ranks),
        exclude_modules=excluded or None,
        rank_pattern=odd,
        alpha_pattern={name: _whole(r * scaling) for name, r in odd.items()},
        lora_dropout=0.0,
        bias="none",
    )


def _whole(value: float) -> float:
    """Return the value as an int where it is one: what most readers of ``adapter_config.json`` expect."""
    return int(value) if value == int(value) else value


def _fill(layer: LoraLayer, init: AdapterInit, adapter_name: str, protect: Protect, *, subtract: bool) -> None:
    """Give one PEFT layer its starting point."""
    weight_a, weight_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if protect == "strict":
        weight_a.data.copy_(init.A0)
        weight_b.data.zero_()
        # PEFT's own list of what stays frozen: it is honoured again whenever adapters are switched.
        layer.frozen_peft_weight_names = layer.frozen_peft_weight_names | {adapter_name: ("lora_A",)}
        weight_a.requires_grad_(False)
        return
    if protect == "whitened":
        assert init.whitening is not None, "_check_options sees to it"
        weight_a.data.copy_(init.whitening.undo(init.A0))
        weight_b.data.zero_()
        frozen = {"lora_Q": init.whitening.vectors.to(weight_a), "lora_lengths": init.whitening.lengths.to(weight_a)}
    else:
        root = layer.scaling[adapter_name] ** 0.5
        weight_a.data.copy_(init.A0 / root)
        weight_b.data.copy_(init.B0 / root)
        frozen = {"lora_A0": weight_a.detach().clone(), "lora_B0": weight_b.detach().clone()}
    for key, value in frozen.items():
        if not hasattr(layer, key):
            setattr(layer, key, BufferDict({}, persistent=True))
        getattr(layer, key)[adapter_name] = value
    if subtract:
        base = layer.get_base_layer().weight
        base.data -= layer.get_delta_weight(adapter_name).to(base.dtype)
    else:
        layer.lora_variant[adapter_name] = ContextLora()


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of one layer's change, without its scaling: A' (r', n), B' (m, r').

    ``protect="start"``: ``[A; A − A0]`` and ``[B − B0, B0]``, r' = 2r. Differences of factors, not of products: exactly zero at the
    start whatever kernels torch picks, and no cancellation later. "whitened": ``Ã P`` and B. Else A and B.
    """
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if adapter_name in getattr(layer, "lora_A0", {}):
        A0, B0 = layer.lora_A0[adapter_name], layer.lora_B0[adapter_name]
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    if adapter_name in getattr(layer, "lora_Q", {}):
        return shortened(A, layer.lora_Q[adapter_name], layer.lora_lengths[adapter_name]), B
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


def _check_layers(found: dict[str, int], planned: dict[str, int]) -> None:
    wrong = {name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name)}
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"PEFT gave {name} the rank {found.get(name)}, planned was {planned.get(name)}; please report this model's layer names."
        )
