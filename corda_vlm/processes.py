"""The group of processes that `accelerate launch` or `torchrun` started; without them, one."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return the group, which the first call joins, and with it this process's device.

    On a machine without accelerators it must be told that there is nothing else, or it takes itself for alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
