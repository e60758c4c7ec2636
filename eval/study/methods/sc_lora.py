"""SC-LoRA (arXiv 2505.23724): the adapter writes where outputs differ most for what is learned, and least for what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corda_core import Covariance, attach
from corda_eval.study.starts import plan_from
from corda_eval.study.task import TARGET, Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class ScLora:
    """Options of SC-LoRA."""

    rank: Count
    beta: float
    """β in [0, 1]: 0 looks only at what is learned, 1 only at what is to be kept."""
    context: Sequence[str] = ()
    """Domains that are to be kept, together; by default all that is kept."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with ``B0 = Q``, ``A0 = Qᵀ W``, A and B training; unchanged at the start.

        Q (m, r): the eigenvectors of the r largest eigenvalues of ``(1 − β) Cov₊ − β Cov₋``, covariances of the layer's outputs for what is
        learned (+) and for what is to be kept (−).

        Raises:
            ValueError: If β is outside [0, 1], a domain unknown, or the rank below 1.

        Note:
            Cov is the uncentred ``W C Wᵀ``, C that of the inputs: a bias, which the paper's models do not have, is left out. Both are
            means over tokens as they are, not scaled to one trace. Published as the residual ``W − B0 A0`` plus ``B A``; here
            ``W + B A − B0 A0``, which is the same function.
        """
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; expected 0 (only what is learned counts) to 1 (only what is kept does).")
        learned, kept = task.covariances(TARGET), task.covariances(*(self.context or task.default_context("kpm")))

        def start(name: str, W: Tensor, r: int) -> tuple[Tensor, Tensor]:
            Q = constrained_subspace(W, learned[name], kept[name], self.beta, r)
            return Q.T @ W, Q

        return Adapted(attach(task.model, plan_from(task, self.rank, start)))


def constrained_subspace(W: Tensor, learned: Covariance, kept: Covariance, beta: float, rank: int) -> Tensor:
    """Return Q (m, r) orthonormal, which maximises ``tr Qᵀ ((1 − β) W C₊ Wᵀ − β W C₋ Wᵀ) Q``; W (m, n) float64, C± (n, n)."""
    transposed = W.T.contiguous()
    weighted = (1 - beta) * learned.packed.times(transposed) - beta * kept.packed.times(transposed)
    reward = W @ weighted
    return torch.linalg.eigh((reward + reward.T) / 2).eigenvectors[:, -rank:].flip(1)
