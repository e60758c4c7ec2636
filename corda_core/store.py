"""Covariances and plans as safetensors files that say in their header what they were made from; never pickle.

Reading a file checks it against the model and the options it is to be used with. Files are written beside their place and moved
there when whole: a killed process leaves the old file or none.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corda_core.allocate import Candidate
from corda_core.covariance import Covariance
from corda_core.decompose import Mode
from corda_core.files import replacing_in
from corda_core.modules import base_digest, check_present, weight_digest
from corda_core.plan import AdapterInit, AdapterPlan
from corda_core.symmetric import Symmetric
from corda_core.whiten import Whitening

HEADER = "corda"
FORMAT = 2


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a SHA-256 over the tensors of all batches: what the covariances were taken over."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(weight_digest({key: value for key, value in batch.items() if isinstance(value, Tensor)}).encode())
    return digest.hexdigest()


def save_covariances(
    covariances: Mapping[str, Covariance], path: str | os.PathLike[str], *, model: nn.Module, data: str, options: Mapping[str, Any]
) -> None:
    """Write covariances; layers that share one share it in the file.

    Args:
        covariances: As from ``collect``.
        path: The file.
        model: The base they were collected on.
        data: ``data_digest`` of the batches.
        options: All that changes the result (normalize, token weights, ...), as JSON values.
    """
    distinct = list({id(one): one for one in covariances.values()}.values())
    places = {id(one): number for number, one in enumerate(distinct)}
    tensors = {f"{i}.{j}": panel for i, one in enumerate(distinct) for j, panel in enumerate(one.packed.panels)}
    header = {
        "kind": "covariances",
        "base_digest": base_digest(model, covariances),
        "data_digest": data,
        "options": dict(options),
        "layers": {name: places[id(one)] for name, one in covariances.items()},
        "num_tokens": [one.num_tokens for one in distinct],
    }
    _write(tensors, header, Path(path))


def load_covariances(
    path: str | os.PathLike[str], *, model: nn.Module, options: Mapping[str, Any], data: str | None = None
) -> dict[str, Covariance]:
    """Return the covariances in a file.

    Args:
        path: The file.
        model: The base they are to be used with.
        options: The options they must have been collected with.
        data: The ``data_digest`` that they must have been collected over; None takes any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else, or was made from another base, with other options or over other data.
    """
    tensors, header = _read(Path(path), "covariances")
    check_present(model, header["layers"], str(path))
    for what, found, wanted in (
        ("other options", header["options"], dict(options)),
        ("other data", header["data_digest"], data or header["data_digest"]),
        ("other base weights", header["base_digest"], base_digest(model, header["layers"])),
    ):
        if found != wanted:
            raise ValueError(f"{path} was made with {what}: {found}, but here is {wanted}; collect again.")
    widths: dict[int, list[Tensor]] = {}
    for key in sorted(tensors, key=lambda key: [int(part) for part in key.split(".")]):
        widths.setdefault(int(key.split(".")[0]), []).append(tensors[key])
    distinct = [Covariance(Symmetric(tuple(widths[i])), tokens) for i, tokens in enumerate(header["num_tokens"])]
    return {name: distinct[place] for name, place in header["layers"].items()}


def save_plan(plan: AdapterPlan, path: str | os.PathLike[str], *, attached: Mapping[str, Any] | None = None) -> None:
    """Write an adapter plan; ``attached`` says with what options it was put on a model, if it was (``corda_core.checkpoint``)."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, init in plan.layers.items():
        tensors |= {f"{name}.A0": init.A0, f"{name}.B0": init.B0, f"{name}.sigma": init.sigma}
        tensors |= {f"{name}.spectrum.{place}": one.spectrum for place, one in enumerate(init.candidates)}
        layers[name] = {
            "components": [init.components.start, init.components.stop],
            "num_tokens": init.num_tokens,
            "log_pi": [one.log_pi for one in init.candidates],
            "chosen": init.chosen,
        }
        if init.whitening is not None:
            tensors |= {f"{name}.Q": init.whitening.vectors, f"{name}.lengths": init.whitening.lengths}
            layers[name]["whitening"] = {"unit": init.whitening.unit, "error": init.whitening.error}
    provenance = dict(plan.provenance)
    header = {"kind": "plan", "mode": str(plan.mode), "rank": plan.rank, "provenance": provenance, "layers": layers, "attached": attached}
    _write(tensors, header, Path(path))


def load_plan(path: str | os.PathLike[str]) -> AdapterPlan:
    """Return the adapter plan in a file; ``attach`` checks that it fits the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    return read_plan(path)[0]


def read_plan(path: str | os.PathLike[str]) -> tuple[AdapterPlan, dict[str, Any] | None]:
    """Return the adapter plan in a file, and the options that it was attached with, if it was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    tensors, header = _read(Path(path), "plan")
    layers = {name: _init(name, about, tensors) for name, about in header["layers"].items()}
    return AdapterPlan(layers, Mode(header["mode"]), header["rank"], header["provenance"]), header.get("attached")


def _init(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterInit:
    white = about.get("whitening")
    return AdapterInit(
        A0=tensors[f"{name}.A0"],
        B0=tensors[f"{name}.B0"],
        sigma=tensors[f"{name}.sigma"],
        components=slice(*about["components"]),
        num_tokens=about["num_tokens"],
        whitening=Whitening(tensors[f"{name}.Q"], tensors[f"{name}.lengths"], **white) if white else None,
        candidates=tuple(Candidate(log_pi, tensors[f"{name}.spectrum.{place}"]) for place, log_pi in enumerate(about["log_pi"])),
        chosen=about["chosen"],
    )


def _write(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
    versions = {package: version(package) for package in ("corda-vlm", "torch")}
    metadata = {HEADER: json.dumps({"format": FORMAT, "versions": versions, **header})}
    with replacing_in(path.parent) as fresh:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, fresh / path.name, metadata=metadata)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file of {kind}.")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            keys = file.keys()
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); make it again.") from error
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds {header.get('kind', 'something else')!r} of format {header.get('format')}; expected {kind!r} of format {FORMAT}."
        )
    return tensors, header
