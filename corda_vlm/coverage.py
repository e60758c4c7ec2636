"""Which fraction of a model's parameters is adapted, and why the rest is not."""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from corda_core.linears import expert_of, is_quantized, stacks_of, weight_shape
from corda_vlm.towers import family_of

logger = logging.getLogger(__name__)

LARGE = 0.1
"""Fraction of parameters that cannot be adapted above which users are warned."""


@dataclass(frozen=True)
class Coverage:
    """How many parameters of some parts of a model are in layers that get adapters."""

    parts: tuple[str, ...]
    total: int
    adapted: int
    stacked: int
    """In 3-D weights, a matrix for each of many experts, that get no adapter."""
    example: str
    """The name of the first of these."""
    adaptable: bool = False
    """Whether that would get adapters if it were asked for."""

    def __str__(self) -> str:
        """Return the shares as a sentence."""
        share = f"{self.adapted / self.total:.1%} of the {self.total:,} parameters of {' and '.join(self.parts)} are in adapted layers"
        if not self.stacked:
            return f"{share}."
        reason = ', as targets does not name "experts"' if self.adaptable else ""
        return (
            f"{share}; {self.stacked / self.total:.1%} are in fused experts, 3-D weights such as {self.example}, which get no adapter"
            f"{reason}."
        )


def coverage(model: nn.Module, names: Sequence[str], parts: Sequence[str] | None = None) -> Coverage:
    """Return the coverage of the parts (None: those that the family adapts by default) by the named layers.

    Weights of a tied layer count once, weights in 4 bits by their number before quantisation.
    """
    family = family_of(model)
    chosen = family.default if parts is None else tuple(parts)
    sizes = {name: (size, stacked) for name, size, stacked in _sizes(model) if family.part_of(name) in chosen}
    adapted = {expert.stack for expert in map(expert_of, names) if expert is not None}
    stacks = [name for name, (_, stacked) in sizes.items() if stacked and name not in adapted]
    example = stacks[0] if stacks else ""
    holder, _, key = example.rpartition(".")
    return Coverage(
        parts=chosen,
        total=sum(size for size, _ in sizes.values()),
        adapted=sum(math.prod(weight_shape(model, name)) for name in names),
        stacked=sum(sizes[name][0] for name in stacks),
        example=example,
        adaptable=bool(example) and key in stacks_of(model.get_submodule(holder)),
    )


def tell(coverage: Coverage) -> None:
    """Log the coverage, or warn where a large share cannot be adapted."""
    if coverage.stacked > LARGE * coverage.total:
        warnings.warn(str(coverage), stacklevel=3)
    else:
        logger.info("%s", coverage)


def _sizes(model: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield each parameter's name and size, and whether it is a stack of matrices."""
    seen: set[nn.Parameter] = set()
    module: Any
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                m, n = weight_shape(model, prefix) if key == "weight" and is_quantized(module) else (parameter.numel(), 1)
                stacked = parameter.ndim > 2 and parameter.shape[0] > 1 and not isinstance(module, _ConvNd)
                yield f"{prefix}.{key}" if prefix else key, m * n, stacked
