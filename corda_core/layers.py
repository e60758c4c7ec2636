"""Something done with the weight of every layer: on all cores of one machine, and shared out over the processes of ``torch.distributed``.

The core prints nothing and knows no progress bar: callers hand one in. Without ``torch.distributed`` one process has everything.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from corda_core.linears import weight_matrix, weight_shape

T = TypeVar("T")
R = TypeVar("R")


class Progress(Protocol):
    """Wraps what a long step goes over, ``tqdm`` for instance."""

    def __call__(self, steps: Iterable[T], title: str) -> Iterable[T]:
        """Return the steps, to be iterated once."""


def no_progress(steps: Iterable[T], title: str) -> Iterable[T]:
    """Show nothing."""
    return steps


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

    shapes = [weight_shape(model, name) for name in names]
    workers = min(threads_for(model), num_workers(shapes, next(model.parameters()).device))
    results: dict[str, R] = {}
    for part in gathered(dict(in_threads(named, own(), workers))):
        results |= part
    return {name: results[name] for name in names}


def num_workers(shapes: Iterable[tuple[int, int]], device: torch.device) -> int:
    """Return how many layers of these shapes (m, n) to take at a time.

    One on devices other than the CPU, and where a layer has min(m, n) > 2048: there kernels fill the cores, and copies the memory.
    """
    small = device.type == "cpu" and all(min(shape) <= 2048 for shape in shapes)
    return min(8, torch.get_num_threads()) if small else 1


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` of all items, in order, done by ``workers`` threads that share the caller's cores.

    No more than 2 × workers items are drawn ahead; with one worker all is done in the caller's thread. The first error ends it.
    """
    if workers == 1:
        yield from map(function, items)
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, cores // workers),)) as pool:
            running: deque[Future[R]] = deque()
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(cores)  # what a worker sets for itself, torch also gives to threads that start later


def is_distributed() -> bool:
    """Whether this process belongs to a group, be it the only one."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """Return how many processes work together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if is_distributed() else 1


def process_rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order; each must call it."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def from_first_process(value: T) -> T:
    """Return the first process's value; each must call it."""
    return gathered(value)[0]


def sum_over_processes_(tensor: Tensor) -> None:
    """Replace the tensor by its sum over all processes; each must call it."""
    if num_processes() == 1:
        return
    # NCCL only sums what lies on the GPU.
    staged = tensor.to("cuda") if dist.get_backend() == "nccl" else tensor.contiguous()
    dist.all_reduce(staged)
    if staged is not tensor:
        tensor.copy_(staged)


def threads_for(model: nn.Module) -> int:
    """Return how many threads may read the model's tensors at a time: one, unless all lie whole in this machine's memory."""
    plain = all(parameter.device.type == "cpu" and not isinstance(parameter, DTensor) for parameter in model.parameters())
    return min(8, torch.get_num_threads()) if plain else 1


def on_host(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in this machine's memory; a CUDA device copies all of them while it goes on, and is waited for once."""
    copies = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    # Into pinned memory, of which not much is to stay in use.
    return [copy.clone() if tensor.is_cuda else copy for tensor, copy in zip(tensors, copies, strict=True)]


@lru_cache
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a matrix product on a device in this precision: the best of several, measured once a process."""
    n = 1024 if device.type == "cpu" else 4096 if dtype == torch.float64 else 8192  # far longer than a launch takes
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5 if device.type == "cpu" else 8):  # the first warm up
        start = time.perf_counter()
        float((left @ right)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
