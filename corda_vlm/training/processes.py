"""The group of processes that `accelerate launch` or `torchrun` started; without them, one."""

import re

import torch
import torch.distributed as dist
from accelerate import PartialState

from corda_core.layers import num_processes


def processes() -> PartialState:
    """Return the group, which the first call joins, and with it this process's device.

    On a machine without accelerators it must be told that there is nothing else, or it takes itself for alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


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
