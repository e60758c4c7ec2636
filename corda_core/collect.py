"""Run samples through a model and take the second moment of what each layer is fed.

Layers called with the very same tensor (q/k/v, gate/up) share one moment, found out at run time: each input is
multiplied once and booked under the set of layers that read it. Under ``torch.distributed`` each process brings its own
samples, and all get the mean over all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from corda_core.covariance import Covariance, SecondMoment, Symmetric, in_float64, mean_of
from corda_core.layers import from_first_process, gathered, is_distributed, num_processes, sum_over_processes_
from corda_core.linears import evaluating, unwrapped, weight_shape

Batches = Iterable[Mapping[str, Any]]
Normalize = Literal["sample-max"]


class TokenWeights(Protocol):
    """Tells how much each of a layer's input tokens counts."""

    def __call__(self, name: str, batch: Mapping[str, Any]) -> Tensor | None:
        """Return weights >= 0 (a mask: 1 counts, 0 does not) shaped as the layer's input without its last axis; None if all count alike."""


def attention_mask_of(name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the batch's ``attention_mask``: right for the layers of a language model."""
    return batch.get("attention_mask")


def collect(
    model: nn.Module,
    batches: Batches,
    names: Sequence[str],
    *,
    token_weights: TokenWeights = attention_mask_of,
    normalize: Normalize | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Covariance]:
    """Return ``C = Σ w x xᵀ / Σ w`` over all tokens of all batches, for each named layer.

    ``model(**batch)`` is called once a batch, without gradients and in evaluation mode, and left as soon as all named layers have run.
    Batch size and padding do not change the result. Layers with shared inputs get the same ``Covariance`` object.

    Args:
        model: The model, perhaps wrapped in DDP; left as it was, training mode and hooks included.
        batches: Keyword arguments of the model's forward. Wrap the iterable to show progress.
        names: Full names of linear layers, as from ``select_linears``.
        token_weights: How much each token counts for each layer; by default the attention mask.
        normalize: None; or "sample-max", for parity with CorDA: each sample is divided by max|x| over its tokens, and the mean is
            taken over samples instead of tokens.
        dtype: Precision of products and sums, whatever the model's own.
        device: Where the sums are kept; None keeps them beside the model.

    Raises:
        ValueError: If there are no batches, a layer never ran, weights do not fit, or an input is not finite.

    Note:
        The forward pass is left early only if the first batch reached every named layer exactly once, as later ones then do too; and
        never under ``torch.distributed``, where a sharded model must run to its end.
    """
    bare = unwrapped(model)
    sums = _Sums(names, dtype, torch.device(device) if device is not None else next(bare.parameters()).device)
    may_stop = False
    number = 0
    with evaluating(bare):
        for number, batch in enumerate(batches, 1):
            reading = _Reading(number, len(names), partial(token_weights, batch=batch), normalize, sums, may_stop)
            with _observed(bare, names, reading.see), suppress(_AllSeen):
                bare(**batch)
            reading.book()
            may_stop = (number == 1 or may_stop) and reading.saw_each_layer_once and not is_distributed()
    if number == 0:
        raise ValueError("There are no batches: the covariances need at least one sample.")
    return sums.means()


def collect_in_passes(
    model: nn.Module,
    batches: Batches,
    names: Sequence[str],
    max_memory: int | None,
    *,
    token_weights: TokenWeights = attention_mask_of,
    normalize: Normalize | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Iterator[dict[str, Covariance]]:
    """Yield what ``collect`` returns in parts whose sums take at most ``max_memory`` bytes, one pass over the batches each.

    Decompose and drop one part before you ask for the next. A single layer that is larger than the budget gets a pass of its own.

    Args:
        model: As in ``collect``.
        batches: As in ``collect``, but it must be possible to go over them again: a list or a DataLoader, not a generator.
        names: As in ``collect``.
        max_memory: Bytes for the sums of one pass; None makes it one pass.
        token_weights: As in ``collect``.
        normalize: As in ``collect``.
        dtype: As in ``collect``.
        device: As in ``collect``.

    Raises:
        ValueError: As ``collect``; or if several passes are needed and the batches can be gone over only once.
    """
    for part in split_layers(model, batches, names, max_memory, dtype):
        yield collect(model, batches, part, token_weights=token_weights, normalize=normalize, dtype=dtype, device=device)


def split_layers(
    model: nn.Module, batches: Batches, names: Sequence[str], max_memory: int | None, dtype: torch.dtype = torch.float32
) -> list[list[str]]:
    """Return the names in parts whose sums fit the budget, in execution order; one batch is run to see who shares inputs.

    Raises:
        ValueError: If several passes may be needed and the batches can be gone over only once.
    """
    if max_memory is None:
        return [list(names)]
    sizes = {name: Symmetric.num_bytes(weight_shape(model, name)[1], dtype) for name in names}
    if sum(sizes.values()) <= max_memory:
        return [list(names)]
    if iter(batches) is batches:
        raise ValueError(
            f"max_memory is {max_memory} bytes, which may take several passes over the batches, but these can be gone over only once; "
            "give a list or a DataLoader."
        )
    parts: list[list[str]] = []
    room = 0
    for group in _readers_in_order(model, next(iter(batches), {}), names):
        if sizes[group[0]] > room:
            parts.append([])
            room = max_memory
        parts[-1] += group
        room -= sizes[group[0]]
    return from_first_process(parts)


def _readers_in_order(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Return the names in the order in which one batch reaches them, those that read the same tensor together."""
    groups: list[list[str]] = []
    seen: set[str] = set()
    last: Tensor | None = None
    readers: list[str] = []  # of the last input, but for those that had run before

    def see(name: str, x: Tensor) -> None:
        nonlocal last, readers
        if x is not last:
            last, readers = x, []
        if name not in seen:
            if not readers:
                groups.append(readers)
            readers.append(name)
            seen.add(name)

    bare = unwrapped(model)
    with evaluating(bare), _observed(bare, names, see):
        bare(**batch)
    return groups + [[name] for name in names if name not in seen]


class _AllSeen(Exception):
    """All layers have seen this batch: the rest of the forward pass is not needed."""


@contextmanager
def _observed(model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before each named layer runs; the hooks are gone at exit, whatever happens."""
    handles = []
    try:
        for name in names:
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(partial(_see_input, see, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see_input(see: Callable[[str, Tensor], None], name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
    see(name, next(iter((*args, *kwargs.values()))))  # models call a layer with its input by place or by name


class _Sums:
    """The moments so far, by the layers that read the same inputs."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        self.names, self.dtype, self.device = names, dtype, device
        self.moments: dict[tuple[str, ...], SecondMoment] = {}

    def add(self, readers: tuple[str, ...], gram: Symmetric, weight: float, num_tokens: int) -> None:
        """Add one input."""
        if readers in self.moments:
            self.moments[readers].add_(gram, weight, num_tokens)
        else:
            self.moments[readers] = SecondMoment(gram.to(self.device), weight, num_tokens)

    def means(self) -> dict[str, Covariance]:
        """Return the covariance of each layer, one object for layers with the same moments; the sums are used up."""
        self._add_other_processes()
        keys = {name: tuple(readers for readers in self.moments if name in readers) for name in self.names}
        unseen = [name for name, found in keys.items() if not found]
        if unseen:
            raise ValueError(
                f"{unseen[0]} (one of {len(unseen)} layers) never ran on the samples given; give samples that reach it or leave it out."
            )
        shared: dict[tuple[tuple[str, ...], ...], Covariance] = {}
        # Moments that stand alone are divided in place, so sums over several come first.
        for name, found in sorted(keys.items(), key=lambda item: -len(item[1])):
            if found not in shared:
                try:
                    shared[found] = mean_of([self.moments[readers] for readers in found])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return {name: shared[found] for name, found in keys.items()}

    def _add_other_processes(self) -> None:
        """Add the moments of all processes, so that each has the sums over all samples."""
        if num_processes() == 1:
            return
        mine = {readers: moment.total.n for readers, moment in self.moments.items()}
        everyone: dict[tuple[str, ...], int] = {}
        for theirs in gathered(mine):
            everyone |= theirs
        for readers, n in everyone.items():
            if readers not in self.moments:
                self.moments[readers] = SecondMoment(Symmetric.zeros(n, self.dtype, self.device))
            moment = self.moments[readers]
            for panel in moment.total.panels:
                sum_over_processes_(panel)
            totals = torch.tensor([moment.weight, moment.num_tokens], dtype=torch.float64)
            sum_over_processes_(totals)
            moment.weight, moment.num_tokens = float(totals[0]), int(totals[1])


class _Reading:
    """One batch on its way through the model: which layers have run, and the input being read now."""

    def __init__(
        self,
        number: int,
        num_layers: int,
        weights_of: Callable[[str], Tensor | None],
        normalize: Normalize | None,
        sums: _Sums,
        may_stop: bool,
    ) -> None:
        self.number, self.num_layers, self.weights_of, self.normalize = number, num_layers, weights_of, normalize
        self.sums, self.may_stop = sums, may_stop
        self.seen: list[str] = []
        self.current: Tensor | None = None
        self.version = 0
        self.readers: tuple[str, ...] = ()
        self.gram: Symmetric | None = None
        self.weight, self.num_tokens = 0.0, 0

    @property
    def saw_each_layer_once(self) -> bool:
        """Whether each layer has run exactly once."""
        return len(self.seen) == len(set(self.seen)) == self.num_layers

    def see(self, name: str, x: Tensor) -> None:
        """Take one layer's input: count it once however many layers read the same tensor in a row."""
        self.seen.append(name)
        if x is self.current and x._version == self.version and name not in self.readers:
            self.readers += (name,)
        else:
            self.book()
            # Multiplied at once, not when booked: the tensor may be overwritten in place before the next layer runs.
            self._multiply(name, x)
        if self.may_stop and len(set(self.seen)) == self.num_layers:
            raise _AllSeen

    def book(self) -> None:
        """Add the current input to the moment of its readers."""
        if self.gram is not None:
            self.sums.add(self.readers, self.gram, self.weight, self.num_tokens)
        self.current = self.gram = None

    def _multiply(self, name: str, x: Tensor) -> None:
        """Make ``x`` the current input, read by ``name``, and take its weighted Gram matrix."""
        rows, self.weight, self.num_tokens = self._weighted(name, x.detach())
        self.current, self.version, self.readers = x, x._version, (name,)
        with torch.autocast(rows.device.type, enabled=False):  # which would multiply in half precision
            self.gram = Symmetric.gram(rows)
        if not torch.isfinite(self.gram.diagonal()).all():
            raise ValueError(
                f"{name}: batch {self.number} feeds it values that are not finite, or whose squares are not; look at that sample "
                "or run the model in float32."
            )

    def _weighted(self, name: str, x: Tensor) -> tuple[Tensor, float, int]:
        """Return rows √w x (tokens, n) in the sums' precision, Σ w and the number of tokens that count."""
        weights = self.weights_of(name)
        if weights is not None and x.ndim == 2 and weights.numel() == len(x):  # some models pass all tokens on as one row (OPT, experts)
            x = x.reshape(*weights.shape, x.shape[-1])
        if weights is not None and weights.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: its input has tokens of shape {tuple(x.shape[:-1])} but the mask has {tuple(weights.shape)}; "
                "give `token_weights` weights for this layer's own tokens, or None for all alike."
            )
        counts = None if weights is None or bool((weights > 0).all()) else weights > 0
        if self.normalize == "sample-max":
            x, samples = _scaled_by_sample(x.to(self.sums.dtype), counts)
        rows = (x.reshape(-1, x.shape[-1]) if counts is None else x[counts]).to(self.sums.dtype)
        total = float(len(rows))
        if weights is not None and bool((weights[weights > 0] != 1).any()):
            kept = (weights.reshape(-1) if counts is None else weights[counts]).to(rows)
            rows, total = rows * kept.sqrt()[:, None], float(in_float64(kept).sum())
        return rows, float(samples) if self.normalize == "sample-max" else total, len(rows)


def _scaled_by_sample(x: Tensor, counts: Tensor | None) -> tuple[Tensor, int]:
    """Return x (samples, ..., n) with each sample divided by max|x| over its tokens that count, and how many samples have any."""
    sizes = x.abs() if counts is None else x.abs().masked_fill(~counts[..., None], 0)
    largest = sizes.flatten(1).amax(1)
    scaled = x / largest.clamp(min=torch.finfo(x.dtype).tiny).view(-1, *[1] * (x.ndim - 1))
    return scaled, int((largest > 0).sum())
