"""An adapter on disk, to be trained on or used again: PEFT's folder, and beside it all that it was attached with.

    adapter_config.json, adapter_model.safetensors    what was trained, as PEFT writes it
    corda.safetensors                                 A0, B0, the plan, the options of ``attach``; provenance in the header

With ``protect="strict"`` PEFT reads the folder by itself; the others it refuses, as ``B A`` without ``B0 A0`` is another function:
``export`` writes what anybody can read.
"""

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corda_core.adapter import Attachment, attach, attachment_of
from corda_core.distributed import process_rank
from corda_core.files import replacing_in
from corda_core.lora import FROZEN
from corda_core.modules import gathered_whole, unwrapped
from corda_core.store import read_plan, save_plan

WEIGHTS = "adapter_model.safetensors"
ATTACHMENT = "corda.safetensors"
MADE_ANEW = tuple(f".{name}" for name in FROZEN)
"""How names end of what ``attach`` makes from the plan."""


def save(model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default") -> Path:
    """Write an adapter, so that ``load`` puts it on the untouched base again, to be used or trained further; return the folder.

    Under ``torch.distributed`` all processes call, the first one writes.

    Raises:
        ValueError: If the model carries no CorDA adapter of this name.
    """
    attachment = attachment_of(model, adapter_name)
    peft_model: Any = unwrapped(model)
    # Embeddings are not trained here; to find out whether they were resized PEFT would ask the hub.
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    trained = {key: gathered_whole(value).detach().cpu().contiguous() for key, value in state.items() if not key.endswith(MADE_ANEW)}
    if process_rank() == 0:
        with replacing_in(Path(folder)) as fresh:
            save_attachment(attachment, fresh / ATTACHMENT)
            save_file(trained, fresh / WEIGHTS, metadata={"format": "pt"})
            peft_model.peft_config[adapter_name].save_pretrained(fresh)
    return Path(folder)


def load(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False, adapter_name: str = "default") -> PeftModel:
    """Return the base with an adapter on it that ``save`` or a Trainer's checkpoint wrote.

    Args:
        model: The untouched base, in the precision that the adapter was made in.
        folder: As ``save`` wrote it.
        is_trainable: Whether training goes on; else nothing takes a gradient and the model is in evaluation mode.
        adapter_name: PEFT's name for it here.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the base is not the one that the adapter was made for.
    """
    attachment = load_attachment(Path(folder) / ATTACHMENT)
    weights = Path(folder) / WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist; expected the weights of an adapter beside {ATTACHMENT}.")
    try:
        state: dict[str, Tensor] = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or no safetensors file ({error}); take an earlier checkpoint.") from error
    # What is not there would silently stay at its start.
    wanted = {f"base_model.model.{name}.lora_{side}.weight" for name in attachment.plan.layers for side in "AB"}
    missing = sorted(wanted - state.keys()) or [
        name for name in attachment.train_fully if not any(key.startswith(f"base_model.model.{name}.") for key in state)
    ]
    if missing:
        raise ValueError(
            f"{weights} lacks {missing[0]} ({len(missing)} in all), which {ATTACHMENT} plans; the two are of different adapters."
        )
    adapted = attach_again(model, attachment, adapter_name)
    set_peft_model_state_dict(adapted, {key: value for key, value in state.items() if not key.endswith(MADE_ANEW)}, adapter_name)
    if not is_trainable:
        adapted.requires_grad_(False)
        adapted.eval()
    return adapted


def attach_again(model: nn.Module, attachment: Attachment, adapter_name: str = "default") -> PeftModel:
    """Return the model with an adapter attached as it once was, at its start."""
    return attach(model, **vars(attachment), adapter_name=adapter_name)


def save_attachment(attachment: Attachment, path: str | os.PathLike[str]) -> None:
    """Write what an adapter was attached with: its plan and the options."""
    options = {key: value for key, value in vars(attachment).items() if key != "plan"}
    save_plan(attachment.plan, path, attached=options)


def load_attachment(path: str | os.PathLike[str]) -> Attachment:
    """Return what an adapter was attached with.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    plan, options = read_plan(path)
    if options is None:
        raise ValueError(f"{path} holds a plan that was not attached; expected what `save` wrote: attach it and save that.")
    return Attachment(plan, **(options | {"train_fully": tuple(options["train_fully"])}))
