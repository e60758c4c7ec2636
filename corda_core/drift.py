"""How far a trained adapter has moved each layer on the context that was to be kept."""

from collections.abc import Mapping

from torch import Tensor, nn

from corda_core.adapter import change_factors, lora_layers
from corda_core.covariance import Covariance


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
        base = layer.get_base_layer().weight.detach().to(A)
        weight = base.T if getattr(layer, "fan_in_fan_out", False) else base
        C = covariances[name].packed
        changed = _trace(B.T @ B, A @ C.times(A.T.contiguous()))
        drift[name] = (changed.clamp(min=0) / (C.times(weight.T.contiguous()) * weight.T).sum()).sqrt().item()
    return drift


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """Return ``tr(left · right)`` of symmetric matrices."""
    return (left * right).sum()
