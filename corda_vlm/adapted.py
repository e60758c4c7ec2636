"""Adapted models from files, and plain models from adapted ones; open_clip's attention is split and fused on the way."""

import os
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import nn

import corda_core
from corda_core.attach import Attachment, attach_again
from corda_core.files import read_json, read_tensors
from corda_core.store import WEIGHTS
from corda_vlm.attention import fuse_attention, split_attention
from corda_vlm.failures import one_line
from corda_vlm.towers import is_open_clip
from corda_vlm.training.models import network_only_if


def load(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False, adapter_name: str = "default") -> PeftModel:
    """Return the base with an adapter from the disk on it (``corda_core.load``).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the base is not the one that the adapter was made for.
    """
    return corda_core.load(_split(model), Path(folder), is_trainable=is_trainable, adapter_name=adapter_name)


def load_lora(model: nn.Module, folder: Path) -> PeftModel:
    """Return the base with an ordinary LoRA from the disk on it, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is no LoRA, is damaged or does not fit the base or its config, or its config asks for code of others.
    """
    check_lora_config(folder)
    try:
        with network_only_if(False):
            adapted = PeftModel.from_pretrained(_split(model), folder).eval()
    except Exception as error:  # PEFT lets through whatever a config of other values leads to
        raise ValueError(f"{folder} holds no LoRA that fits this base ({one_line(error)}); look at its {CONFIG_NAME}.") from error
    # PEFT drops weights that it has no place for, and draws those that are missing.
    held, _ = read_tensors(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    odd = sorted(wanted.keys() - held.keys()) or sorted(held.keys() - wanted.keys() - adapted.state_dict().keys())
    if odd:
        raise ValueError(f"{folder / CONFIG_NAME} and {WEIGHTS} do not fit each other: one has {odd[0]}, the other lacks it.")
    return adapted


def check_lora_config(folder: Path) -> None:
    """Check the config of an ordinary LoRA before a model is made with it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not that of a LoRA, is damaged, or asks for code of others.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":  # other kinds of PEFT's may load tokenizers and models that their config names
        raise ValueError(f"{path} is of PEFT's kind {kind!r}; expected LORA.")
    if config.get("megatron_config"):
        raise ValueError(
            f"{path} asks to import the package {config.get('megatron_core')!r} (megatron_config), which no adapter may; remove it."
        )


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
