"""What 4 bits cost: of the weights themselves, and of what is left when a component is taken out (Q-CorDA)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.layers import Progress, no_progress, over_layers
from corda_core.linears import bitsandbytes
from corda_core.plan import AdapterPlan


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
    functional = bitsandbytes().functional

    def errors(name: str, weight: Tensor) -> QuantizationError:
        W, init = weight.float(), plan.layers[name]
        lost = []
        for X in (W, W - (init.B0 @ init.A0).to(W)):
            packed, state = functional.quantize_4bit(X.contiguous(), quant_type=kind, compress_statistics=True)
            lost.append(X - functional.dequantize_4bit(packed, state).to(X))
        parts = [float(error.norm() / W.norm()) for error in lost]
        if covariances is None:
            return QuantizationError(*parts)
        energy = partial(_energy, covariances[name])
        return QuantizationError(*parts, *((energy(error) / energy(W)) ** 0.5 for error in lost))

    return over_layers(model, list(plan.layers), errors, progress, "quantisation error")


def _energy(covariance: Covariance, X: Tensor) -> float:
    """Return ``‖X C^(1/2)‖_F²``."""
    return float((covariance.packed.times(X.T.contiguous()) * X.T).sum(dtype=torch.float64))
