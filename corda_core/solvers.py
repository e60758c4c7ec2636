"""Singular vectors and values of ``P = W C``: all by an exact solver, or the r largest or smallest by iteration with a check.

W (m, n) of any floating type, C (n, n) symmetric positive, k = min(m, n). Results are in float64: the smallest singular values of ``W C``
lie up to nine orders of magnitude below the largest, and one massive activation puts even the second largest three orders below.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from corda_core.covariance import DampedCovariance, Symmetric, in_float64, off_mps

TOLERANCE = 2e-3
"""Relative squared context energy ‖U_Sᵀ W C‖² that the Ritz values may still have to gain when an iteration stops; what it returns has
been multiplied once more and is nearer."""
HIDDEN_TOLERANCE = 2e-2
"""The same for the smaller half of the largest components, which a few that dominate would hide."""
SMALL = 256
"""Up to this size all eigenvalues are found as fast as a few."""
MAX_BLOCKS = 12
"""Where the Krylov space ends: beyond that the exact solver is cheaper."""


def spectrum(W: Tensor, C: DampedCovariance) -> Tensor:
    """Return the singular values σ (k,) of ``W C``, descending, in float64.

    From the eigenvalues of the Gram matrix, or, where squaring loses the smallest, from the singular value decomposition. What is a
    rounding error there too is 0.
    """
    W = in_float64(W)
    squares = _squares(W, C)
    noise = torch.finfo(squares.dtype).eps * len(squares) * squares[0]
    if float(squares[-1]) > noise:
        return squares.sqrt()
    _, small = _product(W, C)
    return _without_noise(torch.linalg.svdvals(small), small)


def rough_spectrum(W: Tensor, C: DampedCovariance) -> Tensor:
    """Return the singular values σ (k,) of ``W C``, each to about 1e-6 σ₁, descending, in float64; W C in the precision of W."""
    W = off_mps(W)
    return _squares(W if W.dtype == torch.float64 else W.float(), C).clamp(min=0).sqrt()


def _squares(W: Tensor, C: DampedCovariance) -> Tensor:
    """Return σ² (k,) of ``W C``, descending, in float64."""
    transposed = C.times(W.T.contiguous()).double()
    rows = transposed if W.shape[0] <= W.shape[1] else transposed.T
    return torch.linalg.eigvalsh(Symmetric.gram(rows).dense()).flip(0)


def extremes(C: DampedCovariance) -> tuple[float, float]:
    """Return the largest and the smallest eigenvalue of the damped C, to about 1e-2 of themselves.

    The smallest by iteration with the inverse from a factor in float32: the vector it leads to is good enough that its Rayleigh
    quotient, in float64, has hardly any of the factor's rounding errors. Narrow blocks: only one value is wanted.
    """
    n = C.packed.n
    lower = _cholesky(C.dense(torch.float32, C.device), tolerance=1e-3) if n > SMALL else None
    if lower is not None:
        start = _start(n, 4, C.device)
        top = _largest_ritz(C.times, start, 1, lambda theta: theta, tolerance=1e-3)
        bottom = _largest_ritz(lambda X: _solve(lower, X.float()).double(), start, 1, lambda theta: theta, tolerance=1e-3)
        if top is not None and bottom is not None:
            inverse, vector = bottom
            smallest = float((vector * C.times(vector)).sum() / vector.square().sum())
            if abs(smallest * float(inverse[0]) - 1) <= 0.01:
                return float(top[0][0]), smallest
    values = torch.linalg.eigvalsh(C.dense(torch.float64, C.device))
    return float(values[-1]), float(values[0])


def leading(C: DampedCovariance, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (count,), descending, and eigenvectors (n, count) of the damped C, in float64."""
    n = C.packed.n
    if n > SMALL and 4 * count <= n:
        block = _start(n, count + 8, C.device)
        ritz = _largest_ritz(C.times, block, count, lambda theta: theta.flip(0).cumsum(0))
        if ritz is not None:
            basis = torch.linalg.qr(ritz[1]).Q
            projected = basis.T @ C.times(basis)
            values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
            return values.flip(0), basis @ rotation.flip(1)
    values, vectors = torch.linalg.eigh(C.dense(torch.float64, C.device))
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


class Components(NamedTuple):
    """Some components of ``W C``, all in float64."""

    basis: Tensor
    """U_S (m, r), orthonormal columns."""
    sigma: Tensor
    """σ_S (r,), descending."""
    rows: Tensor
    """``U_Sᵀ W`` (r, n)."""


def exact(W: Tensor, C: DampedCovariance, chosen: slice) -> Components:
    """Return the chosen components, from the eigenvectors of the Gram matrix in float64.

    Where a chosen σ is too small for the Gram matrix, which squares it, the singular value decomposition is taken instead; values
    that are rounding errors there too are returned as 0.
    """
    W = in_float64(W)
    left, small = _product(W, C)
    eigenvalues, vectors = torch.linalg.eigh(small @ small.T)
    sigma, U = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if (sigma[chosen] < 1e-6 * sigma[0]).any():
        U, sigma, _ = torch.linalg.svd(small, full_matrices=False)
        sigma = _without_noise(sigma, small)
    basis = U[:, chosen] if left is None else left @ U[:, chosen]
    return Components(basis, sigma[chosen], _transposed_times(W, basis).T)


def largest(W: Tensor, C: DampedCovariance, rank: int) -> Components | None:
    """Return the r largest components by block Krylov iteration; None if it did not settle or failed its check.

    P and Pᵀ are applied in turns, factor by factor, with orthogonalisation after each (Golub and Kahan): W C is never formed, and
    rounding errors stay small beside σ₁, not σ₁². So W of lower precision is iterated in float32 first. Settled is when the energy of all
    is, and that of the last j for every j ≥ r/2, which one that dominates would hide. What is returned has at least these energies in
    float64: that is the check.
    """
    W = off_mps(W)
    for dtype in (torch.float32, torch.float64) if W.dtype != torch.float64 else (torch.float64,):
        settled = _largest_settled(W.to(dtype), C, rank)
        if settled is not None:
            components = _rotated(W.double(), C, settled[1].double())
            shown, promised = components.sigma.square().flip(0).cumsum(0), settled[0].flip(0).cumsum(0)
            if bool((shown >= (1 - TOLERANCE) * promised).all()):
                return components
    return None


def _largest_settled(W: Tensor, C: DampedCovariance, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return ``σ²`` (r,) of the r largest components and vectors (m, r) that span them; None if they did not settle."""
    block = _start(len(W), min(W.shape[1], rank + 8), W.device).to(W)
    limit = min(*W.shape, MAX_BLOCKS * block.shape[1])
    basis, halves = block, C.times(_transposed_times(W, block))
    settled = _Settling([HIDDEN_TOLERANCE] * (rank - rank // 2 - 1) + [TOLERANCE / 2], W.device)
    while True:
        theta, rotation, is_sound = _eigen(halves.double().T @ halves.double(), halves, rank)
        rotation = rotation.to(W)
        sound, has_settled = _read(is_sound, settled.after(theta.flip(0).cumsum(0)[rank // 2 :]))
        if not sound:
            return None
        if has_settled:
            return theta, W @ C.times(torch.linalg.qr(halves @ rotation).Q)
        if basis.shape[1] + block.shape[1] > limit:
            return None
        block = _orthogonal_to(basis, W @ C.times(torch.linalg.qr(halves[:, -block.shape[1] :]).Q))
        basis = torch.cat([basis, block], dim=1)
        halves = torch.cat([halves, C.times(_transposed_times(W, block))], dim=1)


def smallest(W: Tensor, C: DampedCovariance, rank: int) -> Components | None:
    """Return the r smallest components by inverse block Krylov iteration; None if it did not settle or failed its check.

    For m ≥ n on ``(Pᵀ P)⁻¹ = C⁻¹ (Wᵀ W)⁻¹ C⁻¹``, with Cholesky factors of C and WᵀW: both are far better conditioned than their
    product, which is never formed. For m < n on ``(P Pᵀ)⁻¹ = L⁻ᵀ L⁻¹``, L from the Gram matrix, or from ``Pᵀ = Q Lᵀ`` where
    squaring loses too much.
    Two checks: the energy that the inverse promises, ``Σ 1/θ``, has settled; and it is the energy that ``W C`` shows, so the solves
    were right.
    """
    W = off_mps(W)
    solvers = _inverse_tall(W.double(), C) if W.shape[0] >= W.shape[1] else _inverse_wide(W, C)
    if solvers is None:
        return None
    solve, lift = solvers
    block = _start(min(W.shape), rank + 8, W.device)
    ritz = _largest_ritz(solve, block, rank, lambda theta: (1 / theta).sum(0, keepdim=True))
    if ritz is None:
        return None
    theta, vectors = ritz
    components = _rotated(W.double(), C, lift(vectors))
    return components if bool(components.sigma.square().sum() <= (1 + TOLERANCE) * (1 / theta).sum()) else None


def _rotated(W: Tensor, C: DampedCovariance, vectors: Tensor) -> Components:
    """Return the span of the vectors (m, r) as the components of ``W C`` in it."""
    U = torch.linalg.qr(vectors).Q
    columns = _transposed_times(W, U)
    rotation, sigma, _ = torch.linalg.svd(C.times(columns).T, full_matrices=False)
    return Components(U @ rotation, sigma, (columns @ rotation).T)


def _largest_ritz(
    apply: Callable[[Tensor], Tensor],
    block: Tensor,
    rank: int,
    energies: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor] | None:
    """Return the r largest Ritz values (r,), float64, and what the positive operator makes of their vectors (n, r).

    The Krylov space of a random block (n, ≥ r) is widened until the ``energies`` of the values settle (Golub and Underwood 1977), with
    full orthogonalisation. None if they have not when it has MAX_BLOCKS blocks (and 100 columns), or if it is no longer finite.
    """
    limit = min(len(block), max(MAX_BLOCKS * block.shape[1], 100))
    basis, images = block, apply(block)
    settled = _Settling([tolerance], block.device)
    while True:
        projected = basis.T @ images
        theta, rotation, is_sound = _eigen((projected + projected.T) / 2, images, rank)
        sound, has_settled = _read(is_sound, settled.after(energies(theta)))
        if not sound:
            return None
        if has_settled:
            # Applied once more, for nothing: what little a Ritz vector has of unwanted directions would be large in P.
            return theta, images @ rotation
        if basis.shape[1] + block.shape[1] > limit:
            return None
        block = _orthogonal_to(basis, images[:, -block.shape[1] :])
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, apply(block)], dim=1)


def _eigen(matrix: Tensor, images: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest eigenvalues, descending, their vectors, and whether these are positive and the images finite; not read yet."""
    is_finite = torch.isfinite(images).all()
    values, vectors = torch.linalg.eigh(torch.where(is_finite, matrix, 0.0))  # which refuses NaN
    theta = values.flip(0)[:rank]
    return theta, vectors.flip(1)[:, :rank], is_finite & (theta[-1] > 0)


def _read(*flags: Tensor) -> list[bool]:
    """Return what flags say, having waited for their device once."""
    read: list[bool] = torch.stack(flags).tolist()
    return read


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal columns that span the block's part outside the basis."""
    for _ in range(2):  # twice is enough
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


class _Settling:
    """Tells when monotone sequences of energies are all within their tolerances of where they go, if they go on geometrically."""

    def __init__(self, tolerances: Sequence[float], device: torch.device) -> None:
        self.tolerances = torch.tensor(tolerances, dtype=torch.float64, device=device)
        self.not_yet = torch.zeros((), dtype=torch.bool, device=device)
        self.energies: list[Tensor] = []

    def after(self, energies: Tensor) -> Tensor:
        """Take the next energies, all positive, and return whether every sequence has settled, not read off its device."""
        self.energies = [*self.energies[-2:], energies]
        if len(self.energies) < 3:
            return self.not_yet
        before, last = (self.energies[1] - self.energies[0]).abs(), (self.energies[2] - self.energies[1]).abs()
        ratio = (last / before.clamp(min=torch.finfo(before.dtype).tiny)).clamp(max=0.95)
        room = self.tolerances * energies
        return (last * ratio / (1 - ratio) <= room).all() & (last <= 10 * room).all()


def _inverse_tall(W: Tensor, C: DampedCovariance) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Return ``X -> (Pᵀ P)⁻¹ X`` and ``V -> left singular vectors``, or None where a factor is singular."""
    (chol_c, sound_c), (chol_w, sound_w) = _factor(C.dense(W.dtype, W.device)), _factor(Symmetric.gram(W).dense())
    if not all(_read(sound_c, sound_w)):
        return None

    def solve_wc(X: Tensor) -> Tensor:
        return _solve(chol_w, _solve(chol_c, X))

    return lambda X: _solve(chol_c, solve_wc(X)), lambda V: W @ solve_wc(V)


def _inverse_wide(W: Tensor, C: DampedCovariance) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Return ``X -> (P Pᵀ)⁻¹ X`` and the identity, or None where ``W C`` has not full rank; W of any type, for the sake of memory."""
    transposed = C.times(W.T.contiguous().double())
    lower = _cholesky(Symmetric.gram(transposed).dense(), tolerance=1e-4)
    if lower is None:  # squaring lost too much
        lower = torch.linalg.qr(transposed, mode="r").R.T
        diagonal = lower.diagonal().abs()
        if diagonal.min() <= 1e-14 * diagonal.max():
            return None
    return lambda X: _solve(lower, X), lambda X: X


def _cholesky(matrix: Tensor, tolerance: float = 1e-7) -> Tensor | None:
    """Return the lower factor L, or None where its diagonal spreads so far that float64 solves would be inaccurate."""
    lower, is_sound = _factor(matrix, tolerance)
    return lower if bool(is_sound) else None


def _factor(matrix: Tensor, tolerance: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Return L as ``_cholesky`` does, and whether it is of use, not read off its device."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = lower.diagonal()
    return lower, (failed == 0) & (diagonal.min() > tolerance * diagonal.max())


def _solve(lower: Tensor, X: Tensor) -> Tensor:
    """Return ``(L Lᵀ)⁻¹ X``."""
    return torch.linalg.solve_triangular(lower.T, torch.linalg.solve_triangular(lower, X, upper=False), upper=True)


def _transposed_times(W: Tensor, X: Tensor) -> Tensor:
    """Return ``Wᵀ X`` for few columns X: in this order up to ten times faster on CPUs than ``W.T @ X``."""
    return (X.T @ W).T


def _product(W: Tensor, C: DampedCovariance) -> tuple[Tensor | None, Tensor]:
    """Return ``(Q, R C)`` with ``W = Q R`` for a tall W, else ``(None, W C)``: Q times left singular vectors are those of W C."""
    left, small = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    return left, C.times(small.T.contiguous()).T


def _without_noise(sigma: Tensor, matrix: Tensor) -> Tensor:
    """Return the matrix's singular values, descending, with 0 for those that are rounding errors."""
    return sigma * (sigma > torch.finfo(sigma.dtype).eps * max(matrix.shape) * sigma[0])


def _start(n: int, columns: int, device: torch.device) -> Tensor:
    """Return the same random orthonormal columns (n, at most n) on each call, in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(n, min(n, columns), generator=generator, dtype=torch.float64).to(device)).Q
