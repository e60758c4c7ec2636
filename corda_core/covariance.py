"""Second moments of layer inputs: one object that accumulates, one that is the result.

"Covariance" is the papers' word for the *uncentred* second moment ``C = E[x xᵀ]``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_core.symmetric import Symmetric


@dataclass(frozen=True)
class Covariance:
    """The uncentred second moment of one layer's inputs."""

    packed: Symmetric
    """C (n, n), its upper half."""

    num_tokens: int
    """Over how many tokens the mean was taken."""

    @staticmethod
    def of(matrix: Tensor, num_tokens: int) -> "Covariance":
        """Return the covariance with this C (n, n)."""
        return Covariance(Symmetric.of(matrix), num_tokens)

    @property
    def matrix(self) -> Tensor:
        """C (n, n), put together anew on each call."""
        return self.packed.dense()

    def damped(self, damping: float) -> "DampedCovariance":
        """Return ``C + λ · mean(diag C) · I`` (CorDA, section 3.3, with a fixed λ).

        Raises:
            ValueError: If C is zero or not finite.

        Note:
            The paper doubles λ until a float32 inverse is accurate. No inverse is taken here, so λ stays what it is.
        """
        mean = float(in_float64(self.packed.diagonal()).mean())
        if not 0 < mean < float("inf"):
            raise ValueError(
                f"the covariance has trace {mean * self.packed.n:.3g}: its inputs are all zero or not finite; check the context samples."
            )
        return DampedCovariance(self.packed, mean, damping * mean)


@dataclass(frozen=True)
class DampedCovariance:
    """``C + ridge · I`` as an operator: the sum is never stored."""

    packed: Symmetric
    mean: float
    """The mean of C's diagonal."""
    ridge: float

    @property
    def device(self) -> torch.device:
        """Where to compute in float64: C's own device, except MPS, which has none."""
        return torch.device("cpu") if self.packed.device.type == "mps" else self.packed.device

    def times(self, X: Tensor) -> Tensor:
        """Return ``(C + ridge · I) X`` (n, b), in the type and on the device of X."""
        return self.packed.times(X).add_(X, alpha=self.ridge)

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the matrix (n, n)."""
        matrix = self.packed.dense().to(device, dtype)
        matrix.diagonal().add_(self.ridge)
        return matrix


@dataclass
class SecondMoment:
    """Accumulates ``Σ w x xᵀ``, ``Σ w`` and the number of tokens."""

    total: Symmetric
    weight: float = 0.0
    num_tokens: int = 0

    def add_(self, gram: Symmetric, weight: float, num_tokens: int) -> None:
        """Add ``Σ w x xᵀ`` of ``num_tokens`` inputs with ``Σ w = weight``."""
        self.total.add_(gram)
        self.weight += weight
        self.num_tokens += num_tokens


def mean_of(moments: list[SecondMoment]) -> Covariance:
    """Return the weighted mean over the accumulators; a single one is divided in place and is not to be used again.

    Raises:
        ValueError: If they saw no tokens.
    """
    num_tokens, weight = sum(moment.num_tokens for moment in moments), sum(moment.weight for moment in moments)
    if num_tokens == 0 or weight <= 0:
        raise ValueError("no valid token was seen: every token is masked out; check the attention masks of the samples.")
    total = moments[0].total
    for moment in moments[1:]:
        total = total.plus(moment.total)
    total.divide_(weight)
    return Covariance(total, num_tokens)


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its own device where that knows float64 (MPS does not: then on the CPU)."""
    return off_mps(tensor).double()


def off_mps(tensor: Tensor) -> Tensor:
    """Return the tensor where float64 exists: itself, but from MPS a copy on the CPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
