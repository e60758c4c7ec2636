"""Second moments of layer inputs: one object that accumulates, one that is the result.

"Covariance" is the papers' word for the *uncentred* second moment ``C = E[x xᵀ]``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """The uncentred second moment of one layer's inputs."""

    matrix: Tensor
    """C (n, n), symmetric."""

    num_tokens: int
    """Over how many tokens the mean was taken."""

    def damped(self, damping: float) -> Tensor:
        """Return ``C + λ · mean(diag C) · I`` (n, n) in float64 (CorDA, section 3.3, with a fixed λ).

        Note:
            The paper doubles λ until a float32 inverse is accurate. No inverse is taken here, so λ stays what it is.
        """
        matrix = in_float64(self.matrix)
        return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


class SecondMoment:
    """Accumulates ``Σ x xᵀ`` and the number of tokens."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=dtype, device=device)
        self.num_tokens = 0

    def add_(self, gram: Tensor, num_tokens: int) -> None:
        """Add ``XᵀX`` (n, n) of ``num_tokens`` inputs."""
        self.total += gram
        self.num_tokens += num_tokens


def mean_of(moments: list[SecondMoment]) -> Covariance:
    """Return the token-weighted mean over several accumulators of one width.

    Raises:
        ValueError: If they saw no tokens.
    """
    num_tokens = sum(moment.num_tokens for moment in moments)
    if num_tokens == 0:
        raise ValueError("no valid token was seen: every token is masked out; check the attention masks of the samples.")
    total = moments[0].total if len(moments) == 1 else torch.stack([moment.total for moment in moments]).sum(0)
    return Covariance(total / num_tokens, num_tokens)


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its own device where that knows float64 (MPS does not: then on the CPU)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)
