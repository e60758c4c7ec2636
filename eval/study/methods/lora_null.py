"""LoRA-Null (arXiv 2503.02659): the adapter gets what W makes of the inputs that the context has least of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corda_core import attach, factors
from corda_core.decompose import Decomposition
from corda_eval.study.starts import plan_from
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class LoraNull:
    """Options of LoRA-Null."""

    rank: Count
    version: Literal["v1", "v2"] = "v1"
    """"v1" trains A and B; "v2" leaves A as it starts, so that it stays in the null space: half the trainable parameters."""
    context: Sequence[str] = ()
    """Domains that the covariances are taken from, together; by default all that is kept."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with ``B0 A0 = W Q Qᵀ``, Q (n, r) the eigenvectors of the r smallest eigenvalues of C; unchanged at the start.

        ``B0 = U √Σ`` and ``A0 = √Σ Vᵀ`` from ``W Q Qᵀ = U Σ Vᵀ``.

        Raises:
            ValueError: If the version or a domain is unknown, or the rank below 1.

        Note:
            Published as the residual ``W − B0 A0`` plus ``B A``; here ``W + B A − B0 A0``, which is the same function. With A frozen that
            is ``W + (B − B0) A0``, where B − B0 trains from 0: the same steps under Adam, which knows no origin without weight decay.
        """
        if self.version not in ("v1", "v2"):
            raise ValueError(f'The version of LoRA-Null is {self.version!r}; expected "v1" or "v2".')
        covariances = task.covariances(*(self.context or task.default_context("kpm")))
        adapter = plan_from(task, self.rank, lambda name, W, r: null_factors(W, least_used(covariances[name].matrix, r)))
        return Adapted(attach(task.model, adapter, protect="start" if self.version == "v1" else "strict"))


def least_used(C: Tensor, count: int) -> Tensor:
    """Return the eigenvectors Q (n, count) of the smallest eigenvalues of C (n, n), float64."""
    return torch.linalg.eigh(C.double()).eigenvectors[:, :count]


def null_factors(W: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return A0 (r, n) and B0 (m, r) with ``B0 A0 = W Q Qᵀ``, from its singular value decomposition; Q (n, r) orthonormal, r ≤ m.

    Note:
        Where W gives nothing for a direction of Q, A's row is 0 and B's column has the mean scale, as in ``corda_core.factors``.
    """
    U, sigma, Vt = torch.linalg.svd(W @ Q, full_matrices=False)
    return factors(Decomposition(U, sigma, sigma[:, None] * (Vt @ Q.T), slice(0, len(sigma)), fell_back=False))
