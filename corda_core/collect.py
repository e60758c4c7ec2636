"""Run samples through a model and take the second moment of what each layer is fed.

Layers called with the very same tensor (q/k/v, gate/up) share one moment, found out at run time: each input is
multiplied once and booked under the set of layers that read it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corda_core.covariance import Covariance, SecondMoment, mean_of


class ValidTokens(Protocol):
    """Tells which of a layer's input tokens count."""

    def __call__(self, name: str, batch: Mapping[str, Any]) -> Tensor | None:
        """Return a mask (True: counts) shaped as the layer's input without its last axis, or None if all count."""


def attention_mask_of(name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the batch's ``attention_mask``: right for the layers of a language model."""
    return batch.get("attention_mask")


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    valid_tokens: ValidTokens = attention_mask_of,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Covariance]:
    """Return ``C = Σ x xᵀ / #tokens`` over all valid tokens of all batches, for each named layer.

    ``model(**batch)`` is called once a batch, without gradients and in evaluation mode. Batch size and padding do not
    change the result. Layers with shared inputs get the same ``Covariance`` object.

    Args:
        model: The model; left as it was, training mode and hooks included.
        batches: Keyword arguments of the model's forward. Wrap the iterable to show progress.
        names: Full names of linear layers, as from ``select_linears``.
        valid_tokens: Which tokens count for which layer.
        dtype: Precision of products and sums, whatever the model's own.

    Raises:
        ValueError: If there are no batches, a layer never ran, a mask does not fit, or an input is not finite.
    """
    ledger = _Ledger(dtype)
    was_training = model.training
    model.eval()
    count = 0
    try:
        for count, batch in enumerate(batches, start=1):
            ledger.start(count, partial(valid_tokens, batch=batch))
            with torch.no_grad(), _observed(model, names, ledger.see):
                model(**batch)
            ledger.book()
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("There are no batches: the covariances need at least one sample.")
    return ledger.results(names)


@contextmanager
def _observed(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before each named layer runs; the hooks are gone at exit, whatever happens."""
    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Ledger:
    """The moments so far, by the layers that read the same inputs, and the input being read now."""

    dtype: torch.dtype
    batch_number: int = 0
    mask_of: Callable[[str], Tensor | None] = lambda name: None
    moments: dict[tuple[str, ...], SecondMoment] = field(default_factory=dict)
    current: Tensor | None = None
    version: int = 0
    readers: tuple[str, ...] = ()
    gram: Tensor | None = None
    num_tokens: int = 0

    def start(self, batch_number: int, mask_of: Callable[[str], Tensor | None]) -> None:
        """Begin a batch."""
        self.batch_number, self.mask_of = batch_number, mask_of

    def see(self, name: str, x: Tensor) -> None:
        """Take one layer's input: count it once however many layers read the same tensor in a row."""
        if x is self.current and x._version == self.version and name not in self.readers:
            self.readers += (name,)
            return
        self.book()
        tokens = self._valid(name, x)
        self.current, self.version, self.readers = x, x._version, (name,)
        # Multiplied at once, not when booked: the tensor may be overwritten in place before the next layer runs.
        self.gram, self.num_tokens = tokens.T @ tokens, len(tokens)

    def book(self) -> None:
        """Add the current input to the moment of its readers."""
        if self.gram is not None:
            if self.readers not in self.moments:
                self.moments[self.readers] = SecondMoment(len(self.gram), self.dtype, self.gram.device)
            self.moments[self.readers].add_(self.gram, self.num_tokens)
        self.current = self.gram = None

    def results(self, names: Sequence[str]) -> dict[str, Covariance]:
        """Return the covariance of each layer, one object for layers with the same moments."""
        keys = {name: tuple(readers for readers in self.moments if name in readers) for name in names}
        unseen = [name for name, found in keys.items() if not found]
        if unseen:
            raise ValueError(
                f"{unseen[0]} (one of {len(unseen)} layers) never ran on the samples given; give samples that reach it or leave it out."
            )
        shared: dict[tuple[tuple[str, ...], ...], Covariance] = {}
        for name, found in keys.items():
            if found not in shared:
                try:
                    shared[found] = mean_of([self.moments[readers] for readers in found])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return {name: shared[found] for name, found in keys.items()}

    def _valid(self, name: str, x: Tensor) -> Tensor:
        """Return the tokens that count as rows (tokens, n) in the ledger's precision."""
        mask = self.mask_of(name)
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: its input has tokens of shape {tuple(x.shape[:-1])} but the mask has {tuple(mask.shape)}; "
                "give `valid_tokens` a mask of this layer's own tokens, or None for all."
            )
        rows = x.detach().reshape(-1, x.shape[-1]) if mask is None else x.detach()[mask.bool()]
        rows = rows.to(self.dtype)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{name}: batch {self.batch_number} feeds it values that are not finite; look at that sample or run the model in float32."
            )
        return rows
