"""Do something with the weight of every layer, on all cores and in all processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from corda_core.distributed import gathered, num_processes, process_rank
from corda_core.modules import weight_matrix, weight_shape
from corda_core.parallel import in_threads
from corda_core.progress import Progress

R = TypeVar("R")


def over_layers(
    model: nn.Module, names: Iterable[str], function: Callable[[str, Tensor], R], progress: Progress, title: str
) -> dict[str, R]:
    """Return ``function(name, W)`` of all layers; under ``torch.distributed`` each process does every P-th and all get all.

    Raises:
        ValueError: As the function, with the layer's name before it.
    """
    names = list(names)

    def named(item: tuple[str, Tensor]) -> tuple[str, R]:
        try:
            return item[0], function(*item)
        except ValueError as error:
            raise ValueError(f"{item[0]}: {error}") from error

    def own() -> Iterator[tuple[str, Tensor]]:
        for place, name in enumerate(progress(names, title)):
            weight = weight_matrix(model, name)  # a sharded one is gathered by all processes at once
            if place % num_processes() == process_rank():
                yield name, weight

    plain = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    workers = num_workers([weight_shape(model, name) for name in names], next(model.parameters()).device) if plain else 1
    mine = dict(in_threads(named, own(), workers))
    everyone: dict[str, R] = {}
    for theirs in gathered(mine):
        everyone |= theirs
    return {name: everyone[name] for name in names}


def num_workers(shapes: Iterable[tuple[int, int]], device: torch.device) -> int:
    """Return how many layers of these shapes (m, n) to take at a time.

    One on devices other than the CPU, and where a layer has min(m, n) > 2048: there kernels fill the cores, and copies the memory.
    """
    small = device.type == "cpu" and all(min(shape) <= 2048 for shape in shapes)
    return min(8, torch.get_num_threads()) if small else 1
