"""Second moments of layer inputs: the one that accumulates, the result, its damped form; of each matrix half is stored and computed.

"Covariance" is the papers' word for the *uncentred* second moment ``C = E[x xᵀ]``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
"""Types whose products are exact in float32."""
KNOWS_OUT_TYPE = "dtype" in torch.ops.aten.mm.overloads()
"""Whether this torch multiplies such types into float32."""


def multiplies_halves(rows: Tensor) -> bool:
    """Return whether the device of a tensor multiplies it as it is and sums in float32: half precision on CUDA, on tensor cores."""
    return rows.dtype in HALVES and rows.is_cuda and KNOWS_OUT_TYPE


@dataclass(frozen=True)
class Symmetric:
    """S (n, n) as column panels: panel j holds ``S[:end_j, start_j:end_j]``, about half of the whole."""

    panels: tuple[Tensor, ...]

    @staticmethod
    def zeros(n: int, dtype: torch.dtype, device: torch.device) -> "Symmetric":
        """Return an all-zero S."""
        return Symmetric(tuple(torch.zeros(end, end - start, dtype=dtype, device=device) for start, end in _bounds(n)))

    @staticmethod
    def gram(rows: Tensor) -> "Symmetric":
        """Return ``XᵀX`` of rows X (t, n), with little more than half the products; of half precision in float32.

        Products of two such values are exact in float32. Where a device multiplies them so by itself (``multiplies_halves``) nothing but
        the order of the sum is lost; elsewhere X is converted first.
        """
        if multiplies_halves(rows):
            return Symmetric(
                tuple(torch.mm(rows[:, :end].T, rows[:, start:end], out_dtype=torch.float32) for start, end in _bounds(rows.shape[1]))
            )
        rows = rows.float() if rows.dtype in HALVES else rows
        return Symmetric(tuple(rows[:, :end].T @ rows[:, start:end] for start, end in _bounds(rows.shape[1])))

    @staticmethod
    def of(matrix: Tensor) -> "Symmetric":
        """Return a dense symmetric matrix (n, n) in this form."""
        return Symmetric(tuple(matrix[:end, start:end].clone() for start, end in _bounds(len(matrix))))

    @staticmethod
    def joined(panels: Sequence[Tensor]) -> "Symmetric":
        """Return an S from its panels.

        Raises:
            ValueError: If they are not those of one S.
        """
        sizes, n = [tuple(panel.shape) for panel in panels], len(panels[-1])
        if sizes != [(end, end - start) for start, end in _bounds(n)]:
            raise ValueError(f"panels of the sizes {sizes} make no symmetric matrix")
        return Symmetric(tuple(panels))

    @staticmethod
    def num_bytes(n: int, dtype: torch.dtype) -> int:
        """Return how much memory an S of this size takes."""
        return dtype.itemsize * sum(end * (end - start) for start, end in _bounds(n))

    @property
    def n(self) -> int:
        """The number of rows and columns."""
        return len(self.panels[-1])

    @property
    def device(self) -> torch.device:
        """Where the panels lie."""
        return self.panels[0].device

    def to(self, device: torch.device | str) -> "Symmetric":
        """Return S on another device, or itself."""
        return Symmetric(tuple(panel.to(device) for panel in self.panels))

    def add_(self, other: "Symmetric") -> None:
        """Add another S of the same size in place."""
        for panel, added in zip(self.panels, other.panels, strict=True):
            panel += added.to(panel.device)

    def plus(self, other: "Symmetric") -> "Symmetric":
        """Return the sum with another S of the same size."""
        return Symmetric(tuple(left + right for left, right in zip(self.panels, other.panels, strict=True)))

    def mixed(self, own: float, other: "Symmetric", others: float) -> "Symmetric":
        """Return ``own · S + others · T`` with another T of the same size."""
        return Symmetric(tuple(own * left + others * right for left, right in zip(self.panels, other.panels, strict=True)))

    def multiply_(self, factor: float) -> None:
        """Multiply in place."""
        for panel in self.panels:
            panel *= factor

    def scaled(self, lengths: Tensor) -> "Symmetric":
        """Return ``diag(l) S diag(l)`` in the type of the lengths l (n,)."""
        bounds = _bounds(self.n)
        return Symmetric(
            tuple(lengths[:end, None] * panel * lengths[start:end] for (start, end), panel in zip(bounds, self.panels, strict=True))
        )

    def divide_(self, divisor: float) -> None:
        """Divide in place."""
        for panel in self.panels:
            panel /= divisor

    def diagonal(self) -> Tensor:
        """Return the diagonal (n,)."""
        return torch.cat([panel[start:].diagonal() for (start, _), panel in zip(_bounds(self.n), self.panels, strict=True)])

    def dense(self) -> Tensor:
        """Return S (n, n)."""
        matrix = self.panels[0].new_empty(self.n, self.n)
        for (start, end), panel in zip(_bounds(self.n), self.panels, strict=True):
            matrix[:end, start:end] = panel
            matrix[start:end, :start] = panel[:start].T
        return matrix

    def times(self, X: Tensor) -> Tensor:
        """Return ``S X`` (n, b) in the type of X; other types are converted panel by panel."""
        if X.dtype == torch.float64 and X.shape[1] <= 256:
            return self._times_rows(X.T.contiguous()).T
        product = torch.zeros_like(X)
        for (start, end), panel in zip(_bounds(self.n), self.panels, strict=True):
            panel = panel.to(X)
            product[:end].addmm_(panel, X[start:end])
            product[start:end].addmm_(panel[:start].T, X[:start])
        return product

    def energy(self, rows: Tensor) -> Tensor:
        """Return ``‖X S^(1/2)‖_F² = tr(X S Xᵀ)`` of rows X (m, n), in their type."""
        columns = rows.T.contiguous()
        return (self.times(columns) * columns).sum()

    def _times_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows S`` (b, n): on CPUs a fifth faster than ``S X`` for few columns in float64, slower for many and in float32."""
        product = torch.zeros_like(rows)
        for (start, end), panel in zip(_bounds(self.n), self.panels, strict=True):
            panel = panel.to(rows)
            product[:, :end].addmm_(rows[:, start:end], panel.T)
            product[:, start:end].addmm_(rows[:, :start], panel[:start])
        return product


def _bounds(n: int) -> list[tuple[int, int]]:
    """Return first and last column (exclusive) of each panel: narrow enough to save work, wide enough to multiply fast."""
    width = 64 if n <= 768 else 128 if n <= 2048 else 256
    return [(start, min(start + width, n)) for start in range(0, n, width)]


LARGEST = 32767
"""Of 16 bits."""


@dataclass(frozen=True)
class Covariance:
    """The uncentred second moment of one layer's inputs."""

    packed: Symmetric
    """C (n, n), its upper half."""

    num_tokens: int
    """Over how many tokens the mean was taken."""

    weight: float | None = None
    """``Σ w`` over them, by which C counts when it is added to others; None: each token counts once."""

    @staticmethod
    def of(matrix: Tensor, num_tokens: int) -> "Covariance":
        """Return the covariance with this C (n, n)."""
        return Covariance(Symmetric.of(matrix), num_tokens)

    def plus(self, other: "Covariance") -> "Covariance":
        """Return the covariance over the tokens of both, ``(w₁ C₁ + w₂ C₂) / (w₁ + w₂)``."""
        own, others = (float(part.num_tokens if part.weight is None else part.weight) for part in (self, other))
        packed = self.packed.mixed(own / (own + others), other.packed, others / (own + others))
        return Covariance(packed, self.num_tokens + other.num_tokens, own + others)

    def halved(self) -> tuple[Symmetric, Tensor]:
        """Return Q in 16 bits a value and the lengths l (n,) float32 of ``C ≈ diag(l) Q diag(l)``, ``l = √(diag C / 32767)``.

        Fixed point: ``C_ij / √(C_ii C_jj)`` is within [−1, 1], where an error of 1.5e-5 is far below the damping. (bfloat16 is off by
        4e-3: then other directions are chosen.)
        """
        lengths = (self.packed.diagonal().float().clamp(min=0) / LARGEST).sqrt()
        inverse = torch.where(lengths > 0, 1 / lengths, 0)
        rounded = (panel.round_().clamp_(-LARGEST, LARGEST).to(torch.int16) for panel in self.packed.scaled(inverse).panels)
        return Symmetric(tuple(rounded)), lengths

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

    def add_(self, other: "SecondMoment") -> None:
        """Add the sums of other inputs."""
        self.total.add_(other.total)
        self.weight += other.weight
        self.num_tokens += other.num_tokens


def mean_of_(moments: list[SecondMoment]) -> Covariance:
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
    return Covariance(total, num_tokens, weight)


def on_cpu(covariances: Mapping[str, Covariance]) -> dict[str, Covariance]:
    """Return covariances in the memory of the CPU; what layers share they still do."""
    distinct = {id(covariance): covariance for covariance in covariances.values()}
    moved = {key: replace(covariance, packed=covariance.packed.to(torch.device("cpu"))) for key, covariance in distinct.items()}
    return {name: moved[id(covariance)] for name, covariance in covariances.items()}


def together(collections: Sequence[Mapping[str, Covariance]]) -> dict[str, Covariance]:
    """Return the covariances over the inputs of all collections, by layer; one that a collection lacks saw nothing of its inputs.

    Layers that share a covariance in each collection share the sum.
    """
    sums: dict[tuple[int, ...], Covariance] = {}
    result = {}
    for name in dict.fromkeys(name for collection in collections for name in collection):
        members = [collection[name] for collection in collections if name in collection]
        key = tuple(map(id, members))
        if key not in sums:
            sums[key] = reduce(Covariance.plus, members)
        result[name] = sums[key]
    return result


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its own device where that knows float64 (MPS does not: then on the CPU)."""
    return off_mps(tensor).double()


def off_mps(tensor: Tensor) -> Tensor:
    """Return the tensor where float64 exists: itself, but from MPS a copy on the CPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
