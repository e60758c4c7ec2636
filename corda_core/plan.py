"""The adapter as a value, before it touches any model: where it starts, layer by layer, and what it was made from."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corda_core.covariance import Covariance
from corda_core.decompose import Mode, Solver, Split, decompose, factors
from corda_core.distributed import gathered, num_processes, process_rank
from corda_core.modules import base_digest, weight_matrix, weight_shape
from corda_core.parallel import in_threads, num_workers
from corda_core.progress import Progress, no_progress


@dataclass(frozen=True)
class AdapterInit:
    """Where one layer's adapter starts."""

    A0: Tensor
    """(r, n) float32."""

    B0: Tensor
    """(m, r) float32; ``B0 A0 = U_S U_Sᵀ W``."""

    sigma: Tensor
    """σ (r,) of the components of ``W C`` that the adapter was given, descending, float64."""

    components: slice
    """Which of the k components these are."""

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
    """Plain values: ``base_digest`` of the planned layers' weights, ``damping``, ``split``, ``solver``, ``fallbacks``."""


def plan(
    model: nn.Module,
    covariances: Mapping[str, Covariance] | Iterable[Mapping[str, Covariance]],
    *,
    mode: Mode | str,
    rank: int,
    split: Split | str = Split.BALANCED,
    damping: float = 0.01,
    solver: Solver | str = Solver.AUTO,
    progress: Progress = no_progress,
) -> AdapterPlan:
    """Return the adapter plan of constant rank for the layers that have a covariance.

    Under ``torch.distributed`` the layers are shared out, and each process returns the whole plan.

    Args:
        model: The base model, perhaps wrapped in DDP or sharded by FSDP2; only read.
        covariances: By full layer name, as from ``collect``; or parts of that, as from ``collect_in_passes``: each part is
            decomposed and dropped before the next is asked for.
        mode: "kpm" keeps the context's knowledge, "ipm" previews the context's task.
        rank: r; clipped to min(m, n) where a layer is smaller, with one warning.
        split: "balanced" or "paper".
        damping: λ of ``Covariance.damped``.
        solver: As in ``decompose``. Layers whose iteration failed its check are listed in ``provenance["fallbacks"]``.
        progress: Called with a part's layer names and a title, returns them to be gone over: a progress bar, for instance.

    Raises:
        ValueError: If the rank is below 1, or a layer cannot be decomposed (the text names it).
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1.")
    mode, split, solver = Mode(mode), Split(split), Solver(solver)
    layers: dict[str, AdapterInit] = {}
    fallbacks: list[str] = []
    parts = [covariances] if isinstance(covariances, Mapping) else covariances
    sizes: dict[str, tuple[int, int]] = {}
    for part in parts:
        new = {name: weight_shape(model, name) for name in part}
        sizes |= new
        _warn_of_few_tokens(new, part)
        for name, (init, fell_back) in _inits(model, part, mode, rank, split, damping, solver, progress):
            layers[name] = init
            fallbacks += [name] if fell_back else []
        del part  # else it would stay while the next is collected
    _warn_of_clipping(sizes, rank)
    provenance = {
        "base_digest": base_digest(model, layers),
        "damping": damping,
        "split": str(split),
        "solver": str(solver),
        "fallbacks": fallbacks,
    }
    return AdapterPlan(layers, mode, rank, provenance)


def _inits(
    model: nn.Module,
    covariances: Mapping[str, Covariance],
    mode: Mode,
    rank: int,
    split: Split,
    damping: float,
    solver: Solver,
    progress: Progress,
) -> Iterator[tuple[str, tuple[AdapterInit, bool]]]:
    """Yield each layer's starting point and whether its solver fell back; each process decomposes every P-th layer."""

    def init(item: tuple[str, Tensor]) -> tuple[str, tuple[AdapterInit, bool]]:
        name, weight = item
        try:
            decomposition = decompose(weight, covariances[name], min(rank, *weight.shape), mode, damping=damping, solver=solver)
            A0, B0 = factors(weight, decomposition, split)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        sigma, num_tokens = decomposition.sigma.cpu(), covariances[name].num_tokens
        return name, (AdapterInit(A0.cpu(), B0.cpu(), sigma, decomposition.components, num_tokens), decomposition.fell_back)

    def own() -> Iterator[tuple[str, Tensor]]:
        for place, name in enumerate(progress(list(covariances), "decompose")):
            weight = weight_matrix(model, name)  # a sharded one is gathered by all processes at once
            if place % num_processes() == process_rank():
                yield name, weight

    workers = num_workers((weight_shape(model, name) for name in covariances), next(model.parameters()).device)
    mine = dict(in_threads(init, own(), workers))
    everyone: dict[str, tuple[AdapterInit, bool]] = {}
    for theirs in gathered(mine):
        everyone |= theirs
    return ((name, everyone[name]) for name in covariances)


def _warn_of_clipping(sizes: Mapping[str, tuple[int, int]], rank: int) -> None:
    small = [name for name, size in sizes.items() if min(size) < rank]
    if small:
        warnings.warn(
            f"rank {rank} is larger than min(m, n) of {len(small)} layer(s), such as {small[0]} {sizes[small[0]]}: clipped there.",
            stacklevel=3,
        )


def _warn_of_few_tokens(sizes: Mapping[str, tuple[int, int]], covariances: Mapping[str, Covariance]) -> None:
    few = [name for name, (_, n) in sizes.items() if covariances[name].num_tokens < n]
    if few:
        warnings.warn(
            f"{few[0]} saw {covariances[few[0]].num_tokens} tokens but has {sizes[few[0]][1]} inputs ({len(few)} layer(s) in all): "
            "its covariance is singular and only `damping` tells the unseen directions apart. Give more context.",
            stacklevel=3,
        )
