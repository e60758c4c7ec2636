"""Covariances, plans and adapters on disk: safetensors and JSON that say what they were made from; never pickle.

An adapter, to be trained on or used again, is PEFT's folder, and beside it all that it was attached with:

    adapter_config.json, adapter_model.safetensors    what was trained, as PEFT writes it
    corda.safetensors                                 A0, B0, the plan, the options of ``attach``; in the header provenance, and digests of
                                                      what was saved with it

With ``protect="strict"`` PEFT reads the folder by itself; the others it refuses, as ``B A`` without ``B0 A0`` is another function:
``export`` writes what anybody can read. Reading a file checks it against its digest, and against the model and the options it is to be
used with.
"""

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from torch import Tensor, nn

from corda_core.allocate import Candidate, Choice
from corda_core.attach import Attachment, attach_again, attachment_of, check_base_kept
from corda_core.bases import digest_of, moved_since, weight_digests
from corda_core.covariance import Covariance, Symmetric
from corda_core.decompose import Mode, Whitening
from corda_core.files import DIGEST, check_finite, file_digest, read_tensors, replacing_in, tensors_digest, weight_digest, write_tensors
from corda_core.layers import process_rank
from corda_core.linears import check_present, expert_of, gathered_whole, unwrapped, weight_shape
from corda_core.lora import FROZEN, by_stack
from corda_core.plan import AdapterInit, AdapterPlan, Energy

ATTACHMENT = "corda.safetensors"
MADE_ANEW = tuple(f".{name}" for name in FROZEN)
"""How names end of what ``attach`` makes from the plan."""
HEADER = "corda"
LENGTHS = "lengths"
"""Name of the tensor that goes with a covariance in 16 bits."""
FORMAT = 3
UNSEALED = 2
"""The format of corda-vlm 0.1.0, without a digest; else the same."""


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a SHA-256 over the tensors of all batches: what the covariances were taken over."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(weight_digest({key: value for key, value in batch.items() if isinstance(value, Tensor)}).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredCovariance:
    """One covariance as it lies in a file; its values are read from the disk when they are used."""

    packed: Symmetric
    lengths: Tensor | None
    """(n,); None where the values are whole, not in 16 bits (``Covariance.halved``)."""
    num_tokens: int
    weight: float | None

    def on(self, device: torch.device | str) -> Covariance:
        """Return it on a device, in float32."""
        packed = self.packed.to(device) if self.lengths is None else self.packed.to(device).scaled(self.lengths.to(device))
        return Covariance(packed, self.num_tokens, self.weight)


@dataclass(frozen=True)
class Collected:
    """What a file of covariances holds."""

    stored: Sequence[StoredCovariance]
    places: Mapping[str, int]
    """Which of them each layer has."""
    base_digest: str
    """Of the weights of these layers."""
    weights: Mapping[str, str]
    """Digest of each layer's weight, also of the layers that the data did not reach; empty in files of earlier versions."""
    data_digest: str
    options: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def known(self) -> Set[str]:
        """The layers of which the file says what was seen, be it nothing."""
        return self.places.keys() | self.weights.keys()

    def covariances(self, names: Iterable[str] | None = None, device: torch.device | str = "cpu") -> dict[str, Covariance]:
        """Return the covariances of those of the named layers that have one, or of all; what layers share is one object."""
        places = {name: self.places[name] for name in (self.places if names is None else names) if name in self.places}
        distinct = {place: self.stored[place].on(device) for place in set(places.values())}
        return {name: distinct[place] for name, place in places.items()}


def save_covariances(
    covariances: Mapping[str, Covariance],
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    data: str,
    options: Mapping[str, Any],
    unreached: Iterable[str] = (),
    about: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write covariances; layers that share one share it in the file.

    Args:
        covariances: As from ``collect``.
        path: The file.
        model: The base they were collected on.
        data: Digest of what they were collected over, such as ``data_digest`` of the batches.
        options: All that changes the result and is not as by default (normalize, token weights, ...), as JSON values.
        unreached: Layers that the data did not reach: they are as if their inputs had been 0 tokens.
        about: What else a reader of the file may want to know, as JSON values.
        half: Whether to write 16 bits a value instead of 32; of the directions that are chosen the context energy stays within 1.001.
    """
    weights = weight_digests(model, {*covariances, *unreached})
    write_covariances(covariances, path, weights=weights, data=data, options=options, about=about or {}, half=half)


def write_covariances(
    covariances: Mapping[str, Covariance],
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, str],
    data: str,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
    half: bool = False,
) -> None:
    """Write covariances of a base that is not at hand: ``save_covariances`` with the digests of its weights instead."""
    distinct = list({id(covariance): covariance for covariance in covariances.values()}.values())
    places = {id(covariance): number for number, covariance in enumerate(distinct)}
    tensors: dict[str, Tensor] = {}
    for i, covariance in enumerate(distinct):
        packed, lengths = covariance.halved() if half else (covariance.packed, None)
        tensors |= {f"{i}.{j}": panel for j, panel in enumerate(packed.panels)}
        tensors |= {} if lengths is None else {f"{i}.{LENGTHS}": lengths}
    header = {
        "kind": "covariances",
        "base_digest": digest_of({name: weights[name] for name in covariances}),
        "weights": dict(weights),
        "data_digest": data,
        "options": dict(options),
        "about": dict(about),
        "layers": {name: places[id(covariance)] for name, covariance in covariances.items()},
        "num_tokens": [covariance.num_tokens for covariance in distinct],
        "total_weights": [covariance.weight for covariance in distinct],
    }
    _write(tensors, header, Path(path))


def read_covariances(path: str | os.PathLike[str]) -> Collected:
    """Return what a file of covariances holds, whatever model it is for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    tensors, header = _read(Path(path), "covariances")
    with _sound_header(path):
        num_tokens = [int(count) for count in header["num_tokens"]]
        stored = _stored(tensors, num_tokens, header.get("total_weights", [None] * len(num_tokens)))
        places = {str(name): range(len(stored))[place] for name, place in header["layers"].items()}
        weights, about = (dict(header.get(key, {})) for key in ("weights", "about"))
        return Collected(stored, places, str(header["base_digest"]), weights, str(header["data_digest"]), dict(header["options"]), about)


def load_covariances(
    path: str | os.PathLike[str], *, model: nn.Module, options: Mapping[str, Any], data: str | None = None
) -> dict[str, Covariance]:
    """Return the covariances in a file; those of an ancestor of a merged model are taken, with a warning of how far its layers have moved.

    Args:
        path: The file.
        model: The base they are to be used with.
        options: The options they must have been collected with.
        data: The digest of the data that they must have been collected over; None takes any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else, or was made from another base, with other options or over other data.
    """
    collected = read_covariances(path)
    check_collected({Path(path): collected}, model=model, options=options, data=data)
    return collected.covariances()


def check_collected(files: Mapping[Path, Collected], *, model: nn.Module, options: Mapping[str, Any], data: str | None = None) -> None:
    """Refuse files' covariances for another model, options or data than they were collected with (``load_covariances``).

    Raises:
        ValueError: If they were made from another base, with other options or over other data.
    """
    for path, collected in files.items():
        _check_made_so(path, collected, model, options, data)
    weights = weight_digests(model, {name for collected in files.values() for name in collected.places})  # once: it reads all of them
    for path, collected in files.items():
        _check_base(path, collected, model, {name: weights[name] for name in collected.places})


def _check_made_so(path: Path, collected: Collected, model: nn.Module, options: Mapping[str, Any], data: str | None) -> None:
    check_present(model, collected.places, str(path))
    for what, recorded, wanted in (("options", collected.options, dict(options)), ("data", collected.data_digest, data)):
        if wanted is not None and recorded != wanted:
            raise ValueError(f"{path} was made with other {what}: {recorded}, but here is {wanted}; collect again.")
    for name, place in collected.places.items():
        n = collected.stored[place].packed.n
        if n != weight_shape(model, name)[1]:
            raise ValueError(f"{path} has a covariance of {n} inputs for {name}, which has others; collect again.")


def _check_base(path: Path, collected: Collected, model: nn.Module, weights: Mapping[str, str]) -> None:
    """Refuse a file of another base; warn of that of an ancestor."""
    moved = moved_since(model, collected.base_digest, weights)
    if moved is None:
        raise ValueError(
            f"{path} was made with other base weights: {collected.base_digest[:12]}…, but here is {digest_of(weights)[:12]}… "
            f"({next(model.parameters()).dtype}), nor was this model merged from such; use the base that it was made from, in the same "
            "dtype, or collect again."
        )
    unknown = next((name for name, move in moved.items() if math.isinf(move.change)), None)
    if unknown is not None:
        raise ValueError(
            f"{path} was made from an ancestor of this model, but {unknown} was changed since the merge by something that is not recorded, "
            "such as training it whole or another dtype; collect anew, or use the model as it was merged."
        )
    if moved:
        count = len(collected.places)
        drifts = [move.drift for move in moved.values() if move.drift is not None]
        outputs = f", {_span(drifts, count)} of their outputs on what they were to keep" if len(drifts) == len(moved) else ""
        warnings.warn(
            f"{path} was made from an ancestor of this model: {len(moved)} of its {count} layers have moved since, by "
            f"{_span([move.change for move in moved.values()], count)} of their weights' norm{outputs}; the less, the better it keeps what "
            "it was made of.",
            stacklevel=4,
        )


def _span(values: Sequence[float], count: int) -> str:
    """Return the largest value and the mean over so many layers in words."""
    return f"at most {max(values):.2%} (mean {sum(values) / count:.2%})"


def _stored(tensors: Mapping[str, Tensor], num_tokens: list[int], weights: list[float | None]) -> list[StoredCovariance]:
    panels: dict[int, list[Tensor]] = {}
    for key in sorted((key.split(".") for key in tensors if not key.endswith(LENGTHS)), key=lambda key: [int(part) for part in key]):
        panels.setdefault(int(key[0]), []).append(tensors[".".join(key)])
    return [
        StoredCovariance(
            Symmetric.joined(panels[place]), tensors.get(f"{place}.{LENGTHS}"), tokens, None if weight is None else float(weight)
        )
        for place, (tokens, weight) in enumerate(zip(num_tokens, weights, strict=True))
    ]


def save_plan(
    plan: AdapterPlan,
    path: str | os.PathLike[str],
    *,
    attached: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter plan.

    Args:
        plan: The plan.
        path: The file.
        attached: The options that it was attached with, as JSON values (``save_attachment``); None if it was not.
        beside: Digests of what was saved with it.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, init in plan.layers.items():
        tensors |= {f"{name}.A0": init.A0, f"{name}.B0": init.B0, f"{name}.sigma": init.sigma}
        candidates, index = ((), 0) if init.choice is None else (init.choice.candidates, init.choice.index)
        tensors |= {f"{name}.spectrum.{place}": candidate.spectrum for place, candidate in enumerate(candidates)}
        layers[name] = {
            "components": [init.components.start, init.components.stop],
            "num_tokens": init.num_tokens,
            "log_pi": [candidate.log_pi for candidate in candidates],
            "chosen": index,
        }
        if init.whitening is not None:
            tensors |= {f"{name}.Q": init.whitening.vectors, f"{name}.lengths": init.whitening.lengths}
            layers[name]["whitening"] = {"unit": init.whitening.unit, "error": init.whitening.error}
        if init.energy is not None:
            tensors |= {f"{name}.energy": init.energy.rows}
            layers[name]["energy"] = init.energy.weight
    provenance = dict(plan.provenance)
    header = {"kind": "plan", "mode": str(plan.mode), "rank": plan.rank, "provenance": provenance, "layers": layers}
    _write(tensors, {**header, "attached": attached, "beside": beside}, Path(path))


def read_plan(path: str | os.PathLike[str]) -> tuple[AdapterPlan, dict[str, Any] | None, dict[str, Any] | None]:
    """Return the adapter plan in a file, and what ``save_plan`` was given as ``attached`` and ``beside``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    tensors, header = _read(Path(path), "plan")
    with _sound_header(path):
        layers = {name: _init(name, about, tensors) for name, about in header["layers"].items()}
        plan = AdapterPlan(layers, Mode(header["mode"]), int(header["rank"]), dict(header["provenance"]))
        attached, beside = (None if header.get(key) is None else dict(header[key]) for key in ("attached", "beside"))
    return plan, attached, beside


@contextmanager
def _sound_header(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file it is that a header lacks an entry, or holds one of another kind, or other tensors than it tells of."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a header that does not fit its content ({error!r}); make it again.") from error


def _init(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterInit:
    white = about.get("whitening")
    candidates = tuple(Candidate(float(log_pi), tensors[f"{name}.spectrum.{place}"]) for place, log_pi in enumerate(about["log_pi"]))
    init = AdapterInit(
        A0=tensors[f"{name}.A0"],
        B0=tensors[f"{name}.B0"],
        sigma=tensors[f"{name}.sigma"],
        components=slice(*map(int, about["components"])),
        num_tokens=int(about["num_tokens"]),
        whitening=Whitening(tensors[f"{name}.Q"], tensors[f"{name}.lengths"], **white) if white else None,
        choice=Choice(candidates, int(about["chosen"])) if candidates else None,
        energy=Energy(tensors[f"{name}.energy"], float(about["energy"])) if "energy" in about else None,
    )
    rank = init.components.stop - init.components.start
    if not (init.A0.shape[:-1] == init.B0.shape[1:] == init.sigma.shape == (rank,)):
        raise ValueError(f"{name} has factors of shapes {tuple(init.A0.shape)} and {tuple(init.B0.shape)} for {rank} components")
    return init


def _write(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
    versions = {package: version(package) for package in ("corda-vlm", "torch")}
    with replacing_in(path.parent) as fresh:
        write_tensors(tensors, fresh / path.name, {HEADER: json.dumps({"format": FORMAT, "versions": versions, **header})})


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    with _sound_header(path):
        header = dict(json.loads(metadata.get(HEADER, "{}")))
    sealed, known = DIGEST in metadata, (header.get("kind"), header.get("format"))
    if known not in ((kind, FORMAT), (kind, UNSEALED)) or (known == (kind, FORMAT) and not sealed):
        raise ValueError(
            f"{path} holds {known[0] or 'something else'!r} of format {known[1]}{'' if sealed else ' without a digest'}; expected {kind!r} "
            f"of format {FORMAT} with one; make it again."
        )
    if not sealed:
        warnings.warn(
            f"{path} was written by corda-vlm 0.1.0 and has no digest: damage to it would not be seen; save it again.", stacklevel=4
        )
    return tensors, header


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
    wanted: dict[str, Sequence[int] | None] = {
        f"base_model.model.{name}.lora_{side}.weight": shape
        for name, init in attachment.plan.layers.items()
        if expert_of(name) is None
        for side, shape in (("A", init.A0.shape), ("B", init.B0.shape))
    }
    for place in _held_by(attachment.plan):  # their shapes depend on the model
        wanted |= {f"base_model.model.{place}.lora_{side}.weight": None for side in "AB"}
    missing = sorted(wanted.keys() - trained.keys()) or [
        name for name in attachment.train_fully if not any(key.startswith(f"base_model.model.{name}.") for key in trained)
    ]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} in all), which {ATTACHMENT} plans; the two are of different adapters.")
    odd = next((key for key, shape in wanted.items() if shape not in (None, trained[key].shape)), None)
    if odd is not None:
        raise ValueError(f"{path} has {odd} of shape {tuple(trained[odd].shape)}, but {ATTACHMENT} plans {tuple(wanted[odd] or ())}.")
    check_finite(trained, path, "take an earlier checkpoint")
    if beside is not None and beside.weights != tensors_digest(trained, {}):
        raise ValueError(
            f"{path} was not saved together with {ATTACHMENT}, as when a save was killed half-way or files of two runs were mixed; "
            "take a whole checkpoint, or save the adapter again."
        )
    return attachment, trained


def _held_by(plan: AdapterPlan) -> list[str]:
    """Return PEFT's own modules for the parameters of fused experts: those of one module lie in one another."""
    modules = Counter(stack.rpartition(".")[0] for stack in by_stack(plan.layers))
    return [module + ".base_layer" * depth for module, count in modules.items() for depth in range(count)]


def put_weights_(model: PeftModel, trained: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Give an attached adapter what was trained.

    Raises:
        ValueError: If there is a tensor that the model has no place for.
    """
    # Not PEFT's set_peft_model_state_dict, which takes names of some models (DeepSeek-OCR 2, Inkling 2) for those of older checkpoints.
    places = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    odd = next((key for key in trained if key not in places), None)
    if odd is not None:
        raise ValueError(f"{WEIGHTS} has {odd}, for which the adapted model has no place; it is of another adapter.")
    for key, value in trained.items():
        if places[key].shape != value.shape:
            raise ValueError(f"{WEIGHTS} does not fit the adapted model: {key} is {tuple(value.shape)}, not {tuple(places[key].shape)}.")
    with torch.no_grad():
        for key, value in trained.items():
            places[key].copy_(value)


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


def _trained(path: Path) -> dict[str, Tensor]:
    """Return what was trained, without what ``attach`` makes anew, which PEFT writes beside it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the weights of an adapter beside {ATTACHMENT}.")
    tensors, _ = read_tensors(path, "take an earlier checkpoint")
    return {key: value for key, value in tensors.items() if not key.endswith(MADE_ANEW)}


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ATTACHMENT)
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
