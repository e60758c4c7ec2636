"""Base weights in 4 bits, and what that costs: of the weights themselves, and of what is left when a component is taken out (Q-CorDA)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.layerwise import over_layers
from corda_core.plan import AdapterPlan
from corda_core.progress import Progress, no_progress

KINDS = ("nf4", "fp4")
BLOCK = 64
"""Weights that share one scale in bitsandbytes."""


@dataclass(frozen=True)
class QuantizationError:
    """What quantising one layer changes, as a part of the layer: ``‖X − Q(X)‖_F / ‖W‖_F``, and the same after ``C^(1/2)``."""

    base: float
    """X = W."""
    residual: float
    """X = W − B0 A0."""
    base_on_context: float | None = None
    """``‖(W − Q(W)) C^(1/2)‖_F / ‖W C^(1/2)‖_F``: by what part outputs on the context change; None without a covariance."""
    residual_on_context: float | None = None
    """The same with X = W − B0 A0."""


def quantize_linears_(model: nn.Module, names: Iterable[str], kind: str = "nf4") -> None:
    """Replace the named linear layers by bitsandbytes' layers of 4 bits with doubly quantised scales, as in QLoRA.

    Args:
        model: Changed in place; layers that are not named stay.
        names: Full names of ``nn.Linear`` layers in float32, bfloat16 or float16.
        kind: "nf4" or "fp4".

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If a layer cannot be held in 4 bits; nothing has changed then.
    """
    bnb = _bitsandbytes()
    names = list(names)
    check_quantizable(model, names)
    for name in names:
        layer: Any = model.get_submodule(name)
        weight, bias = layer.weight.data, layer.bias
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias is not None, compute_dtype=weight.dtype, quant_type=kind, device="meta"
        )
        packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=True, module=packed)
        packed.bias = bias
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed.to(weight.device).train(layer.training))


def check_quantizable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that ``quantize_linears_`` cannot take.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If a layer is of another kind, or its rows are no whole blocks.
    """
    _bitsandbytes()
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be quantised here; leave it out with `exclude`.")
        if layer.in_features % BLOCK:
            raise ValueError(
                f"{name} has {layer.in_features} inputs; to be quantised it needs a multiple of {BLOCK}: leave it out with `exclude`."
            )


def quantization_errors(
    model: nn.Module,
    plan: AdapterPlan,
    kind: str = "nf4",
    covariances: Mapping[str, Covariance] | None = None,
    *,
    progress: Progress = no_progress,
) -> dict[str, QuantizationError]:
    """Return layer by layer what 4 bits change: in the base, and in the residual that Q-CorDA quantises; the model stays as it is.

    Args:
        model: The base that the plan was made from, unquantised.
        plan: The components that are taken out.
        kind: "nf4" or "fp4".
        covariances: Those of the plan's layers, to tell the error on the context too.
        progress: As in ``plan``.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
    """
    functional = _bitsandbytes().functional

    def errors(name: str, weight: Tensor) -> QuantizationError:
        W, init = weight.float(), plan.layers[name]
        found = []
        for X in (W, W - (init.B0 @ init.A0).to(W)):
            packed, state = functional.quantize_4bit(X.contiguous(), quant_type=kind, compress_statistics=True)
            found.append(X - functional.dequantize_4bit(packed, state).to(X))
        parts = [float(error.norm() / W.norm()) for error in found]
        if covariances is None:
            return QuantizationError(*parts)
        energy = partial(_energy, covariances[name])
        return QuantizationError(*parts, *((energy(error) / energy(W)) ** 0.5 for error in found))

    return over_layers(model, list(plan.layers), errors, progress, "quantisation error")


def _energy(covariance: Covariance, X: Tensor) -> float:
    """Return ``‖X C^(1/2)‖_F²``."""
    return float((covariance.packed.times(X.T.contiguous()) * X.T).sum(dtype=torch.float64))


def _bitsandbytes() -> ModuleType:
    # Imported here: it belongs to the extra `quantized`.
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Quantising needs bitsandbytes, which is not installed; run: pip install 'corda-vlm[quantized]'"
        ) from error
    return bitsandbytes
