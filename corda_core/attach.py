"""Put an adapter plan on a model as a PEFT LoRA."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from corda_core.bases import base_digest, check_same, check_unchanged, check_untouched, other_tensors
from corda_core.decompose import Mode
from corda_core.linears import (
    FourBit,
    base_of,
    check_present,
    check_quantizable,
    expert_of,
    is_quantized,
    is_shared,
    quantize_linears_,
    unwrapped,
    weight_matrix,
)
from corda_core.lora import (
    NOT_PLAIN,
    ContextLoraModel,
    Protect,
    by_stack,
    fill,
    fill_experts,
    lora_config,
    peft_layers,
    whole_modules,
)
from corda_core.plan import AdapterInit, AdapterPlan


class Residual(StrEnum):
    """What becomes of the base's weights; see ``attach``."""

    OFFSET = "offset"
    """They stay."""
    SUBTRACT = "subtract"
    """``W`` less the planned component is written into them (as published)."""


@dataclass(frozen=True)
class Attachment:
    """What ``attach`` was called with: all that loading the adapter again takes, but for what was trained."""

    plan: AdapterPlan
    alpha: float
    protect: Protect
    residual: Residual
    quantize: FourBit | None
    train_fully: tuple[str, ...]
    rest: Mapping[str, str] | None = None
    """What else the base held (``other_tensors``); None in files that version 0.1.0 wrote."""

    def __post_init__(self) -> None:
        options: tuple[tuple[str, type[StrEnum]], ...] = (("protect", Protect), ("residual", Residual), ("quantize", FourBit))
        for name, kind in options:
            value = getattr(self, name)
            if value not in ([None, *kind] if name == "quantize" else list(kind)):
                raise ValueError(f"{name} is {value!r}; expected one of {[str(known) for known in kind]}.")
            object.__setattr__(self, name, None if value is None else kind(value))  # frozen from here on
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; expected a finite number above 0.")
        if not all(isinstance(text, str) for text in dict(self.rest or {}).values()):
            raise TypeError(f"rest is {self.rest!r}; expected a description of each tensor.")


def attach(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    alpha: float | None = None,
    protect: Protect | str = Protect.START,
    residual: Residual | str = Residual.OFFSET,
    quantize: FourBit | str | None = None,
    train_fully: Sequence[str] = (),
    adapter_name: str = "default",
) -> PeftModel:
    """Return the model with the planned adapters on it; its outputs are bit for bit what they were.

    - ``protect="start"`` (as published): A and B train from A0 and B0; the change is ``s (B A − B0 A0)``, s = alpha / r.
    - ``protect="strict"``: A stays frozen at A0, whose rows carry the least context energy, and B trains from 0; the change
      is ``s B A0``, an ordinary LoRA with half the trainable parameters.
    - ``protect="whitened"``: the change is ``s B Ã P``, P ∝ (C + λI)^(−1/2). Ã trains from ``A0 P⁻¹``, which is strict's start, and B
      from 0; whatever they become, ``‖ΔW (C + λI)^(1/2)‖_F ≈ s √μ₀ ‖B Ã‖_F`` is small where the factors are.
    - ``protect="none"``: A trains from A0 and B from 0; the change is ``s B A``, an ordinary LoRA in every way.

    In "start", A0 and B0 are the plan's divided by √s each, so that ``s B0 A0`` is the planned component whatever alpha is.

    Args:
        model: The base that the plan was made from, or an equal copy; or one that carries other adapters, which stay and become inactive.
        plan: As from ``corda_core.plan``.
        alpha: LoRA's alpha; None takes the rank, so s = 1.
        protect: "start", "strict", "whitened" or "none"; the second and third need a plan in KPM, "whitened" one made with
            ``whiten=True``; a plan of ``random_plan`` takes "none".
        residual: "offset" leaves the base weights alone. "subtract" writes ``W`` less the planned component into them, the papers' form:
            one product less per step, but equal to the base only up to rounding.
        quantize: "nf4" or "fp4": bitsandbytes holds the adapted layers' base weights in 4 bits from here on. With
            ``residual="subtract"`` it is the residual that is quantised (Q-CorDA); the outputs are then those of quantised weights.
        train_fully: Modules that train whole beside the adapters (a projector), by their full names; PEFT's ``modules_to_save``.
        adapter_name: PEFT's name for the adapter.

    Raises:
        ValueError: If the plan belongs to another base, options contradict each other, or PEFT adapted other layers.
    """
    attachment = Attachment(plan, plan.rank if alpha is None else alpha, protect, residual, quantize, tuple(train_fully))  # type: ignore[arg-type]
    return attach_again(model, attachment, adapter_name)


def attach_again(model: nn.Module, attachment: Attachment, adapter_name: str = "default") -> PeftModel:
    """Return the model with an adapter attached as it once was, at its start.

    Raises:
        ValueError: If the base is not the one that the adapter was attached to, in its other tensors too where they are recorded.
    """
    _check(model, attachment, adapter_name)
    rest = _rest(model, attachment)
    if attachment.rest is not None:
        check_same(attachment.rest, rest)
    return _put_on(model, replace(attachment, rest=rest), adapter_name)


def check_base_kept(model: nn.Module, adapter_name: str = "default") -> None:
    """Refuse to write an adapter whose base has changed since it was attached: the file would lack that. A plain LoRA is not checked.

    Raises:
        ValueError: If a tensor of the base has changed.
    """
    attachment = find_attachment(model, adapter_name)
    if attachment is not None and attachment.rest is not None:
        check_unchanged(attachment.rest, _rest(model, attachment))


def _rest(model: nn.Module, attachment: Attachment) -> dict[str, str]:
    """Return what the base holds beside the adapted layers and what trains whole."""
    return other_tensors(base_of(model), attachment.plan.layers, attachment.train_fully)


def _put_on(model: nn.Module, attachment: Attachment, adapter_name: str) -> PeftModel:
    """Return the model, which has been checked, with the adapter on it."""
    base, plan, residual = base_of(model), attachment.plan, attachment.residual
    ranks = {name: init.rank for name, init in plan.layers.items()}
    config = lora_config(base, ranks, plan.rank, attachment.alpha / plan.rank)
    config.modules_to_save = list(attachment.train_fully) or None
    peft_model = _with_lora(unwrapped(model), config, adapter_name)
    layers = {name: layer for name, (_, layer) in peft_layers(peft_model, adapter_name).items()}
    stacks = by_stack(plan.layers)
    singles = {name: r for name, r in ranks.items() if expert_of(name) is None}
    _check_layers(
        {name: layer.r[adapter_name] for name, layer in layers.items()},
        singles | {stack: max(init.rank for init in inits.values()) for stack, inits in stacks.items()},
    )
    _check_whole(peft_model, attachment.train_fully, adapter_name)
    if residual is Residual.SUBTRACT:
        for name, layer in layers.items():
            _subtract_(layer.get_base_layer(), plan.layers[name])
    if attachment.quantize is not None:  # PEFT has layers of its own kind on quantised ones
        base = peft_model.unload()
        quantize_linears_(base, plan.layers, attachment.quantize)
        base.is_loaded_in_4bit = True  # where PEFT looks for whether to take them
        peft_model = _with_lora(base, config, adapter_name)
        base.is_loaded_in_4bit = False  # transformers would look for its own quantiser
        layers = {name: layer for name, (_, layer) in peft_layers(peft_model, adapter_name).items()}
    for stack, inits in stacks.items():
        fill_experts(layers.pop(stack), inits, adapter_name, attachment.protect)
    for name, layer in layers.items():
        fill(layer, plan.layers[name], adapter_name, attachment.protect, offset=residual is Residual.OFFSET)
    if attachment.protect in (Protect.START, Protect.WHITENED):
        peft_model.peft_config[adapter_name].init_lora_weights = NOT_PLAIN
    peft_model.peft_config[adapter_name].corda = attachment  # no field of PEFT's config: it is not written to its JSON
    return peft_model


def attachment_of(model: nn.Module, adapter_name: str = "default") -> Attachment:
    """Return what an adapter was attached with.

    Raises:
        ValueError: If the model carries no CorDA adapter of this name.
    """
    attachment = find_attachment(model, adapter_name)
    if attachment is None:
        raise ValueError(f"The model carries no CorDA adapter named {adapter_name!r}; expected one from prepare, attach or load.")
    return attachment


def find_attachment(model: nn.Module, adapter_name: str) -> Attachment | None:
    """Return what an adapter was attached with; None for one that is not ours."""
    attachment: Attachment | None = getattr(getattr(unwrapped(model), "peft_config", {}).get(adapter_name), "corda", None)
    return attachment


def _with_lora(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    """Return the model with PEFT's layers on it, this adapter active."""
    with warnings.catch_warnings():  # PEFT honours patterns for parameters, but says that they match nothing
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name)
    model.base_model.__class__ = ContextLoraModel  # PEFT makes its own; this one differs in a single method
    return model


def _subtract_(base: Any, init: AdapterInit) -> None:
    """Take ``B0 A0`` away from the weight of a base layer."""
    component = (init.B0 @ init.A0).to(base.weight.device)
    base.weight.data -= (component.T if isinstance(base, Conv1D) else component).to(base.weight.dtype)


def _check(model: nn.Module, attachment: Attachment, adapter_name: str) -> None:
    """Refuse options that contradict each other, and a model that this adapter cannot be put on."""
    check_options(attachment.plan.mode, attachment.protect, attachment.residual)
    check_experts(attachment.plan.layers, attachment.protect, attachment.residual, attachment.quantize)
    if attachment.protect is Protect.WHITENED and any(init.whitening is None for init in attachment.plan.layers.values()):
        raise ValueError('protect="whitened" needs a plan made with whiten=True: plan(..., whiten=True).')
    _check_others(unwrapped(model), attachment, adapter_name)
    base = base_of(model)
    check_present(base, attachment.plan.layers, "The plan")
    _check_train_fully(base, attachment)
    _check_digest(base, attachment.plan)
    _check_writable(base, attachment)


def check_options(mode: Mode, protect: Protect, residual: Residual) -> None:
    """Refuse what contradicts itself, known before anything is computed.

    Raises:
        ValueError: If there is nothing to protect, or nothing to subtract.
    """
    if (mode is Mode.LORA and protect is not Protect.NONE) or (protect is Protect.NONE and residual is Residual.SUBTRACT):
        raise ValueError(
            f'mode={str(mode)!r}, protect={str(protect)!r} and residual={str(residual)!r} do not go together: mode="lora" starts with B '
            'at zero, where there is nothing to protect or to subtract; it goes with protect="none" and residual="offset".'
        )
    if protect in (Protect.STRICT, Protect.WHITENED) and (mode is not Mode.KPM or residual is Residual.SUBTRACT):
        raise ValueError(
            f'protect="{protect}" goes with mode="kpm" and residual="offset", not with {str(mode)!r} and {str(residual)!r}: '
            "else there is no direction to keep, or nothing to subtract."
        )


def check_experts(names: Iterable[str], protect: Protect, residual: Residual, quantize: FourBit | None) -> None:
    """Refuse for fused experts what PEFT's adapters on parameters cannot hold, known before anything is computed.

    Raises:
        ValueError: If there are experts, and they would have to keep an offset or to be quantised.
    """
    expert = next((name for name in names if expert_of(name)), None)
    if expert is None or (protect in (Protect.STRICT, Protect.NONE) and residual is Residual.OFFSET and quantize is None):
        return
    raise ValueError(
        f"{expert} is a fused expert, whose adapter PEFT cannot hold with protect={str(protect)!r}, residual={str(residual)!r}, "
        f'quantize={quantize and str(quantize)!r}: use protect="strict" with mode="kpm" or protect="none", without the other two, or '
        "leave the experts out."
    )


def _check_others(model: nn.Module, attachment: Attachment, adapter_name: str) -> None:
    """Refuse other adapters on the model that cannot stand beside this one."""
    if not isinstance(model, PeftModel):
        check_untouched(model)
        return
    if adapter_name in model.peft_config:
        raise ValueError(f"The model carries an adapter named {adapter_name!r} already; give this one another adapter_name.")
    if attachment.residual is Residual.SUBTRACT or attachment.quantize is not None:
        raise ValueError(
            'residual="subtract" and quantize change the base weights, which other adapters on this model need as they are; '
            "leave them out, or attach to a model without adapters."
        )


def _check_train_fully(base: nn.Module, attachment: Attachment) -> None:
    modules = dict(base.named_modules())
    for name in attachment.train_fully:
        inside = [layer for layer in attachment.plan.layers if layer == name or layer.startswith(f"{name}.")]
        if name not in modules:
            raise ValueError(f"train_fully names {name!r}, which this model does not have; expected full names of modules.")
        if inside:
            raise ValueError(f"train_fully names {name!r}, which holds the planned layer {inside[0]}; leave one of the two out.")


def _check_digest(base: nn.Module, plan: AdapterPlan) -> None:
    digest = base_digest(base, plan.layers)
    if digest != plan.provenance["base_digest"]:
        dtype = next(base.parameters()).dtype
        raise ValueError(
            f"The plan was made for base weights {plan.provenance['base_digest'][:12]}…, but this model has {digest[:12]}… ({dtype}): "
            "attach it to the base it was made from, in the same dtype, or make a new plan."
        )


def _check_writable(base: Any, attachment: Attachment) -> None:
    """Refuse what would change base weights that another module needs, or that cannot be changed."""
    layers, subtracts = attachment.plan.layers, attachment.residual is Residual.SUBTRACT
    shared = [name for name in layers if subtracts and is_shared(base, base.get_submodule(name).weight)]
    if shared:
        raise ValueError(
            f'residual="subtract" would change {shared[0]}, whose weight another module uses too; leave it out with `exclude`.'
        )
    tied = next((stack for stack in by_stack(layers) if is_shared(base, weight_matrix(base, f"{stack}[0]"))), None)
    if tied is not None:
        raise ValueError(f"{tied} is a parameter of another module too, which merging would change; leave it out with `exclude`.")
    packed = [name for name in layers if expert_of(name) is None and is_quantized(base.get_submodule(name))]
    if packed and (subtracts or attachment.quantize is not None):
        raise ValueError(
            f'residual="subtract" and quantize change the base weights, but {packed[0]} is quantised already; '
            'use residual="offset" without quantize, or the unquantised model.'
        )
    if attachment.quantize is not None:
        check_quantizable(base, layers)


def _check_whole(model: PeftModel, train_fully: Sequence[str], adapter_name: str) -> None:
    others = whole_modules(model, adapter_name).keys() - set(train_fully)
    if others:
        raise ValueError(f"PEFT trains {min(others)} whole, asked for was {list(train_fully)}; please report this model.")


def _check_layers(ranks: dict[str, int], planned: dict[str, int]) -> None:
    wrong = {name for name in ranks.keys() | planned.keys() if ranks.get(name) != planned.get(name)}
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"PEFT gave {name} the rank {ranks.get(name)}, planned was {planned.get(name)}; please report this model's layer names."
        )
