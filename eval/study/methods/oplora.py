"""OPLoRA (arXiv 2510.13003): LoRA whose change leaves W's largest singular triples exactly as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from corda_core import decompose, lora_layers
from corda_core.layers import no_progress, over_layers
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.starts import even_context
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Oplora:
    """Options of OPLoRA."""

    rank: Count
    preserved: Count
    """k: how many of W's largest singular triples stay."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with ``W + P_L B A P_R``, ``P_L = I − U_k U_kᵀ``, ``P_R = I − V_k V_kᵀ``; unchanged at the start (B = 0).

        So ``U_kᵀ ΔW = 0`` and ``ΔW V_k = 0`` whatever A and B become, and ``(W + ΔW) vᵢ = σᵢ uᵢ`` for i ≤ k.

        Raises:
            ValueError: If the rank is below 1, or k below 1 or not below min(m, n) of each layer, where nothing would be left to train.
        """
        triples = over_layers(task.model, task.layers, lambda _, W: leading_directions(W, self.preserved), no_progress, "decompose")
        model = attach_variant(task, config_for(task, self.rank))
        for name, layer in lora_layers(model).items():
            left, right = (vectors.to(layer.lora_A["default"].weight) for vectors in triples[name])
            register_parametrization(layer.lora_A["default"], "weight", RowsWithout(right))
            register_parametrization(layer.lora_B["default"], "weight", ColumnsWithout(left))
        return Adapted(model)


class RowsWithout(nn.Module):
    """``A (I − V Vᵀ)`` of A (r, n) and orthonormal V (n, k); in A's own precision under automatic casting too."""

    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, A: Tensor) -> Tensor:
        """Return the projected rows (r, n)."""
        with torch.autocast(A.device.type, enabled=False):
            return A - (A @ self.vectors) @ self.vectors.T


class ColumnsWithout(RowsWithout):
    """``(I − U Uᵀ) B`` of B (m, r) and orthonormal U (m, k)."""

    def forward(self, B: Tensor) -> Tensor:
        """Return the projected columns (m, r)."""
        return super().forward(B.T).T


def leading_directions(W: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return U_k (m, k) and V_k (n, k) of W's largest singular values, orthonormal, float64.

    Raises:
        ValueError: If k is not in 1 … min(m, n) − 1.
    """
    if not 1 <= count < min(W.shape):
        raise ValueError(
            f"preserved is {count}, but W is {tuple(W.shape)}: expected 1 to {min(W.shape) - 1}, so that there is something to preserve "
            "and something left to train."
        )
    leading = decompose(W, even_context(W.shape[1]), count, "ipm", damping=0, solver="exact")
    return leading.basis, torch.linalg.qr(leading.rows.T).Q
