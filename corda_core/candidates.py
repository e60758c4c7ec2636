"""Covariances of the same layers over different samples: keep for each layer the one that suits it (CorDA++)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from corda_core.allocate import Candidate, assess, isotropy
from corda_core.covariance import Covariance
from corda_core.decompose import spectrum
from corda_core.layerwise import num_workers, over_layers
from corda_core.parallel import in_threads
from corda_core.progress import Progress, no_progress


@dataclass(frozen=True)
class Selection:
    """What was chosen for each layer, and from what. All by full layer name."""

    covariances: Mapping[str, Covariance]
    chosen: Mapping[str, int]
    """The place of the set that the covariance came from."""

    candidates: Mapping[str, tuple[Candidate, ...]]
    """How each set did."""

    def best(self, name: str) -> Candidate:
        """Return the chosen candidate of a layer."""
        return self.candidates[name][self.chosen[name]]


def select_covariances(
    model: nn.Module, sets: Iterable[Mapping[str, Covariance]], *, damping: float = 0.01, progress: Progress = no_progress
) -> Selection:
    """Return for each layer the covariance with the lowest score (``allocate.Candidate.score``), the first of equal ones.

    Sets are gone over once; of those seen, only the chosen covariances are kept.

    Args:
        model: The base model; only read.
        sets: Covariances of the same layers, as from ``collect`` over different samples; a generator makes the next one only when
            the one before is assessed.
        damping: λ of ``Covariance.damped``.
        progress: As in ``plan``.

    Raises:
        ValueError: If there are no sets, their layers differ, or a covariance saw fewer tokens than it has inputs, where its
            compactness is only that of the damping; as ``assess``, naming the layer.
    """
    kept: dict[str, Covariance] = {}
    chosen: dict[str, int] = {}
    assessed: dict[str, tuple[Candidate, ...]] = {}
    for covariances in sets:  # not enumerated: that would keep the last one while the next is made
        number = len(next(iter(assessed.values()), ()))
        if number and covariances.keys() != kept.keys():
            odd = min(covariances.keys() ^ kept.keys())
            raise ValueError(
                f"Candidate {number} has other layers than candidate 0: {odd} is in only one; collect both with the same names."
            )
        _check_tokens(number, covariances)
        try:
            isotropies = _isotropies(covariances, damping)
        except ValueError as error:
            raise ValueError(f"Candidate {number}: {error}") from error
        found = over_layers(model, covariances, partial(_assess, covariances, isotropies, damping), progress, f"candidate {number + 1}")
        for name, candidate in found.items():
            if number == 0 or candidate.score < assessed[name][chosen[name]].score:
                kept[name], chosen[name] = covariances[name], number
            assessed[name] = (*assessed.get(name, ()), candidate)
        del covariances
    if not kept:
        raise ValueError("There are no candidates; give at least one set of covariances.")
    return Selection(kept, chosen, assessed)


def resolved(model: nn.Module, selection: Selection, *, damping: float = 0.01, progress: Progress = no_progress) -> Selection:
    """Return the selection with the chosen candidates' spectra in full (``spectrum``), as ``allocate_ranks`` needs them.

    Args:
        model: The base model; only read.
        selection: With its covariances.
        damping: λ of ``Covariance.damped``.
        progress: As in ``plan``.
    """

    def in_full(name: str, weight: Tensor) -> Tensor:
        return spectrum(weight, selection.covariances[name], damping=damping).cpu()

    spectra = over_layers(model, selection.covariances, in_full, progress, "spectra")
    candidates = dict[str, tuple[Candidate, ...]]()
    for name, ones in selection.candidates.items():
        best = replace(selection.best(name), spectrum=spectra[name])
        candidates[name] = tuple(best if place == selection.chosen[name] else one for place, one in enumerate(ones))
    return replace(selection, candidates=candidates)


def _assess(covariances: Mapping[str, Covariance], isotropies: Mapping[int, float], damping: float, name: str, weight: Tensor) -> Candidate:
    covariance = covariances[name]
    return assess(weight, covariance, damping=damping, isotropy_of_C=isotropies[id(covariance)])


def _isotropies(covariances: Mapping[str, Covariance], damping: float) -> dict[int, float]:
    """Return ``isotropy`` of each distinct covariance, by its id."""
    readers = {id(one): name for name, one in covariances.items()}  # one layer of each

    def isotropy_of(name: str) -> float:
        try:
            return isotropy(covariances[name], damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    packed = [covariances[name].packed for name in readers.values()]
    workers = num_workers(((one.n, one.n) for one in packed), packed[0].device)
    return dict(zip(readers, in_threads(isotropy_of, readers.values(), workers), strict=True))


def _check_tokens(number: int, covariances: Mapping[str, Covariance]) -> None:
    for name, one in covariances.items():
        if one.num_tokens < one.packed.n:
            raise ValueError(
                f"{name}: candidate {number} saw {one.num_tokens} tokens for {one.packed.n} inputs, so that its compactness is only that "
                "of the damping; give more samples, or fewer candidates."
            )
