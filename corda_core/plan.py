"""The adapter as a value, before it touches any model: where it starts, layer by layer, and what it was made from."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.decompose import Mode, Split, decompose, factors
from corda_core.modules import base_digest, weight_matrix


@dataclass(frozen=True)
class AdapterInit:
    """Where one layer's adapter starts."""

    A0: Tensor
    """(r, n) float32."""

    B0: Tensor
    """(m, r) float32; ``B0 A0 = U_S U_Sᵀ W``."""

    spectrum: Tensor
    """σ (k,) of ``W C``, descending, float64."""

    components: slice
    """Which of the k components the adapter was given."""

    num_tokens: int
    """How many tokens of context the covariance was taken over."""

    @property
    def rank(self) -> int:
        """The rank r of this layer's adapter."""
        return len(self.A0)


@dataclass(frozen=True)
class AdapterPlan:
    """The starting points of all layers, and what they were made from."""

    layers: Mapping[str, AdapterInit]
    """By full layer name."""

    mode: Mode
    rank: int
    """The rank asked for; a layer with fewer outputs or inputs has less."""

    provenance: Mapping[str, Any]
    """Plain values: ``base_digest`` of the planned layers' weights, ``damping``, ``split``."""


def plan(
    model: nn.Module,
    covariances: Mapping[str, Covariance],
    *,
    mode: Mode | str,
    rank: int,
    split: Split | str = Split.BALANCED,
    damping: float = 0.01,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> AdapterPlan:
    """Return the adapter plan of constant rank for the layers that have a covariance.

    Args:
        model: The base model; only read.
        covariances: By full layer name, as from ``collect``.
        mode: "kpm" keeps the context's knowledge, "ipm" previews the context's task.
        rank: r; clipped to min(m, n) where a layer is smaller, with one warning.
        split: "balanced" or "paper".
        damping: λ of ``Covariance.damped``.
        progress: Wraps the iterable of layer names, a progress bar for instance.

    Raises:
        ValueError: If the rank is below 1, or a layer cannot be decomposed (the text names it).
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1.")
    sizes = {name: tuple(weight_matrix(model, name).shape) for name in covariances}
    _warn_of_clipping(sizes, rank)
    _warn_of_few_tokens(sizes, covariances)
    layers = {}
    for name in progress(list(covariances)):
        weight = weight_matrix(model, name)
        try:
            decomposition = decompose(weight, covariances[name], min(rank, *sizes[name]), mode, damping=damping)
            A0, B0 = factors(weight, decomposition, split)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layers[name] = AdapterInit(A0, B0, decomposition.spectrum, decomposition.components, covariances[name].num_tokens)
    provenance = {"base_digest": base_digest(model, covariances), "damping": damping, "split": str(Split(split))}
    return AdapterPlan(layers, Mode(mode), rank, provenance)


def _warn_of_clipping(sizes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    small = [name for name, size in sizes.items() if min(size) < rank]
    if small:
        warnings.warn(
            f"rank {rank} is larger than min(m, n) of {len(small)} layer(s), such as {small[0]} {sizes[small[0]]}: clipped there.",
            stacklevel=3,
        )


def _warn_of_few_tokens(sizes: Mapping[str, tuple[int, ...]], covariances: Mapping[str, Covariance]) -> None:
    few = [name for name, (_, n) in sizes.items() if covariances[name].num_tokens < n]
    if few:
        warnings.warn(
            f"{few[0]} saw {covariances[few[0]].num_tokens} tokens but has {sizes[few[0]][1]} inputs ({len(few)} layer(s) in all): "
            "its covariance is singular and only `damping` tells the unseen directions apart. Give more context.",
            stacklevel=3,
        )
