"""Coordinates in which directions that the context uses are short, so that training moves little along them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corda_core import solvers
from corda_core.covariance import Covariance

TOLERANCE = 0.1
"""How far ``P (C + λI)^(1/2) / √μ₀`` may be from the identity, in any direction."""


@dataclass(frozen=True)
class Whitening:
    """``P = √μ₀ (C + λI)^(−1/2)`` as the identity minus few directions, ``I − Q diag(1 − √(μ₀/μ)) Qᵀ``; never a dense matrix."""

    vectors: Tensor
    """Q (n, q) float32: the eigenvectors of C that are shortened."""

    lengths: Tensor
    """``√(μ₀/μ)`` (q,) float32, at most 1: how long they become; μ their eigenvalues of C + λI, μ₀ what the others count as."""

    unit: float
    """``√μ₀``, so that ``‖A P (C + λI)^(1/2)‖ ≈ √μ₀ ‖A‖``."""

    error: float
    """Bound of ``‖P (C + λI)^(1/2) / √μ₀ − I‖₂``."""

    def to(self, device: torch.device | str) -> "Whitening":
        """Return P on another device."""
        return replace(self, vectors=self.vectors.to(device), lengths=self.lengths.to(device))

    def apply(self, A: Tensor) -> Tensor:
        """Return ``A P`` (r, n)."""
        return shortened(A, self.vectors, self.lengths)

    def undo(self, A: Tensor) -> Tensor:
        """Return ``A P⁻¹`` (r, n)."""
        return shortened(A, self.vectors, 1 / self.lengths)


def shortened(A: Tensor, vectors: Tensor, lengths: Tensor) -> Tensor:
    """Return A (r, n) with its parts along the orthonormal vectors (n, q) scaled by the lengths (q,)."""
    return A + (A @ vectors * (lengths - 1)) @ vectors.T


def whitening(covariance: Covariance, *, damping: float = 0.01) -> Whitening:
    """Return P for this context, with as many directions as TOLERANCE asks for.

    The eigenvalues of C that are left out lie in [0, c], and ``μ₀ = √(λ (c + λ))`` stands for them all: wrong by a factor of at most
    ``((c + λ)/λ)^(1/4)`` in length. So C's directions count down to ``c = ((1 + TOLERANCE)⁴ − 1) λ``.

    Args:
        covariance: C (n, n).
        damping: λ of ``Covariance.damped``; it says how small an eigenvalue still counts.

    Raises:
        ValueError: If C is zero or not finite, or damping is not positive, where lengths could become infinite.
    """
    if damping <= 0:
        raise ValueError(f"damping is {damping}; whitening needs it positive, as the covariance may be singular without.")
    C = covariance.damped(damping)
    n, cut = C.packed.n, (1 + TOLERANCE) ** 4 * C.ridge
    count = min(n, 32)
    values, vectors = solvers.leading(C, count)
    while count < n and values[-1] > cut:
        count = min(n, 2 * count)
        values, vectors = solvers.leading(C, count)
    kept = int((values > cut).sum())
    rest = max(float(values[kept]), C.ridge) if kept < count else C.ridge
    unit = (C.ridge * rest) ** 0.25
    lengths = unit / values[:kept].sqrt()
    return Whitening(vectors[:, :kept].float().contiguous(), lengths.float(), unit, (rest / C.ridge) ** 0.25 - 1)
