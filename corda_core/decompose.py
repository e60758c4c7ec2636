"""Context-oriented decomposition (CorDA, arXiv 2406.05223, section 3.3), without a matrix inverse.

The paper takes ``SVD(W C) = U Σ Vᵀ`` and ``W = U Σ (Vᵀ C⁻¹)``, and gives the adapter the components S: the last r in
knowledge-preserved mode (KPM), the first r in instruction-previewed mode (IPM). From the left ``Σ_S Vᵀ_S C⁻¹ = U_Sᵀ W``: the
inverse cancels, ``B A = U_S U_Sᵀ W``, and only left singular vectors of ``W C`` are needed; ``solvers.py`` finds them. ``Whitening`` is
for training in coordinates in which directions that the context uses are short, so that little moves along them.
Throughout: W (m, n), C (n, n), k = min(m, n).
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from corda_core import solvers
from corda_core.covariance import Covariance, DampedCovariance, in_float64


class Mode(StrEnum):
    """Which components of ``W C`` the adapter gets."""

    KPM = "kpm"
    """Knowledge-preserved: those that matter least for the context, which is what to keep."""
    IPM = "ipm"
    """Instruction-previewed: those that matter most for the context, which is what to learn."""
    LORA = "lora"
    """None: A is random and B zero, as LoRA's (``corda_core.plan.random_plan``)."""

    def components(self, k: int, rank: int) -> slice:
        """Return which of k components in descending order are taken; empty for rank 0.

        Raises:
            ValueError: If the mode takes none.
        """
        if self is Mode.LORA:
            raise ValueError('mode="lora" starts at random and decomposes nothing; expected "kpm" or "ipm" here.')
        return slice(k - rank, k) if self is Mode.KPM else slice(0, rank)


class Split(StrEnum):
    """How the scale of ``B A`` is shared between its factors."""

    BALANCED = "balanced"
    """``B = U_S √N``, ``A = N^(−1/2) U_Sᵀ W``, N = norms of the rows of ``U_Sᵀ W``: does not depend on the scale of C."""
    PAPER = "paper"
    """``B = U_S √Σ_S``, ``A = Σ_S^(−1/2) U_Sᵀ W``: as published."""


class Solver(StrEnum):
    """How the singular vectors are found."""

    EXACT = "exact"
    """All of them, from the Gram matrix in float64."""
    PARTIAL = "partial"
    """Only the r wanted, by iteration; a result that fails its check is replaced by the exact one."""
    AUTO = "auto"
    """"partial" where that is faster: layers of 256 or more, ranks below a sixth of that; else "exact"."""

    def iterates(self, k: int, rank: int) -> bool:
        """Whether r of k components are to be found by iteration."""
        if self is Solver.AUTO:
            return k >= 256 and 6 * rank <= k
        return self is Solver.PARTIAL


@dataclass(frozen=True)
class Decomposition:
    """The components of ``W C`` that were asked for."""

    basis: Tensor
    """U_S (m, r), orthonormal columns in descending order of σ, float64."""

    sigma: Tensor
    """σ_S (r,), descending, float64."""

    rows: Tensor
    """``U_Sᵀ W`` (r, n), float64."""

    components: slice
    """Which of the k components, in descending order, these are."""

    fell_back: bool
    """Whether the iteration failed its check, so that the exact solver did the work after all."""


def decompose(
    weight: Tensor, covariance: Covariance, rank: int, mode: Mode | str, *, damping: float = 0.01, solver: Solver | str = Solver.AUTO
) -> Decomposition:
    """Return the r components of ``W C`` that the mode asks for.

    C is damped first (``Covariance.damped``).

    Args:
        weight: W (m, n), any floating type.
        covariance: C (n, n) of the inputs.
        rank: r, 0 … min(m, n).
        mode: "kpm" or "ipm".
        damping: λ, relative to the mean of C's diagonal.
        solver: "exact", "partial" or "auto". The context energy ‖U_Sᵀ W C‖_F of "partial" is within 1.001 (KPM) and 0.999 (IPM) of
            that of "exact".

    Raises:
        ValueError: If the shapes do not fit, the rank is out of range, or C is zero or not finite.

    Note:
        Float64 on the weight's own device, whatever its speed there (consumer GPUs: 1/64 of float32): the smallest singular values
        of ``W C`` lie up to 1e9 below the largest; only the iteration for the largest ones is in float32. On MPS, which has no
        float64, on the CPU.
    """
    C = damped_for(weight, covariance, damping)
    k = min(weight.shape)
    if not 0 <= rank <= k:
        raise ValueError(f"rank {rank} is outside 0 … min(m, n) = {k}.")
    chosen = Mode(mode).components(k, rank)
    if rank == 0:
        empty = in_float64(weight[:, :0])
        return Decomposition(empty, empty[0], in_float64(weight[:0]), chosen, fell_back=False)
    iterate = Solver(solver).iterates(k, rank)
    components = (solvers.smallest if Mode(mode) is Mode.KPM else solvers.largest)(weight, C, rank) if iterate else None
    if components is not None:
        return Decomposition(*components, chosen, fell_back=False)
    return Decomposition(*solvers.exact(weight, C, chosen), chosen, fell_back=iterate)


def spectrum(weight: Tensor, covariance: Covariance, *, damping: float = 0.01) -> Tensor:
    """Return all singular values σ (k,) of ``W C`` with the damped C, descending, float64, without vectors.

    Raises:
        ValueError: If the shapes do not fit, or C is zero or not finite.

    Note:
        Values that are rounding errors, below about 1e-13 σ₁, are returned as 0.
    """
    return solvers.spectrum(weight, damped_for(weight, covariance, damping))


def factors(decomposition: Decomposition, split: Split | str = Split.BALANCED) -> tuple[Tensor, Tensor]:
    """Return A0 (r, n) and B0 (m, r) in float32 with ``B0 A0 = U_S U_Sᵀ W``.

    Raises:
        ValueError: If the paper's split meets a component with σ = 0, where its A does not exist.

    Note:
        A component in which W itself is zero has ``U_Sᵀ W = 0``: its row of A is zero and its column of B gets the mean
        scale of the others, so that A can still learn.
    """
    basis, rows = decomposition.basis, decomposition.rows
    if Split(split) is Split.PAPER:
        scale = decomposition.sigma
        if (scale <= 0).any():
            raise ValueError('a chosen component has the singular value 0, where split="paper" divides by it; use split="balanced".')
    else:
        scale = rows.norm(dim=1)
        alive = scale > torch.finfo(scale.dtype).eps * scale.max() if len(scale) else scale.bool()
        mean = torch.where(alive, scale, 0).sum() / alive.sum().clamp(min=1)
        scale = torch.where(alive, scale, torch.where(alive.any(), mean, 1))
    root = scale.sqrt()
    return (rows / root[:, None]).float().contiguous(), (basis * root).float().contiguous()


def damped_for(weight: Tensor, covariance: Covariance, damping: float) -> DampedCovariance:
    """Return the damped C once it is known that it belongs to the weight and that the weight is finite."""
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds values that are not finite; look at the checkpoint.")
    if covariance.packed.n != weight.shape[1]:
        raise ValueError(
            f"the weight has {weight.shape[1]} inputs but the covariance has {covariance.packed.n} rows and columns; "
            "they belong to different layers."
        )
    return covariance.damped(damping)


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
