"""Left singular vectors of ``P = W C``: all by an exact solver, or the r largest or smallest by iteration with a check.

W (m, n), C (n, n) symmetric positive, k = min(m, n). What is small matters here: the smallest singular values of ``W C`` lie up to
nine orders of magnitude below the largest, so all that touches them is float64. The largest bear float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from corda_core.covariance import DampedCovariance
from corda_core.symmetric import Symmetric

TOLERANCE = 5e-4
"""Relative context energy ‖U_Sᵀ W C‖² that an iteration may still have to gain when it stops."""
MAX_ROUNDS = 30


def spectrum(W: Tensor, C: DampedCovariance) -> Tensor:
    """Return the singular values σ (k,) of ``W C``, descending, from the eigenvalues of its Gram matrix in float64."""
    _, small = _product(W, C)
    return torch.linalg.eigvalsh(small @ small.T).flip(0).clamp(min=0).sqrt()


def exact(W: Tensor, C: DampedCovariance, chosen: slice) -> tuple[Tensor, Tensor]:
    """Return the chosen U_S (m, r) and σ_S (r,), from the eigenvectors of the Gram matrix in float64.

    Where a chosen σ is too small for the Gram matrix, which squares it, the singular value decomposition is taken instead.
    """
    left, small = _product(W, C)
    eigenvalues, vectors = torch.linalg.eigh(small @ small.T)
    sigma, U = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if (sigma[chosen] < 1e-6 * sigma[0]).any():
        U, sigma, _ = torch.linalg.svd(small, full_matrices=False)
    U, sigma = U[:, chosen], sigma[chosen]
    return (U if left is None else left @ U), sigma


def largest(W: Tensor, C: DampedCovariance, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the r largest U_S (m, r) and σ_S (r,) by randomised subspace iteration; None if it did not settle.

    ``P Pᵀ X = W C C Wᵀ X`` is applied factor by factor: W C is never formed (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    W = W.float()
    X = _random(len(W), _width(rank, min(W.shape)), W)
    settled = _Settling()
    for _ in range(MAX_ROUNDS):
        X = torch.linalg.qr(X).Q
        Y = C.times(W.T @ X)
        ritz, rotation = torch.linalg.eigh((Y.T @ Y).double())
        ritz, rotation = ritz.flip(0)[:rank], rotation.flip(1)[:, :rank]
        if settled.after(float(ritz.sum())):
            basis = torch.linalg.qr(X.double() @ rotation).Q
            return basis, ritz.clamp(min=0).sqrt()
        X = W @ C.times(Y)
    return None


def smallest(W: Tensor, C: DampedCovariance, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the r smallest U_S (m, r) and σ_S (r,) by block inverse iteration; None if it did not settle or failed its check.

    For m ≥ n on ``(Pᵀ P)⁻¹ = C⁻¹ (Wᵀ W)⁻¹ C⁻¹``, with Cholesky factors of C and WᵀW: both are far better conditioned than their
    product, which is never formed. For m < n on ``(P Pᵀ)⁻¹ = L⁻ᵀ L⁻¹``, L from the Gram matrix, or from ``Pᵀ = Q Lᵀ`` where
    squaring loses too much.
    The check: the energy that the inverse promises, ``Σ 1/θ``, is the energy that ``W C`` shows.
    """
    solvers = _inverse_tall(W, C) if W.shape[0] >= W.shape[1] else _inverse_wide(W, C)
    if solvers is None:
        return None
    solve, lift = solvers
    k = min(W.shape)
    X = _random(k, _width(rank, k), W)
    settled = _Settling()
    for _ in range(MAX_ROUNDS):
        X = torch.linalg.qr(X).Q
        Z = solve(X)
        theta = torch.linalg.eigvalsh(X.T @ Z).flip(0)[:rank]
        if not torch.isfinite(theta).all() or (theta <= 0).any():
            return None
        promised = float((1 / theta).sum())
        X = Z
        if settled.after(promised):
            break
    else:
        return None
    U = torch.linalg.qr(lift(X)).Q
    shown = C.times(W.T @ U)
    rotation, sigma, _ = torch.linalg.svd(shown.T, full_matrices=False)
    U, sigma = U @ rotation[:, -rank:], sigma[-rank:]
    return (U, sigma) if float(sigma.square().sum()) <= (1 + 5 * TOLERANCE) * promised else None


class _Settling:
    """Tells when a monotone sequence of energies is within TOLERANCE of where it goes, if it goes on geometrically."""

    def __init__(self) -> None:
        self.energies: list[float] = []

    def after(self, energy: float) -> bool:
        """Take the next energy and return whether the sequence has settled."""
        self.energies.append(energy)
        if len(self.energies) < 3:
            return False
        before, last = (abs(b - a) for a, b in zip(self.energies[-3:], self.energies[-2:], strict=False))
        ratio = min(last / before, 0.95) if before > 0 else 0.0
        return last * ratio / (1 - ratio) <= TOLERANCE * energy and last <= 10 * TOLERANCE * energy


def _inverse_tall(W: Tensor, C: DampedCovariance) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Return ``X -> (Pᵀ P)⁻¹ X`` and ``V -> left singular vectors``, or None where a factor is singular."""
    chol_c, chol_w = _cholesky(C.dense(W.dtype, W.device)), _cholesky(Symmetric.gram(W).dense())
    if chol_c is None or chol_w is None:
        return None

    def solve_wc(X: Tensor) -> Tensor:
        return _solve(chol_w, _solve(chol_c, X))

    return lambda X: _solve(chol_c, solve_wc(X)), lambda V: W @ solve_wc(V)


def _inverse_wide(W: Tensor, C: DampedCovariance) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """Return ``X -> (P Pᵀ)⁻¹ X`` and the identity, or None where ``W C`` has not full rank."""
    transposed = C.times(W.T.contiguous())
    lower = _cholesky(Symmetric.gram(transposed).dense(), tolerance=1e-4)
    if lower is None:  # squaring lost too much
        lower = torch.linalg.qr(transposed, mode="r").R.T
        diagonal = lower.diagonal().abs()
        if diagonal.min() <= 1e-14 * diagonal.max():
            return None
    return lambda X: _solve(lower, X), lambda X: X


def _cholesky(matrix: Tensor, tolerance: float = 1e-7) -> Tensor | None:
    """Return the lower factor L, or None where its diagonal spreads so far that float64 solves would be inaccurate."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = lower.diagonal()
    return None if failed or diagonal.min() <= tolerance * diagonal.max() else lower


def _solve(lower: Tensor, X: Tensor) -> Tensor:
    """Return ``(L Lᵀ)⁻¹ X``."""
    return torch.linalg.solve_triangular(lower.T, torch.linalg.solve_triangular(lower, X, upper=False), upper=True)


def _product(W: Tensor, C: DampedCovariance) -> tuple[Tensor | None, Tensor]:
    """Return ``(Q, R C)`` with ``W = Q R`` for a tall W, else ``(None, W C)``: Q times left singular vectors are those of W C."""
    left, small = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    return left, C.times(small.T.contiguous()).T


def _width(rank: int, k: int) -> int:
    """Return how many vectors are iterated for r wanted ones: the more, the fewer rounds."""
    return min(k, 2 * rank + 8)


def _random(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the same random start on each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)
