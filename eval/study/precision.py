"""Cast frozen weights once for many steps, where a setting casts to a shorter type."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def cast_once(model: nn.Module, casting: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold a model's frozen linear weights in the type that ``casting`` would cast them to, and give them back in the end.

    Autocasting casts a frozen weight anew in each pass, which takes a third of a step of few tokens. Only weights that the shorter type
    holds exactly are held so: each result stays what it was, bit for bit.

    Args:
        model: Weights shared with other layers, such as a tied head's, stay what they are there.
        casting: Returns the context that the model runs in, on the CPU; without autocasting nothing is held.
    """
    with casting():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    whole = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and layer.weight.dtype is torch.float32:
            short = layer.weight.detach().to(dtype)
            if dtype is not torch.float32 and torch.equal(short.float(), layer.weight):
                whole[layer], layer.weight = layer.weight, nn.Parameter(short, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in whole.items():
            layer.weight = weight
