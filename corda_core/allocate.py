"""CorDA++ (arXiv 2506.13187): which covariance suits a layer, and how a budget of parameters is spread over the layers.

``choose`` picks a covariance for each layer of a model among several collections, ``allocate`` gives each layer its rank; the rest are
pure functions on matrices and spectra. Throughout: C (n, n) damped and scaled to a mean diagonal of 1 before damping
(its mean and ``Covariance.damped``), W (m, n), k = min(m, n), σ₁ ≥ … ≥ σ_k the singular values of ``W C``.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from corda_core import solvers
from corda_core.covariance import Covariance
from corda_core.decompose import Mode, damped_for, spectrum
from corda_core.layers import Progress, in_threads, no_progress, num_workers, over_layers
from corda_core.linears import weight_shape


@dataclass(frozen=True)
class Candidate:
    """How well one covariance suits one layer."""

    log_pi: float
    """``log π(C)``, the compactness: lower is more compact."""

    spectrum: Tensor
    """σ (k,) of ``W C``, descending, float64: each to about 1e-6 σ₁, enough for the score, or in full (``choose`` with ``in_full``)."""

    @property
    def score(self) -> float:
        """``log π(C) · Σ_j σ_j / σ_1``: the candidate with the lowest is chosen (CorDA++, covariance selection)."""
        return self.log_pi * float(self.spectrum.sum() / self.spectrum[0])


def compactness(anisotropy_of_C: float, m: int) -> float:
    """Return ``π(C) = √(m · σ_max(C)) / σ_min(C)`` of a layer with m outputs, from ``anisotropy``; lower is more compact.

    It bounds what dropping the r-th smallest component of ``W C`` changes in the outputs: ``‖ΔY‖₁ ≤ π(C) · σ₋ᵣ`` (CorDA++).
    C is scaled to a mean diagonal of 1 and then damped, as ``π(a C) = π(C) / √a``: only so are layers and candidates comparable.

    Raises:
        ValueError: If ``log π <= 0``, where the scores of CorDA++ have no meaning.
    """
    pi = math.sqrt(m) * anisotropy_of_C
    if pi <= 1:
        raise ValueError(
            f"its compactness π is {pi:.3g}, and CorDA++ needs log π > 0: with {m} output(s) and inputs this uniform there is nothing to "
            "choose; leave the layer out."
        )
    return pi


def anisotropy(covariance: Covariance, damping: float) -> float:
    """Return ``√σ_max(C) / σ_min(C)`` of the scaled and damped C: what of π the number of outputs does not change.

    Raises:
        ValueError: If C is zero or not finite, or damping is not positive.
    """
    if damping <= 0:
        raise ValueError(f"damping is {damping}; compactness needs it positive, as the covariance may be singular without.")
    C = covariance.damped(damping)
    largest, smallest = solvers.extremes(C)
    if smallest <= 0:
        raise ValueError(f"the damped covariance has the eigenvalue {smallest:.3g}, where all should be positive; raise the damping.")
    return math.sqrt(largest / C.mean) / (smallest / C.mean)


def assess(weight: Tensor, covariance: Covariance, anisotropy_of_C: float, *, damping: float = 0.01) -> Candidate:
    """Return how well a covariance suits a layer, from eigenvalues without vectors.

    Args:
        weight: W (m, n), any floating type.
        covariance: C (n, n).
        anisotropy_of_C: ``anisotropy`` of this C, the same for all layers with these inputs.
        damping: λ of ``Covariance.damped``.

    Raises:
        ValueError: As ``compactness``; if the shapes do not fit, or the weight is zero.
    """
    C = damped_for(weight, covariance, damping)
    log_pi = math.log(compactness(anisotropy_of_C, weight.shape[0]))
    sigma = solvers.rough_spectrum(weight, C).cpu()
    if sigma[0] == 0:
        raise ValueError("its weight is all zero, so no covariance suits it better than another; leave the layer out.")
    return Candidate(log_pi, sigma)


def allocate_ranks(
    candidates: Mapping[str, Candidate],
    costs: Mapping[str, int],
    budget: int,
    mode: Mode | str,
    *,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Return each layer's rank, so that all together cost at most the budget (CorDA++, rank allocation).

    f components of each layer, its smallest, count as filtered, at first one. The layer with the lowest
    ``s = log π · σ₋f / Σ_{j ≤ k−f} σ_j`` gets one more, again and again. In KPM the filtered ones are trained, until one more would
    pass the budget; in IPM the others are, as soon as they are within it. So layers with many components that the context does not
    miss get more rank in KPM and less in IPM. Of equal scores the layer that comes first is taken.

    Args:
        candidates: log π(C) and σ (k,) of ``W C`` in full, by layer.
        costs: Parameters of one component, m + n, by layer.
        budget: Parameters for all layers together.
        mode: "kpm" or "ipm".
        min_rank: What each layer gets at least, where it has as many components; at least 1.
        max_rank: What each layer gets at most; None is no limit.

    Raises:
        ValueError: If the layers of the arguments differ, limits contradict each other, or the budget is below ``min_rank`` in every layer.

    Note:
        The paper has neither limit. Without ``max_rank`` a layer with σ = 0 in its tail gets all of that in KPM, as it costs nothing
        to change.
    """
    _check(candidates, costs, min_rank, max_rank)
    trains_filtered = Mode(mode) is Mode.KPM
    sizes = {name: len(candidate.spectrum) for name, candidate in candidates.items()}
    check_budget(budget, [(costs[name], k) for name, k in sizes.items()], min_rank)
    lowest = {name: min(min_rank, k) for name, k in sizes.items()}
    highest = {name: min(max_rank or k, k) for name, k in sizes.items()}
    filtered, ends = dict(lowest), highest
    if not trains_filtered:  # the paper begins with one filtered component
        ends = {name: k - lowest[name] for name, k in sizes.items()}
        filtered = {name: min(max(k - highest[name], 1), ends[name]) for name, k in sizes.items()}
    spent = sum(costs[name] * (f if trains_filtered else sizes[name] - f) for name, f in filtered.items())
    scores = {name: _scores(candidate) for name, candidate in candidates.items()}
    heap = [(scores[name][f], place, name) for place, (name, f) in enumerate(filtered.items()) if f < ends[name]]
    heapq.heapify(heap)
    while heap and (trains_filtered or spent > budget):
        _, place, name = heapq.heappop(heap)
        if trains_filtered and spent + costs[name] > budget:
            break
        spent += costs[name] if trains_filtered else -costs[name]
        filtered[name] += 1
        if filtered[name] < ends[name]:
            heapq.heappush(heap, (scores[name][filtered[name]], place, name))
    return {name: f if trains_filtered else sizes[name] - f for name, f in filtered.items()}


def check_budget(budget: int, layers: Sequence[tuple[int, int]], min_rank: int) -> None:
    """Refuse a budget that does not reach: known from shapes, so before any sample is run.

    Args:
        budget: Parameters for all layers together.
        layers: Parameters of one component and number of components, of each layer.
        min_rank: What each layer gets at least.

    Raises:
        ValueError: If the budget is below ``min_rank`` in every layer.
    """
    least = sum(cost * min(min_rank, k) for cost, k in layers)
    if least > budget:
        raise ValueError(
            f"The budget of {budget} parameters is below {least}, which rank {min_rank} in each of the {len(layers)} layers takes; "
            "raise the budget or adapt fewer layers."
        )


def _scores(candidate: Candidate) -> list[float]:
    """Return s for f = 0 … k − 1 filtered components; s is 0 for f = 0, where nothing is filtered, and wherever σ₋f is 0."""
    sigma = candidate.spectrum.double()
    smallest = torch.cat([sigma.new_zeros(1), sigma.flip(0)])[: len(sigma)]
    kept = sigma.cumsum(0).flip(0)
    return torch.where(smallest > 0, candidate.log_pi * smallest / kept, 0.0).tolist()


def _check(candidates: Mapping[str, Candidate], costs: Mapping[str, int], min_rank: int, max_rank: int | None) -> None:
    if not candidates:
        raise ValueError("There are no layers to spread a budget over.")
    if costs.keys() != candidates.keys():
        name = min(candidates.keys() ^ costs.keys())
        raise ValueError(f"candidates and costs are of different layers: {name} is in only one of them.")
    if min_rank < 1 or (max_rank is not None and max_rank < min_rank):
        raise ValueError(f"min_rank is {min_rank} and max_rank {max_rank}; expected 1 <= min_rank <= max_rank.")


@dataclass(frozen=True)
class Choice:
    """The covariances that a layer could take, and which it takes."""

    candidates: tuple[Candidate, ...]
    """How each did, in the order they were given."""

    index: int
    """The place of the one that is taken."""

    @property
    def best(self) -> Candidate:
        """How the one that is taken did."""
        return self.candidates[self.index]


def choose(
    model: nn.Module,
    collections: Iterable[Mapping[str, Covariance]],
    *,
    damping: float = 0.01,
    in_full: bool = False,
    progress: Progress = no_progress,
) -> tuple[dict[str, Covariance], dict[str, Choice]]:
    """Return for each layer the covariance with the lowest ``Candidate.score``, the first of equal ones, and how all did.

    The collections are iterated once; of those seen, only the chosen covariances are kept.

    Args:
        model: The base model; only read.
        collections: Covariances of the same layers, as from ``collect`` over different samples; a generator makes the next one only when
            the one before is assessed.
        damping: λ of ``Covariance.damped``.
        in_full: Whether the spectra of the chosen are to be exact (``decompose.spectrum``), as ``allocate`` needs them; the score does not.
        progress: As in ``plan``.

    Raises:
        ValueError: If there are no collections, their layers differ, or a covariance saw fewer tokens than it has inputs, where its
            compactness is only that of the damping; as ``assess``, naming the layer.
    """
    kept: dict[str, Covariance] = {}
    choices: dict[str, Choice] = {}
    number = 0
    for covariances in collections:
        if number and covariances.keys() != kept.keys():
            odd = min(covariances.keys() ^ kept.keys())
            raise ValueError(
                f"Candidate {number} has other layers than candidate 0: {odd} is in only one; collect both with the same names."
            )
        _check_tokens(number, covariances)
        for name, candidate in _assessed(model, covariances, number, damping, progress).items():
            before = choices.get(name, Choice((), 0))
            is_better = number == 0 or candidate.score < before.best.score
            choices[name] = Choice((*before.candidates, candidate), number if is_better else before.index)
            if is_better:
                kept[name] = covariances[name]
        del covariances
        number += 1  # noqa: SIM113 (enumerate would keep the last collection while the next is made)
    if not kept:
        raise ValueError("There are no candidates; give at least one set of covariances.")
    return kept, _in_full(model, kept, choices, damping, progress) if in_full else choices


def allocate(
    model: nn.Module, choices: Mapping[str, Choice], budget: int, mode: Mode | str, *, min_rank: int = 1, max_rank: int | None = None
) -> dict[str, int]:
    """Return each layer's rank, so that all together cost at most the budget (``allocate_ranks``).

    Args:
        model: The base model; only its shapes are read.
        choices: As from ``choose`` with ``in_full``.
        budget: Parameters of A and B of all layers together (``budget_of_rank``).
        mode: "kpm" or "ipm".
        min_rank: As in ``allocate_ranks``.
        max_rank: As in ``allocate_ranks``.

    Raises:
        ValueError: As ``allocate_ranks``.
    """
    return allocate_ranks(
        {name: choice.best for name, choice in choices.items()},
        {name: sum(weight_shape(model, name)) for name in choices},
        budget,
        mode,
        min_rank=min_rank,
        max_rank=max_rank,
    )


def budget_of_rank(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """Return the parameters of A and B of this rank on layers of these shapes (m, n): ``Σ (m + n) min(r, m, n)``."""
    return sum((m + n) * min(rank, m, n) for m, n in shapes)


def _assessed(
    model: nn.Module, covariances: Mapping[str, Covariance], number: int, damping: float, progress: Progress
) -> dict[str, Candidate]:
    """Return how well the covariances of one collection suit their layers."""
    try:
        anisotropies = _anisotropies(covariances, damping)
    except ValueError as error:
        raise ValueError(f"Candidate {number}: {error}") from error

    def assess_layer(name: str, weight: Tensor) -> Candidate:
        return assess(weight, covariances[name], anisotropies[id(covariances[name])], damping=damping)

    return over_layers(model, covariances, assess_layer, progress, f"candidate {number + 1}")


def _in_full(
    model: nn.Module, covariances: Mapping[str, Covariance], choices: Mapping[str, Choice], damping: float, progress: Progress
) -> dict[str, Choice]:
    """Return the choices with the exact spectra of what was chosen."""

    def whole(name: str, weight: Tensor) -> Tensor:
        return spectrum(weight, covariances[name], damping=damping).cpu()

    spectra = over_layers(model, covariances, whole, progress, "spectra")
    exact = dict[str, Choice]()
    for name, choice in choices.items():
        candidates = list(choice.candidates)
        candidates[choice.index] = replace(choice.best, spectrum=spectra[name])
        exact[name] = Choice(tuple(candidates), choice.index)
    return exact


def _anisotropies(covariances: Mapping[str, Covariance], damping: float) -> dict[int, float]:
    """Return ``anisotropy`` of each distinct covariance, by its id."""
    readers = {id(covariance): name for name, covariance in covariances.items()}  # one layer of each

    def anisotropy_of(name: str) -> float:
        try:
            return anisotropy(covariances[name], damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    packed = [covariances[name].packed for name in readers.values()]
    workers = num_workers(((C.n, C.n) for C in packed), packed[0].device)
    return dict(zip(readers, in_threads(anisotropy_of, readers.values(), workers), strict=True))


def _check_tokens(number: int, covariances: Mapping[str, Covariance]) -> None:
    for name, covariance in covariances.items():
        tokens, n = covariance.num_tokens, covariance.packed.n
        if tokens < n:
            raise ValueError(
                f"{name}: candidate {number} saw {tokens} tokens for {n} inputs, so that its compactness is only that of the damping; "
                "give more samples, or fewer candidates."
            )
