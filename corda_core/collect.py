"""Run samples through a model and take the second moment of what each layer is fed.

Layers called with the very same tensor (q/k/v, gate/up) share one moment, found out at run time: each input is
multiplied once and added for all layers that read it. Under ``torch.distributed`` each process brings its own
samples, and all get the mean over all of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from corda_core.covariance import HALVES, Covariance, SecondMoment, Symmetric, in_float64, mean_of_, multiplies_halves
from corda_core.layers import from_first_process, gathered, is_distributed, num_processes, sum_over_processes_
from corda_core.linears import Expert, evaluating, expert_of, experts_at, stacks_of, unwrapped, weight_shape

T = TypeVar("T")

Batches = Iterable[Mapping[str, Any]]
Moments = dict[tuple[str, ...], SecondMoment]
"""By the layers that read the same inputs."""
PRECISION = torch.float32
"""Of products and sums, whatever the model's own."""
FEW = 4
"""So many different weights are summed up apart from each other: those of modalities are two."""
NO_BATCHES = "There are no batches: the covariances need at least one sample."


class Normalize(StrEnum):
    """How samples are scaled before the mean is taken."""

    SAMPLE_MAX = "sample-max"
    """Each sample is divided by max|x| over its tokens, and the mean is taken over samples instead of tokens: as CorDA's code does."""


WeightsOf = Callable[[str], Tensor | tuple[Tensor | None, ...] | None]


class TokenWeights(Protocol):
    """Tells how much each of a layer's input tokens counts."""

    def __call__(self, name: str, batch: Mapping[str, Any]) -> Tensor | tuple[Tensor | None, ...] | None:
        """Return weights >= 0 (a mask: 1 counts, 0 does not) shaped as the layer's input without its last axis; None if all count alike.

        For a layer that reads inputs of several kinds, a tuple of weights, of which the first that has an input's shape counts; with a
        None among them all tokens of an input that has the shape of none count alike.
        """


def attention_mask_of(name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the batch's ``attention_mask``: right for the layers of a language model."""
    return batch.get("attention_mask")


def collect(
    model: nn.Module,
    batches: Batches,
    names: Sequence[str],
    *,
    token_weights: TokenWeights = attention_mask_of,
    normalize: Normalize | str | None = None,
) -> dict[str, Covariance]:
    """Return ``C = Σ w x xᵀ / Σ w`` over all tokens of all batches, for each named layer.

    ``model(**batch)`` is called once a batch, without gradients and in evaluation mode, and left as soon as all named layers have run.
    Batch size and padding do not change the result. Layers with shared inputs get the same ``Covariance`` object.

    Args:
        model: The model, perhaps wrapped in DDP; left as it was, training mode and hooks included.
        batches: Keyword arguments of the model's forward. Wrap the iterable to show progress.
        names: Full names of linear layers, as from ``select_linears``. An expert's inputs are those of the tokens that are routed to it;
            experts that no token reaches have no covariance, and a warning counts them.
        token_weights: How much each token counts for each layer; by default the attention mask.
        normalize: None, or "sample-max" (``Normalize``), for parity with PEFT.

    Raises:
        ValueError: If there are no batches, a layer never ran, weights do not fit, or an input is not finite; or experts are to be
            normalised by samples.

    Note:
        The forward pass is left early only if the first batch reached every named layer exactly once, as later ones then do too; and
        never under ``torch.distributed``, where a sharded model must run to its end.
    """
    bare = unwrapped(model)
    moments: Moments = {}

    def add(readers: tuple[str, ...], moment: SecondMoment) -> None:
        if readers in moments:
            moments[readers].add_(moment)
        else:
            moments[readers] = moment

    scaling = None if normalize is None else Normalize(normalize)
    if scaling is not None and any(map(expert_of, names)):
        raise ValueError(f"normalize is {normalize!r}, but tokens reach experts without their samples; leave it, or the experts, out.")
    may_stop, number = False, 0
    with evaluating(bare):
        for number, batch in enumerate(batches, 1):
            seen = _Seen(number)
            moment = partial(_moment, seen, partial(token_weights, batch=batch), scaling)
            ran = _run(bare, batch, names, moment, add, may_stop=may_stop)
            seen.check_finite()
            may_stop = (number == 1 or may_stop) and sorted(ran) == sorted(names) and not is_distributed()
    if number == 0:
        raise ValueError(NO_BATCHES)
    _sum_over_processes_(moments, next(bare.parameters()).device)
    return _means_(moments, names)


def split_layers(model: nn.Module, batches: Batches | None, names: Sequence[str], max_memory: int | None) -> list[list[str]]:
    """Return the names in parts whose sums fit ``max_memory`` bytes, in execution order; one batch is run to see who shares inputs.

    Collect, decompose and drop one part before the next. A single layer that is larger than the budget gets a part of its own. Without
    batches each layer counts by itself, and the order is that of the names.

    Raises:
        ValueError: If several passes may be needed, but the batches can be iterated only once.
    """
    sizes = {name: Symmetric.num_bytes(weight_shape(model, name)[1], PRECISION) for name in names}
    if max_memory is None or sum(sizes.values()) <= max_memory:
        return [list(names)]
    groups = [] if batches is None else _readers(model, batches, names, max_memory)
    parts: list[list[str]] = []
    room, placed = 0, set[str]()
    for group in [*groups, *((name,) for name in names)]:  # those that this batch does not reach come last
        new = [name for name in group if name not in placed]
        if new and sizes[new[0]] > room:
            parts.append([])
            room = max_memory
        if new:
            parts[-1] += new
            placed.update(new)
            room -= sizes[new[0]]
    return from_first_process(parts)


def _readers(model: nn.Module, batches: Batches, names: Sequence[str], max_memory: int) -> list[tuple[str, ...]]:
    """Return which layers the first batch feeds with the same inputs, in execution order.

    Raises:
        ValueError: If the batches can be iterated only once, or there are none.
    """
    if iter(batches) is batches:
        raise ValueError(
            f"max_memory is {max_memory} bytes, which may take several passes over the batches, but these can be iterated only once; "
            "give a list or a DataLoader."
        )
    first = next(iter(batches), None)
    if first is None:
        raise ValueError(NO_BATCHES)
    groups: list[tuple[str, ...]] = []
    bare = unwrapped(model)
    with evaluating(bare):
        _run(bare, first, names, lambda name, x, routed: None, lambda readers, _: groups.append(readers))
    return groups


class _Routed(NamedTuple):
    """Which of all tokens an expert reads."""

    rows: Tensor
    total: int


class _Weights(NamedTuple):
    """What weights of tokens say, read off their device once for all layers that they are given for."""

    counts: Tensor | None
    """Which tokens count (...); None where all do."""
    kept: Tensor | None
    """The weights of those that do (t,); None where all are 1."""
    total: float | None
    """Their sum; None where all are 1."""
    values: tuple[float, ...]
    """What is found among them, if it is little; nothing where all are 1."""

    @staticmethod
    def of(weights: Tensor) -> "_Weights":
        """Read weights w (...) >= 0."""
        counts = None if bool((weights > 0).all()) else weights > 0
        kept = weights.reshape(-1) if counts is None else weights[counts]
        if bool((kept == 1).all()):
            return _Weights(counts, None, None, ())
        values = kept.unique()
        return _Weights(counts, kept, float(in_float64(kept).sum()), tuple(values.tolist()) if len(values) <= FEW else ())


def moment_of(x: Tensor, weights: _Weights | None) -> SecondMoment:
    """Return ``Σ w x xᵀ``, ``Σ w`` and the number of tokens that count of inputs (..., n), in float32."""
    rows = x.reshape(-1, x.shape[-1]) if weights is None or weights.counts is None else x[weights.counts]
    rows = rows if rows.dtype in HALVES else rows.to(PRECISION)
    with torch.autocast(rows.device.type, enabled=False):  # which would multiply in half precision
        if weights is None or weights.kept is None or weights.total is None:
            return SecondMoment(Symmetric.gram(rows), float(len(rows)), len(rows))
        return SecondMoment(_weighted_gram(rows, weights.kept, weights.values), weights.total, len(rows))


def _weighted_gram(rows: Tensor, kept: Tensor, values: Sequence[float]) -> Symmetric:
    """Return ``Σ w x xᵀ`` of rows (t, n) with weights (t,).

    Where halves are multiplied as they are, a sum for each value and then these together: rows times √w would be rounded.
    """
    if not values or not multiplies_halves(rows):
        rows = rows.to(PRECISION)
        return Symmetric.gram(rows * kept.to(rows).sqrt()[:, None])

    def part(value: float) -> Symmetric:
        gram = Symmetric.gram(rows[kept == value])
        gram.multiply_(value)
        return gram

    total = part(values[0])
    for value in values[1:]:
        total.add_(part(value))
    return total


class _Seen:
    """What is known of a batch: its weights as they were read, and which layers' inputs are still to be checked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights: dict[int, tuple[Tensor, _Weights]] = {}
        self.finite: dict[str, Tensor] = {}

    def read(self, weights: Tensor) -> _Weights:
        """Return what weights say; reading waits for the device, so those that several layers are given are read once."""
        if id(weights) not in self.weights:
            self.weights[id(weights)] = weights, _Weights.of(weights)
        return self.weights[id(weights)][1]

    def check_finite(self) -> None:
        """Refuse inputs that were not finite; once a batch, as this too waits for the device."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for finite in self.finite.values():
            by_device.setdefault(finite.device, []).append(finite)
        if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
            return
        name = next(name for name, finite in self.finite.items() if not finite)
        raise ValueError(
            f"{name}: batch {self.number} feeds it values that are not finite, or whose squares are not; look at that sample "
            "or run the model in float32."
        )


def _fitting(weights: Tensor | tuple[Tensor | None, ...] | None, x: Tensor) -> Tensor | None:
    """Return the weights for this input, of several the first of its shape; where none has it, the first, which is then refused.

    Axes of size 1 do not matter: some attention puts heads that all queries share between samples and tokens.
    """
    several = weights if isinstance(weights, tuple) else (weights,)
    for each in several:
        if each is None:
            continue
        if each.squeeze().shape == x[..., 0].squeeze().shape:
            return each if each.shape == x.shape[:-1] else each.reshape(x.shape[:-1])
        if x.ndim == 2 and each.numel() == len(x):
            return each
    return None if any(each is None for each in several) else several[0]


def _routed_weights(weights: Tensor | tuple[Tensor | None, ...] | None, routed: _Routed) -> Tensor | None:
    """Return the weights of the tokens that an expert reads, of the first that are as many as all tokens."""
    several = weights if isinstance(weights, tuple) else (weights,)
    fitting = (each.reshape(-1)[routed.rows.to(each.device)] for each in several if each is not None and each.numel() == routed.total)
    return next(fitting, None if any(each is None for each in several) else several[0])


def _moment(seen: _Seen, weights_of: WeightsOf, normalize: Normalize | None, name: str, x: Tensor, routed: _Routed | None) -> SecondMoment:
    """Return the moment of what one batch feeds one layer."""
    x = x.detach()
    weights = _fitting(weights_of(name), x) if routed is None else _routed_weights(weights_of(name), routed)
    if weights is not None and x.ndim == 2 and weights.numel() == len(x):  # some models pass all tokens on as one row (OPT, experts)
        x = x.reshape(*weights.shape, x.shape[-1])
    if weights is not None and weights.shape != x.shape[:-1]:
        shape = tuple(x.shape[:-1]) if routed is None else (routed.total,)
        raise ValueError(
            f"{name}: its input has tokens of shape {shape} but the mask has {tuple(weights.shape)}; "
            "give `token_weights` weights for this layer's own tokens, or None for all alike."
        )
    read = None if weights is None else seen.read(weights)
    if normalize is None:
        moment = moment_of(x, read)
    else:
        scaled, samples = _scaled_by_sample(x.to(PRECISION), weights)
        moment = replace(moment_of(scaled, read), weight=float(samples))
    finite = torch.isfinite(moment.total.diagonal()).all()
    seen.finite[name] = finite & seen.finite[name].to(finite.device) if name in seen.finite else finite  # a layer may run several times
    return moment


def _scaled_by_sample(x: Tensor, weights: Tensor | None) -> tuple[Tensor, int]:
    """Return x (samples, ..., n) with each sample divided by max|x| over its tokens that count, and how many samples have any."""
    sizes = x.abs() if weights is None else x.abs().masked_fill((weights <= 0)[..., None], 0)
    largest = sizes.flatten(1).amax(1)
    scaled = x / largest.clamp(min=torch.finfo(x.dtype).tiny).view(-1, *[1] * (x.ndim - 1))
    return scaled, int((largest > 0).sum())


class _AllSeen(Exception):
    """All layers have seen this batch: the rest of the forward pass is not needed."""


def _run(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Sequence[str],
    look: Callable[[str, Tensor, _Routed | None], T],
    add: Callable[[tuple[str, ...], T], None],
    *,
    may_stop: bool = False,
) -> list[str]:
    """Run one batch; return the named layers in the order they ran, each as often as it did.

    Args:
        model: Not wrapped.
        batch: Keyword arguments of its forward.
        names: Layers whose inputs are looked at.
        look: Called with a layer's name, its input and, of an expert, which tokens these are; once however many layers read the same
            tensor in a row, and at once, not when the next input comes: the tensor may be overwritten in place before the next layer runs.
        add: Called with the names of all layers that read one input, and what ``look`` returned for it.
        may_stop: Whether the forward pass may be left as soon as all named layers have run.
    """
    ran: list[str] = []
    readers: tuple[str, ...] = ()
    current: Any = None
    version, result = 0, None

    def see(name: str, x: Tensor, routed: _Routed | None = None) -> None:
        nonlocal readers, current, version, result
        ran.append(name)
        if x is current and x._version == version and name not in readers:
            readers += (name,)
        else:
            if readers:
                add(readers, result)  # type: ignore[arg-type]
            current = result = None  # before the next product: only one waits
            result = look(name, x, routed)
            current, version, readers = x, x._version, (name,)
        if may_stop and len(set(ran)) == len(names):
            raise _AllSeen

    with _observed(model, names, see), suppress(_AllSeen):
        model(**batch)
    if readers:
        add(readers, result)  # type: ignore[arg-type]
    return ran


class _See(Protocol):
    """Is told what a layer is fed, and of an expert which tokens."""

    def __call__(self, name: str, x: Tensor, routed: _Routed | None = None) -> None:
        """Look at it."""


@contextmanager
def _observed(model: nn.Module, names: Iterable[str], see: _See) -> Iterator[None]:
    """Call ``see`` before each named layer runs; the hooks are gone at exit, whatever happens."""

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        see(name, next(iter((*args, *kwargs.values()))))  # models call a layer with its input by place or by name

    def hook_experts(wanted: Sequence[Expert], module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        tokens, chosen = (*args, *kwargs.values())[:2]
        _see_experts(module, tokens.detach(), chosen, wanted, see)

    fused: dict[str, list[Expert]] = {}
    handles = []
    try:
        for name in names:
            expert = expert_of(name)
            if expert is None:
                handles.append(model.get_submodule(name).register_forward_pre_hook(partial(hook, name), with_kwargs=True))
            else:
                fused.setdefault(expert.module, []).append(expert)
        for name, experts in fused.items():
            # Within PEFT's layers on it, which have put an active adapter's change into the weights by then.
            handles.append(experts_at(model, name).register_forward_pre_hook(partial(hook_experts, experts), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see_experts(module: Any, tokens: Tensor, chosen: Tensor, wanted: Sequence[Expert], see: _See) -> None:
    """Show what the experts of a module are fed: to the first matrix of each its tokens (t, n), to the second what it makes of them.

    Whatever implementation the module runs with, which transformers has several of: what is fed to the second is computed here again.

    Args:
        module: As transformers fuses experts.
        tokens: All inputs (tokens, n).
        chosen: The experts of each (tokens, k).
        wanted: Matrices of this module's.
        see: Called with name, input and which tokens it is of; not for experts that no token reaches.
    """
    first, _ = stacks_of(module)
    parameters: dict[int, set[str]] = {}
    for expert in wanted:
        parameters.setdefault(expert.index, set()).add(expert.parameter)
    path = wanted[0].module
    for index, keys in parameters.items():
        rows = (chosen == index).any(-1).nonzero().squeeze(1)
        if not len(rows):
            continue
        routed, x = _Routed(rows, len(tokens)), tokens[rows]
        if first in keys:
            see(f"{path}.{first}[{index}]", x, routed)
        for second in keys - {first}:
            weight = getattr(module, first)[index]
            hidden = x.to(weight.dtype) @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                hidden = hidden + getattr(module, f"{first}_bias")[index]
            see(f"{path}.{second}[{index}]", module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden), routed)


def _sum_over_processes_(moments: Moments, device: torch.device) -> None:
    """Add the moments of all processes, so that each has the sums over all samples; new ones are kept on the device."""
    if num_processes() == 1:
        return
    sizes: dict[tuple[str, ...], int] = {}
    for others in gathered({readers: moment.total.n for readers, moment in moments.items()}):
        sizes |= others
    for readers, n in sizes.items():
        if readers not in moments:
            moments[readers] = SecondMoment(Symmetric.zeros(n, PRECISION, device))
        moment = moments[readers]
        for panel in moment.total.panels:
            sum_over_processes_(panel)
        totals = torch.tensor([moment.weight, moment.num_tokens], dtype=torch.float64)
        sum_over_processes_(totals)
        moment.weight, moment.num_tokens = float(totals[0]), int(totals[1])


def _means_(moments: Moments, names: Sequence[str]) -> dict[str, Covariance]:
    """Return the covariance of each layer, one object for layers with the same moments; the moments are used up.

    Raises:
        ValueError: If a layer that is no expert has none, or none of its tokens counts.
    """
    keys: dict[str, list[tuple[str, ...]]] = {name: [] for name in names}
    for readers in moments:
        for name in readers:
            keys[name].append(readers)
    keys = _reached(moments, keys)
    unseen = [name for name, key in keys.items() if not key]
    if unseen:
        raise ValueError(
            f"{unseen[0]} (one of {len(unseen)} layers) never ran on the samples given; give samples that reach it or leave it out."
        )
    means: dict[tuple[tuple[str, ...], ...], Covariance] = {}
    # Moments that stand alone are divided in place, so sums over several come first.
    for name, key in sorted(keys.items(), key=lambda item: -len(item[1])):
        if tuple(key) not in means:
            try:
                means[tuple(key)] = mean_of_([moments[readers] for readers in key])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return {name: means[tuple(key)] for name, key in keys.items()}


def _reached(moments: Moments, keys: dict[str, list[tuple[str, ...]]]) -> dict[str, list[tuple[str, ...]]]:
    """Return the layers without the experts that no token reaches which counts; a warning counts those."""
    experts = [name for name in keys if expert_of(name)]
    missed = dict.fromkeys(name for name in experts if not sum(moments[readers].weight for readers in keys[name]))
    if missed:
        warnings.warn(
            f"{len(missed)} of {len(experts)} matrices of experts saw no token of the samples, such as {next(iter(missed))}: they stay as "
            "they are, with an adapter of rank 0. Give more samples.",
            stacklevel=4,
        )
    return {name: key for name, key in keys.items() if name not in missed}
