"""The adapter as a value, before it touches any model: where it starts, layer by layer, and what it was made from."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corda_core.allocate import Choice
from corda_core.bases import digest_of, weight_digests
from corda_core.covariance import Covariance, in_float64, off_mps
from corda_core.decompose import Mode, Split, Whitening, decompose, factors, whitening
from corda_core.layers import Progress, no_progress, on_host, over_layers
from corda_core.linears import weight_shape


@dataclass(frozen=True)
class Energy:
    """What of the context's C (not damped) a bound on the drift needs, once C itself is gone (``corda_core.drift``)."""

    rows: Tensor
    """``A0 C A0ᵀ`` (r, r) float32."""

    weight: float
    """``‖W C^(1/2)‖²_F``: the mean square of the layer's outputs, summed over them."""


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
    """How many tokens of context the covariance was taken over; 0 of a random start."""

    whitening: Whitening | None = None
    """The coordinates that A trains in, for ``protect="whitened"``."""

    choice: Choice | None = None
    """The candidates that the layer chose from (CorDA++); None if there was neither a choice nor a budget."""

    energy: Energy | None = None
    """What the context gives the layer; None in files that version 0.1.0 wrote."""

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
    """The rank asked for, which alpha is related to; a layer may have less, or its own where ranks were allocated."""

    provenance: Mapping[str, Any]
    """Plain values: ``base_digest`` of the planned layers' weights, ``damping``, ``split``, ``fallbacks`` (layers whose iteration failed
    its check), and what callers add."""

    @property
    def num_parameters(self) -> int:
        """Entries of A and B of all layers."""
        return sum(init.A0.numel() + init.B0.numel() for init in self.layers.values())


def plan(
    model: nn.Module,
    covariances: Mapping[str, Covariance] | Iterable[Mapping[str, Covariance]],
    *,
    mode: Mode | str,
    rank: int,
    ranks: Mapping[str, int] | None = None,
    choices: Mapping[str, Choice] | None = None,
    split: Split | str = Split.BALANCED,
    damping: float = 0.01,
    whiten: bool = False,
    progress: Progress = no_progress,
) -> AdapterPlan:
    """Return the adapter plan for the layers that have a covariance.

    Under ``torch.distributed`` the layers are shared out, and each process returns the whole plan.

    Args:
        model: The base model, perhaps wrapped in DDP or sharded by FSDP2; only read.
        covariances: By full layer name, as from ``collect``; or an iterable of parts of that, each of which is decomposed and dropped
            before the next is asked for.
        mode: "kpm" keeps the context's knowledge, "ipm" previews the context's task.
        rank: r; clipped to min(m, n) where a layer is smaller, with one warning.
        ranks: Each layer's own rank instead, as from ``allocate``; ``rank`` is then what ``attach`` relates alpha to.
        choices: As from ``choose``: written into the plan.
        split: "balanced" or "paper".
        damping: λ of ``Covariance.damped``.
        whiten: Whether A shall train in whitened coordinates (``attach`` with ``protect="whitened"``).
        progress: A progress bar: ``progress(names, title)`` returns the names to iterate, as ``tqdm`` does.

    Raises:
        ValueError: If a rank is below 1, ``ranks`` or ``choices`` lack a layer, or a layer cannot be decomposed (the text names it).
    """
    _check_ranks(rank, ranks or {})
    mode, split = Mode(mode), Split(split)

    def start(part: Mapping[str, Covariance], name: str, weight: Tensor) -> tuple[AdapterInit, bool]:
        covariance = part[name]
        own_rank = min(rank if ranks is None else ranks[name], *weight.shape)
        decomposition = decompose(weight, covariance, own_rank, mode, damping=damping)
        A0, B0, sigma = on_host(*factors(decomposition, split), decomposition.sigma)
        white = whitening(covariance, damping=damping).to("cpu") if whiten else None
        choice = None if choices is None else choices[name]
        about = (sigma, decomposition.components, covariance.num_tokens, white, choice)
        return AdapterInit(A0, B0, *about, energy_of(weight, A0, covariance)), decomposition.fell_back

    layers: dict[str, AdapterInit] = {}
    fallbacks: list[str] = []
    for part in [covariances] if isinstance(covariances, Mapping) else covariances:
        for what, given in (("ranks", ranks), ("choices", choices)):
            lacking = next((name for name in part if given is not None and name not in given), None)
            if lacking is not None:
                raise ValueError(
                    f"{what} has none for {lacking}, which has a covariance; give each layer its own, or leave it out of both."
                )
        _warn_of_few_tokens(part)
        for name, (init, fell_back) in over_layers(model, part, partial(start, part), progress, "decompose").items():
            layers[name] = init
            fallbacks += [name] if fell_back else []
        del part  # else it would stay while the next is collected
    if not layers:
        raise ValueError("There are no covariances: none of the layers was reached by a token; give more samples, or other layers.")
    if ranks is None:
        _warn_of_clipping(layers, rank)
    return AdapterPlan(layers, mode, rank, _base_of(model, layers) | {"damping": damping, "split": str(split), "fallbacks": fallbacks})


def random_plan(model: nn.Module, names: Iterable[str], rank: int, *, seed: int = 0) -> AdapterPlan:
    """Return a plan that knows no context: A0 uniform in ``±1/√n`` (PEFT's Kaiming) and B0 = 0, for ``attach(protect="none")``: plain LoRA.

    A layer's A0 depends on the seed, its name and its shape only.

    Args:
        model: The base model; only read.
        names: The layers to adapt, by full name.
        rank: r; clipped to min(m, n) where a layer is smaller, with one warning.
        seed: Of what is drawn.

    Raises:
        ValueError: If the rank is below 1.
    """
    _check_ranks(rank, {})
    layers = {}
    for name in names:
        m, n = weight_shape(model, name)
        r = min(rank, m, n)
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]))
        A0 = (2 * torch.rand(r, n, generator=generator) - 1) / n**0.5
        layers[name] = AdapterInit(A0, torch.zeros(m, r), torch.zeros(r, dtype=torch.float64), slice(0, r), num_tokens=0)
    _warn_of_clipping(layers, rank)
    return AdapterPlan(layers, Mode.LORA, rank, _base_of(model, layers) | {"seed": seed})


def _check_ranks(rank: int, ranks: Mapping[str, int]) -> None:
    for what, asked in (("rank", rank), *((f"the rank of {name}", own) for name, own in ranks.items())):
        if asked < 1:
            raise ValueError(f"{what} is {asked}; expected at least 1 for each layer.")


def _base_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return what a plan tells of the weights that it is for."""
    weights = weight_digests(model, names)
    return {"base_digest": digest_of(weights), "weights": weights}


def energy_of(weight: Tensor, A: Tensor, covariance: Covariance) -> Energy:
    """Return what a context of this C gives W (m, n) and the rows A (r, n).

    Note:
        The rows' in float64: those that hardly meet the context have energies below the rounding errors of float32.
    """
    C = covariance.packed.to(off_mps(weight).device)
    rows = in_float64(A).to(C.device)
    energies, total = on_host((rows @ C.times(rows.T.contiguous())).float(), C.energy(weight.to(C.device).float()))
    return Energy(energies, float(total))


def _warn_of_clipping(layers: Mapping[str, AdapterInit], rank: int) -> None:
    small = [name for name, init in layers.items() if init.rank < rank]
    if small:
        m, n = len(layers[small[0]].B0), layers[small[0]].A0.shape[1]
        warnings.warn(
            f"rank {rank} is larger than min(m, n) of {len(small)} layer(s), such as {small[0]} {(m, n)}: clipped there.", stacklevel=3
        )


def _warn_of_few_tokens(covariances: Mapping[str, Covariance]) -> None:
    few = [(name, C.num_tokens, C.packed.n) for name, C in covariances.items() if C.num_tokens < C.packed.n]
    if few:
        name, tokens, n = few[0]
        warnings.warn(
            f"{name} saw {tokens} tokens but has {n} inputs ({len(few)} layer(s) in all): its covariance is singular and only `damping` "
            "tells the unseen directions apart. Give more context.",
            stacklevel=3,
        )
