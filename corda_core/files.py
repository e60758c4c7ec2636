"""Files that are whole or not there, carry a digest of what they hold, and say what is wrong when they cannot be read."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corda_core.layers import in_threads

HASHED = 1 << 24
"""Bytes that are hashed at a time: of a tensor on another device so much lies on this machine."""
PARTIAL = ".partial-"
"""How folders of half-written files begin: a killed process leaves them behind."""
DIGEST = "sha256"
"""Where a file of ours has the digest of what else it holds: in the metadata of safetensors, at the top of JSON."""


@contextmanager
def replacing_in(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; at the end its files are on the disk and renamed into ``folder``, last name first.

    A process that is killed, or an error, leaves the old files or none, never half of one; so does a machine that loses power.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as fresh:
        yield Path(fresh)
        files = sorted(Path(fresh).iterdir(), reverse=True)
        for file in files:
            flush(file)
        for file in files:
            os.replace(file, folder / file.name)
        flush(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Write one file."""
    with replacing_in(path.parent) as fresh:
        (fresh / path.name).write_bytes(data)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do this for folders
            raise
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_json(path: Path, cure: str = "get the file again") -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        cure: What to do if it is damaged, for the error's text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not whole JSON.
    """
    _check_file(path)
    try:
        return json.loads(path.read_bytes())  # which may begin with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(_no_text(path, error, cure)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}); {cure}.") from error


def json_digest(value: Mapping[str, Any]) -> str:
    """Return a SHA-256 of an object of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_text(path: Path, cure: str = "get the file again") -> str:
    """Return what a text file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8.
    """
    _check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_no_text(path, error, cure)) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} {_why_no_file(path)}; expected a file; correct the path.")


def _no_text(path: Path, error: UnicodeDecodeError, cure: str) -> str:
    return f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); {cure}."


def _why_no_file(path: Path) -> str:
    return "is a folder" if path.is_dir() else "does not exist"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose metadata hold, beside what is given, a digest of it and of the tensors."""
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # that of any new file: safetensors keeps its own to the owner, but these are there to be shared
    save_file(held, path, metadata={**metadata, DIGEST: tensors_digest(held, metadata)})
    path.chmod(mode)
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which are written in another order each time: the same content is then the same bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)  # spaces, as the format fills it up
        if len(ordered) == size:
            file.seek(8)
            file.write(ordered)


def read_tensors(path: Path, cure: str = "make it again") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a safetensors file; if it holds a digest, they are checked against it.

    Args:
        path: The file.
        cure: What to do if it is damaged, for the error's text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    _check_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            keys = file.keys()
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); {cure}.") from error
    kept = {key: value for key, value in metadata.items() if key != DIGEST}
    if DIGEST in metadata and metadata[DIGEST] != tensors_digest(tensors, kept):
        raise ValueError(f"{path} is damaged: its content is not that which its digest was taken of; {cure}.")
    return tensors, metadata


def check_finite(tensors: Mapping[str, Tensor], path: Path, cure: str) -> None:
    """Refuse tensors of a file that hold NaN or infinity.

    Raises:
        ValueError: If one does.
    """
    spoilt = next((key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()), None)
    if spoilt is not None:
        raise ValueError(f"{path} has values in {spoilt} that are not finite; {cure}.")


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of tensors, each hashed in a thread of its own, and over metadata."""
    parts = in_threads(weight_digest, ({name: tensors[name]} for name in sorted(tensors)), min(8, torch.get_num_threads()))
    return hashlib.sha256("".join([json.dumps(dict(metadata), sort_keys=True), *parts]).encode()).hexdigest()


def weight_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of tensors: equal if and only if they are bit for bit the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in tensor.reshape(-1).view(torch.uint8).split(HASHED):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
