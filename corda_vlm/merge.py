"""From an adapted model back to a plain one."""

from typing import Any

from peft import PeftModel
from torch import nn

from corda_vlm.attention import fuse_attention


def merge(model: PeftModel) -> nn.Module:
    """Return the base model with the change added to its weights, without PEFT; its ``state_dict`` has the keys it always had.

    Attention that was split for open_clip is fused again.

    Raises:
        ValueError: If the merged weights are not finite (PEFT's check).
    """
    merger: Any = model
    merged: nn.Module = merger.merge_and_unload(safe_merge=True)
    fuse_attention(merged)
    return merged
