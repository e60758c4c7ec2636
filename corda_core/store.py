"""Covariances and plans as safetensors files that say in their header what they were made from; never pickle.

Reading a file checks it against the digest that it carries, and against the model and the options it is to be used with. Files are
written beside their place and moved there when whole: a killed process leaves the old file or none.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from corda_core.allocate import Candidate
from corda_core.covariance import Covariance
from corda_core.decompose import Mode
from corda_core.files import DIGEST, read_tensors, replacing_in, write_tensors
from corda_core.modules import base_digest, check_present, weight_digest, weight_shape
from corda_core.plan import AdapterInit, AdapterPlan
from corda_core.symmetric import Symmetric
from corda_core.whiten import Whitening

HEADER = "corda"
FORMAT = 3
UNSEALED = 2
"""The format of corda-vlm 0.1.0, without a digest; else the same."""


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
    with _sound_header(path):
        found = _covariances(tensors, header["layers"], header["num_tokens"])
        made = {"options": header["options"], "data": header["data_digest"], "base weights": header["base_digest"]}
    check_present(model, found, str(path))
    wanted = {"options": dict(options), "data": data or made["data"], "base weights": base_digest(model, found)}
    for what, value in wanted.items():
        if made[what] != value:
            raise ValueError(f"{path} was made with other {what}: {made[what]}, but here is {value}; collect again.")
    for name, covariance in found.items():
        if covariance.packed.n != weight_shape(model, name)[1]:
            raise ValueError(f"{path} has a covariance of {covariance.packed.n} inputs for {name}, which has others; collect again.")
    return found


def _covariances(tensors: Mapping[str, Tensor], places: Mapping[str, int], num_tokens: list[int]) -> dict[str, Covariance]:
    panels: dict[int, list[Tensor]] = {}
    for key in sorted(tensors, key=lambda key: [int(part) for part in key.split(".")]):
        panels.setdefault(int(key.split(".")[0]), []).append(tensors[key])
    distinct = [Covariance(Symmetric.joined(panels[place]), int(tokens)) for place, tokens in enumerate(num_tokens)]
    return {name: distinct[place] for name, place in places.items()}


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
        attached: With what options it was put on a model, if it was (``corda_core.checkpoint``).
        beside: Digests of what was saved with it.
    """
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
    header = {"kind": "plan", "mode": str(plan.mode), "rank": plan.rank, "provenance": provenance, "layers": layers}
    _write(tensors, {**header, "attached": attached, "beside": beside}, Path(path))


def load_plan(path: str | os.PathLike[str]) -> AdapterPlan:
    """Return the adapter plan in a file; ``attach`` checks that it fits the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.
    """
    return read_plan(path)[0]


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
    init = AdapterInit(
        A0=tensors[f"{name}.A0"],
        B0=tensors[f"{name}.B0"],
        sigma=tensors[f"{name}.sigma"],
        components=slice(*map(int, about["components"])),
        num_tokens=int(about["num_tokens"]),
        whitening=Whitening(tensors[f"{name}.Q"], tensors[f"{name}.lengths"], **white) if white else None,
        candidates=tuple(Candidate(float(log_pi), tensors[f"{name}.spectrum.{place}"]) for place, log_pi in enumerate(about["log_pi"])),
        chosen=int(about["chosen"]),
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
