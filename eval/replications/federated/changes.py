"""Low-rank changes of one layer: their mean, the nearest of rank r, and that which a gradient suggests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """A change of a weight as a product ``B A`` (m, n): sums are kept as stacked factors, and nothing (m, n) is formed."""

    A: Tensor
    """(r, n)."""
    B: Tensor
    """(m, r)."""

    def __add__(self, other: "Change") -> "Change":
        return Change(torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1))

    def __rmul__(self, factor: float) -> "Change":
        return Change(self.A, factor * self.B)

    def __sub__(self, other: "Change") -> "Change":
        return self + -1 * other

    def dense(self) -> Tensor:
        """Return ``B A``."""
        return self.B @ self.A

    def norm(self) -> float:
        """Return ``‖B A‖_F``, to rounding in float64 even where the stacked terms cancel."""
        return float((torch.linalg.qr(self.B.double()).R @ torch.linalg.qr(self.A.T.double()).R.T).norm())


Changes = dict[str, Change]
"""By full layer name."""


def average_changes(changes: Sequence[Change]) -> Change:
    """Return ``(1/C) Σ_c B_c A_c``, exactly: the factors side by side, of rank C r.

    Note:
        All clients count alike; the paper weighs them by their numbers of samples, which here are equal.
    """
    return 1 / len(changes) * sum(changes[1:], start=changes[0])


def average_factors(changes: Sequence[Change]) -> Change:
    """Return ``((1/C) Σ_c B_c) ((1/C) Σ_c A_c)``, FedAvg on LoRA's parameters: not the mean of the products."""
    return Change(torch.stack([change.A for change in changes]).mean(0), torch.stack([change.B for change in changes]).mean(0))


def truncated(change: Change, rank: int) -> Change:
    """Return ``SVD_r(B A)``, the nearest change of rank r (Eckart and Young), as ``B = U √Σ``, ``A = √Σ Vᵀ``; fewer where B A has fewer.

    By QR of both factors and the SVD of the small product of their triangles, in float64.
    """
    (left, inner), (right, outer) = torch.linalg.qr(change.B.double()), torch.linalg.qr(change.A.T.double())
    U, sigma, Vh = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    A, B = root[:, None] * (Vh[:rank] @ right.T), left @ U[:, :rank] * root
    return Change(A.to(change.A), B.to(change.B))


def aligned(gradient: Tensor, rank: int, gamma: float) -> Change:
    """Return LoRA-GA's start for a gradient ``U Σ Vᵀ`` (m, n): ``A = m^¼ γ^(−½) V_(1…r)ᵀ``, ``B = m^¼ γ^(−½) U_(r+1…2r)`` (paper, eq. 8).

    Where there are no 2r components, those of B begin again at the first.

    Raises:
        ValueError: If r is larger than min(m, n).
    """
    m, k = len(gradient), min(gradient.shape)
    if rank > k:
        raise ValueError(f"A rank of {rank} is more than the {k} components of a gradient of shape {tuple(gradient.shape)}; lower it.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the randomised decomposition
        U, _, V = torch.svd_lowrank(gradient, min(k, 2 * rank + 8), niter=4)
    scale = m**0.25 / gamma**0.5
    return Change(scale * V[:, :rank].T, scale * U[:, torch.arange(rank, 2 * rank) % k])
