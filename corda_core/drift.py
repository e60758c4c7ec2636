"""How far an adapter moves its layers' outputs on the context."""

from collections.abc import Mapping

from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.linears import base_of, weight_matrix
from corda_core.lora import change_factors, lora_layers


def context_drift(model: nn.Module, covariances: Mapping[str, Covariance], adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F`` per layer: the root mean square of ``ΔW x`` over that of ``W x`` on the context.

    Computed from the factors, ``‖B A C^(1/2)‖² = tr(BᵀB · A C Aᵀ)``. W is the weight the base layer holds now.

    Args:
        model: A model with a LoRA adapter, ours or PEFT's.
        covariances: Undamped C of the context, by full layer name.
        adapter_name: Which adapter.

    Raises:
        KeyError: If an adapted layer has no covariance.
    """
    drift = {}
    for name, layer in lora_layers(model, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        C, transposed = covariances[name].packed, weight_matrix(base_of(model), name).float().T.contiguous()
        changed = _trace(B.T @ B, A @ C.times(A.T.contiguous()))
        drift[name] = float(changed.clamp(min=0).sqrt() / (C.times(transposed) * transposed).sum().sqrt())
    return drift


def weight_change(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖ΔW‖_F / ‖W‖_F`` per layer: the size of the change where there is no context; W as in ``context_drift``."""
    sizes = {}
    for name, layer in lora_layers(model, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        changed = _trace(B.T @ B, A @ A.T)
        sizes[name] = float(changed.clamp(min=0).sqrt() / weight_matrix(base_of(model), name).float().norm())
    return sizes


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """Return ``tr(left · right)`` of symmetric matrices."""
    return (left * right).sum()
