"""Context-oriented decomposition (CorDA, arXiv 2406.05223, section 3.3), without a matrix inverse.

The paper takes ``SVD(W C) = U Σ Vᵀ`` and ``W = U Σ (Vᵀ C⁻¹)``, and gives the adapter the components S: the last r in
knowledge-preserved mode (KPM), the first r in instruction-previewed mode (IPM). From the left ``Σ_S Vᵀ_S C⁻¹ = U_Sᵀ W``: the
inverse cancels, ``B A = U_S U_Sᵀ W``, and only left singular vectors of ``W C`` are needed. They are eigenvectors of the
Gram matrix ``(W C)(W C)ᵀ``, computed in float64.
Throughout: W (m, n), C (n, n), k = min(m, n).
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from corda_core.covariance import Covariance, in_float64


class Mode(StrEnum):
    """Which components of ``W C`` the adapter gets."""

    KPM = "kpm"
    """Knowledge-preserved: those that matter least for the context, which is what to keep."""
    IPM = "ipm"
    """Instruction-previewed: those that matter most for the context, which is what to learn."""

    def components(self, k: int, rank: int) -> slice:
        """Return which of k components in descending order are taken; empty for rank 0."""
        return slice(k - rank, k) if self is Mode.KPM else slice(0, rank)


class Split(StrEnum):
    """How the scale of ``B A`` is shared between its factors."""

    BALANCED = "balanced"
    """``B = U_S √N``, ``A = N^(−1/2) U_Sᵀ W``, N = norms of the rows of ``U_Sᵀ W``: does not depend on the scale of C."""
    PAPER = "paper"
    """``B = U_S √Σ_S``, ``A = Σ_S^(−1/2) U_Sᵀ W``: as published."""


@dataclass(frozen=True)
class Decomposition:
    """The spectrum of ``W C`` and the chosen left singular vectors."""

    spectrum: Tensor
    """σ (k,), descending."""

    components: slice
    """Which of the k components were chosen."""

    basis: Tensor
    """U_S (m, r), orthonormal columns in descending order of σ."""


def decompose(weight: Tensor, covariance: Covariance, rank: int, mode: Mode | str, *, damping: float = 0.01) -> Decomposition:
    """Return the r components of ``W C`` that the mode asks for, exactly, in float64.

    C is damped first (``Covariance.damped``). For m > n the Gram matrix is taken of ``R C`` with ``W = Q R``: small, and
    the vectors ``Q U`` are orthonormal even where ``W C`` is rank-deficient.

    Args:
        weight: W (m, n), any floating type.
        covariance: C (n, n) of the inputs.
        rank: r, 0 … min(m, n).
        mode: "kpm" or "ipm".
        damping: λ, relative to the mean of C's diagonal.

    Raises:
        ValueError: If the shapes do not fit, the rank is out of range, or C is zero or not finite.
    """
    m, n = weight.shape
    k = min(m, n)
    if covariance.matrix.shape != (n, n):
        raise ValueError(
            f"the weight has {n} inputs but the covariance is {tuple(covariance.matrix.shape)}; they belong to different layers."
        )
    if not 0 <= rank <= k:
        raise ValueError(f"rank {rank} is outside 0 … min(m, n) = {k}.")
    matrix = covariance.damped(damping)
    trace = matrix.diagonal().sum()
    if not torch.isfinite(trace) or trace <= 0:
        raise ValueError(f"the covariance has trace {trace.item():.3g}: its inputs are all zero or not finite; check the context samples.")
    left, small = _reduce(in_float64(weight))
    product = small @ matrix
    eigenvalues, vectors = torch.linalg.eigh(product @ product.T)
    spectrum = eigenvalues.flip(0).clamp(min=0).sqrt()
    components = Mode(mode).components(k, rank)
    basis = vectors.flip(1)[:, components]
    return Decomposition(spectrum, components, basis if left is None else left @ basis)


def factors(weight: Tensor, decomposition: Decomposition, split: Split | str = Split.BALANCED) -> tuple[Tensor, Tensor]:
    """Return A0 (r, n) and B0 (m, r) in float32 with ``B0 A0 = U_S U_Sᵀ W``.

    Raises:
        ValueError: If the paper's split meets a component with σ = 0, where its A does not exist.

    Note:
        A component in which W itself is zero has ``U_Sᵀ W = 0``: its row of A is zero and its column of B gets the mean
        scale of the others, so that A can still learn.
    """
    basis = decomposition.basis
    rows = basis.T @ in_float64(weight)
    if Split(split) is Split.PAPER:
        scale = decomposition.spectrum[decomposition.components]
        if (scale <= 0).any():
            raise ValueError('a chosen component has the singular value 0, where split="paper" divides by it; use split="balanced".')
    else:
        scale = rows.norm(dim=1)
        dead = scale <= torch.finfo(scale.dtype).eps * scale.max() if len(scale) else scale.bool()
        scale = torch.where(dead, scale[~dead].mean() if (~dead).any() else torch.ones_like(scale), scale)
    root = scale.sqrt()
    return (rows / root[:, None]).float().contiguous(), (basis * root).float().contiguous()


def _reduce(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return ``(Q, R)`` of a tall W, or ``(None, W)``: the left singular vectors of ``W C`` are Q times those of ``R C``."""
    if weight.shape[0] <= weight.shape[1]:
        return None, weight
    left, small = torch.linalg.qr(weight)
    return left, small
