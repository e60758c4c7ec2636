"""From an adapted model back to a plain one."""

from peft import PeftModel
from torch import nn

import corda_core
from corda_vlm.attention import fuse_attention


def merge(model: PeftModel, *, alpha: float = 1.0, adapter_name: str = "default") -> nn.Module:
    """Return the base model with the change added to its weights (``corda_core.merge``); attention split for open_clip is fused again.

    Raises:
        ValueError: If the model carries no adapter of this name, or an option or the trained weights are not right.
    """
    merged = corda_core.merge(model, alpha=alpha, adapter_name=adapter_name)
    fuse_attention(merged)
    return merged
