"""Adapted models put together from files, and made plain again; open_clip's attention is split and fused on the way."""

import os
from pathlib import Path

from peft import PeftModel
from torch import nn

import corda_core
from corda_core import Attachment
from corda_core.adapter import attach_again
from corda_vlm.attention import fuse_attention, split_attention
from corda_vlm.towers import is_open_clip


def load(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False, adapter_name: str = "default") -> PeftModel:
    """Return the base with an adapter from the disk on it (``corda_core.load``).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the base is not the one that the adapter was made for.
    """
    return corda_core.load(_split(model), Path(folder), is_trainable=is_trainable, adapter_name=adapter_name)


def attached_as(model: nn.Module, attachment: Attachment) -> PeftModel:
    """Return the model with an adapter attached as it once was, at its start.

    Raises:
        ValueError: If the base is not the one that the adapter was made for.
    """
    return attach_again(_split(model), attachment)


def merge(model: PeftModel, *, alpha: float = 1.0, adapter_name: str = "default") -> nn.Module:
    """Return the base model with the change added to its weights (``corda_core.merge``).

    Raises:
        ValueError: If the model carries no adapter of this name, or an option or the trained weights are not right.
    """
    merged = corda_core.merge(model, alpha=alpha, adapter_name=adapter_name)
    fuse_attention(merged)
    return merged


def _split(model: nn.Module) -> nn.Module:
    if is_open_clip(model):
        split_attention(model)
    return model
