"""How far a trained adapter has moved each layer on the context that was to be kept."""

from collections.abc import Mapping

from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.lora import base_of, change_factors, lora_layers
from corda_core.modules import weight_matrix


def context_drift(
    model: nn.Module,
    covariances: Mapping[str, Covariance],
    adapter_name: str = "default",
    energies: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return ``‖ΔW C^(1/2)‖_F / ‖W C^(1/2)‖_F`` per layer: the root mean square of ``ΔW x`` over that of ``W x`` on the context.

    Computed from the factors, ``‖B A C^(1/2)‖² = tr(BᵀB · A C Aᵀ)``. W is the weight the base layer holds now.

    Args:
        model: A model with a LoRA adapter, ours or PEFT's.
        covariances: Undamped C of the context, by full layer name.
        adapter_name: Which adapter.
        energies: ``output_energies`` of the same, if known: they are most of the work.

    Raises:
        KeyError: If an adapted layer has no covariance.
    """
    energies = output_energies(model, covariances, adapter_name) if energies is None else energies
    drift = {}
    for name, layer in lora_layers(model, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        changed = _trace(B.T @ B, A @ covariances[name].packed.times(A.T.contiguous()))
        drift[name] = float(changed.clamp(min=0).sqrt()) / energies[name]
    return drift


def weight_change(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖ΔW‖_F / ‖W‖_F`` per layer: the size of the change where there is no context; W as in ``context_drift``."""
    found = {}
    for name, layer in lora_layers(model, adapter_name).items():
        A, B = change_factors(layer, adapter_name)
        changed = _trace(B.T @ B, A @ A.T)
        found[name] = float(changed.clamp(min=0).sqrt() / weight_matrix(base_of(model), name).float().norm())
    return found


def output_energies(model: nn.Module, covariances: Mapping[str, Covariance], adapter_name: str = "default") -> dict[str, float]:
    """Return ``‖W C^(1/2)‖_F`` of each adapted layer's base weight: the root mean square of ``W x`` on the context."""
    energies = {}
    for name in lora_layers(model, adapter_name):
        weight = weight_matrix(base_of(model), name).float()
        energies[name] = float((covariances[name].packed.times(weight.T.contiguous()) * weight.T).sum().sqrt())
    return energies


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """Return ``tr(left · right)`` of symmetric matrices."""
    return (left * right).sum()
