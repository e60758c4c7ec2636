"""An adapter on disk, to be trained on or used again: PEFT's folder, and beside it all that it was attached with.

    adapter_config.json, adapter_model.safetensors    what was trained, as PEFT writes it
    corda.safetensors                                 A0, B0, the plan, the options of ``attach``; in the header provenance, and digests of
                                                      what was saved with it

With ``protect="strict"`` PEFT reads the folder by itself; the others it refuses, as ``B A`` without ``B0 A0`` is another function:
``export`` writes what anybody can read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from corda_core.adapter import Attachment, attach_again, attachment_of, check_base_kept
from corda_core.distributed import process_rank
from corda_core.files import check_finite, file_digest, read_tensors, replacing_in, tensors_digest, write_tensors
from corda_core.lora import FROZEN
from corda_core.modules import gathered_whole, unwrapped
from corda_core.store import read_plan, save_plan

WEIGHTS = "adapter_model.safetensors"
ATTACHMENT = "corda.safetensors"
MADE_ANEW = tuple(f".{name}" for name in FROZEN)
"""How names end of what ``attach`` makes from the plan."""


@dataclass(frozen=True)
class Beside:
    """What was saved with an attachment."""

    weights: str
    """Digest of the trained tensors, whoever wrote them; "" where there were none yet."""

    files: Mapping[str, str]
    """SHA-256 of each file, by its path in the folder."""


def save(model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default") -> Path:
    """Write an adapter, so that ``load`` puts it on the untouched base again, to be used or trained further; return the folder.

    Under ``torch.distributed`` all processes call, the first one writes.

    Raises:
        ValueError: If the model carries no CorDA adapter of this name, or something of the base has changed that is not in the file.
    """
    attachment = attachment_of(model, adapter_name)
    check_base_kept(model, adapter_name)
    peft_model: Any = unwrapped(model)
    # Embeddings are not trained here; to find out whether they were resized PEFT would ask the hub.
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    trained = {  # copies: a file holds no memory twice, which tied weights in a module that trains whole share
        key: gathered_whole(value).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
        if not key.endswith(MADE_ANEW)
    }
    if process_rank() == 0:
        with replacing_in(Path(folder)) as fresh:
            write_tensors(trained, fresh / WEIGHTS, {"format": "pt"})
            peft_model.peft_config[adapter_name].save_pretrained(fresh)
            save_attachment(attachment, fresh / ATTACHMENT, saved_with=fresh)
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
        ValueError: If a file is damaged, files are of different adapters, or the base is not the one that the adapter was made for.
    """
    attachment, trained = read_adapter(Path(folder))
    adapted = attach_again(model, attachment, adapter_name)
    put_weights_(adapted, trained, adapter_name)
    if not is_trainable:
        adapted.requires_grad_(False)
        adapted.eval()
    return adapted


def read_adapter(folder: Path) -> tuple[Attachment, dict[str, Tensor]]:
    """Return what an adapter in a folder was attached with, and what was trained, by PEFT's names.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, the two are of different adapters, or values are not finite.
    """
    attachment, beside = read_attachment(folder / ATTACHMENT)
    path = folder / WEIGHTS
    trained = _trained(path)
    # What is not there would silently stay at its start.
    wanted = {
        f"base_model.model.{name}.lora_{side}.weight": shape
        for name, init in attachment.plan.layers.items()
        for side, shape in (("A", init.A0.shape), ("B", init.B0.shape))
    }
    missing = sorted(wanted.keys() - trained.keys()) or [
        name for name in attachment.train_fully if not any(key.startswith(f"base_model.model.{name}.") for key in trained)
    ]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} in all), which {ATTACHMENT} plans; the two are of different adapters.")
    odd = next((key for key, shape in wanted.items() if trained[key].shape != shape), None)
    if odd is not None:
        raise ValueError(f"{path} has {odd} of shape {tuple(trained[odd].shape)}, but {ATTACHMENT} plans {tuple(wanted[odd])}.")
    check_finite(trained, path, "take an earlier checkpoint")
    if beside is not None and beside.weights != tensors_digest(trained, {}):
        raise ValueError(
            f"{path} was not saved together with {ATTACHMENT}, as when a save was killed half-way or files of two runs were mixed; "
            "take a whole checkpoint, or save the adapter again."
        )
    return attachment, trained


def put_weights_(model: PeftModel, trained: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Give an attached adapter what was trained.

    Raises:
        ValueError: If there is a tensor that the model has no place for.
    """
    try:
        result = set_peft_model_state_dict(model, dict(trained), adapter_name)
    except RuntimeError as error:  # another shape
        raise ValueError(f"{WEIGHTS} does not fit the adapted model: {' '.join(str(error).split())[:300]}.") from error
    if result.unexpected_keys:
        raise ValueError(f"{WEIGHTS} has {result.unexpected_keys[0]}, for which the adapted model has no place; it is of another adapter.")


def check_saved_together(folder: Path, beside: Beside) -> None:
    """Check every file of a folder against what its attachment, the last file to be written, recorded of them (``read_attachment``).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged, or it was not recorded.
    """
    if WEIGHTS not in beside.files:
        raise ValueError(f"{folder / ATTACHMENT} has no digests of the files beside it.")
    for name, digest in beside.files.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing.")
        if file_digest(folder / name) != digest:
            raise ValueError(f"{folder / name} is not as it was written.")


def save_attachment(attachment: Attachment, path: str | os.PathLike[str], *, saved_with: Path | None = None) -> None:
    """Write what an adapter was attached with: its plan and the options.

    Args:
        attachment: Plan and options.
        path: The file.
        saved_with: A folder that holds what belongs with it, the weights among it: their digests are written too.
    """
    options = {key: value for key, value in vars(attachment).items() if key != "plan"}
    weights = "" if saved_with is None else tensors_digest(_trained(saved_with / WEIGHTS), {})
    beside = Beside(weights, {} if saved_with is None else _file_digests(saved_with))
    save_plan(attachment.plan, path, attached=options, beside=vars(beside))


def read_attachment(path: Path) -> tuple[Attachment, Beside | None]:
    """Return what an adapter was attached with, and what was saved with it; None of files of corda-vlm 0.1.0, which do not tell.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    plan, options, beside = read_plan(path)
    if options is None:
        raise ValueError(f"{path} holds a plan that was not attached; expected what `save` wrote: attach it and save that.")
    try:
        attachment = Attachment(plan, **(options | {"train_fully": tuple(options["train_fully"])}))
        return attachment, None if beside is None else Beside(beside["weights"], dict(beside["files"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a header that is not that of an attached adapter ({error!r}); save it again.") from error


def load_attachment(path: Path) -> Attachment:
    """Return what an adapter was attached with.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    return read_attachment(path)[0]


def _trained(path: Path) -> dict[str, Tensor]:
    """Return what was trained, without what ``attach`` makes anew, which PEFT writes beside it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the weights of an adapter beside {ATTACHMENT}.")
    tensors, _ = read_tensors(path, "take an earlier checkpoint")
    return {key: value for key, value in tensors.items() if not key.endswith(MADE_ANEW)}


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ATTACHMENT)
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
