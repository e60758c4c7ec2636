"""What ``torch.distributed`` adds to collection and decomposition; without it, one process that has everything."""

import re
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error, or what it came from, says that another process of the group ended or cannot be reached."""
    seen: BaseException | None = error
    while seen is not None:
        # Words: gloo's and NCCL's errors in a backward pass are plain RuntimeErrors.
        is_word = isinstance(seen, RuntimeError) and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", str(seen)) is not None
        if isinstance(seen, dist.DistError) or (is_word and num_processes() > 1):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
