"""L2-SP (arXiv 1802.01483) on LoRA: a penalty on the distance from the base, ``λ Σ_l ‖B_l A_l‖²_F``, of the products and not the factors.

A penalty on the factors is weight decay, which ``lora`` has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_core.lora import lora_layers
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, Positive


@dataclass(frozen=True)
class L2Sp:
    """Options of L2-SP."""

    rank: Count
    strength: Positive
    """λ."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA on the task's layers, and the penalty."""
        model = attach_variant(task, config_for(task, self.rank))
        layers = list(lora_layers(model).values())

        def penalty() -> Tensor:
            pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]) for layer in layers]
            return self.strength * torch.stack([scaling**2 * squared_norm(A, B) for A, B, scaling in pairs]).sum()

        return Adapted(model, penalty=penalty)


def squared_norm(A: Tensor, B: Tensor) -> Tensor:
    """Return ``‖B A‖²_F = tr(BᵀB · A Aᵀ)`` of A (r, n) and B (m, r), from products of (r, r)."""
    return (B.T @ B * (A @ A.T)).sum()
