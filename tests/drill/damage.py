"""Ways in which a file is spoilt. Each takes its bytes, those of another file of its kind, and a source of chance."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

WRONG = (None, True, -1, 0, 2.5, 10**30, float("nan"), "", "x", [], [1], {}, {"x": 1})
"""Values that are put in the place of others."""
LENGTH = 8
"""Bytes at a safetensors file's start that hold its header's length."""

Spoil = Callable[[bytes, bytes, Random], bytes]


def cut(data: bytes, other: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def empty(data: bytes, other: bytes, rng: Random) -> bytes:
    return b""


def flipped(data: bytes, other: bytes, rng: Random) -> bytes:
    return _flip(data, rng.randrange(len(data)), rng)


def flipped_early(data: bytes, other: bytes, rng: Random) -> bytes:
    """Flip a bit of the header, if there is one."""
    return _flip(data, rng.randrange(min(len(data), 2000)), rng)


def zeroed(data: bytes, other: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice((1, 16, 512)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def exchanged(data: bytes, other: bytes, rng: Random) -> bytes:
    return other


def not_utf8(data: bytes, other: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + b"\xff\xfe\x80" + data[place:]


def _flip(data: bytes, place: int, rng: Random) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _json(data: bytes, other: bytes, rng: Random) -> bytes:
    return json.dumps(_with_wrong_value(json.loads(data), rng)).encode()


def _json_lines(data: bytes, other: bytes, rng: Random) -> bytes:
    lines = data.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = _json(lines[place], b"", rng) + b"\n"
    return b"".join(lines)


def _yaml(data: bytes, other: bytes, rng: Random) -> bytes:
    return yaml.safe_dump(_with_wrong_value(yaml.safe_load(data), rng), sort_keys=False).encode()


def _safetensors_header(data: bytes, other: bytes, rng: Random) -> bytes:
    """Put a wrong value into the header, or into the JSON that one of its own entries holds."""
    header, payload = _parts(data)
    entries = header.get("__metadata__", {})
    inner = [key for key, text in entries.items() if text.startswith("{")]
    if inner and rng.random() < 0.7:
        entries[inner[0]] = json.dumps(_with_wrong_value(json.loads(entries[inner[0]]), rng))
    else:
        header = _with_wrong_value(header, rng)
    return _safetensors(header, payload)


def _nan(data: bytes, other: bytes, rng: Random) -> bytes:
    """Put NaN into one value of one float32 tensor."""
    header, payload = _parts(data)
    places = [about["data_offsets"] for name, about in header.items() if name != "__metadata__" and about["dtype"] == "F32"]
    start, end = rng.choice(places)
    at = start + 4 * rng.randrange((end - start) // 4)
    return _safetensors(header, payload[:at] + struct.pack("<f", float("nan")) + payload[at + 4 :])


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    return json.loads(data[LENGTH:end]), data[end:]


def _safetensors(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(LENGTH, "little") + text + payload


def _with_wrong_value(value: Any, rng: Random) -> Any:
    """Return a value in which one of its values, at any depth, is of another type, or missing."""
    value = copy.deepcopy(value)
    holders = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())]
    if not holders:
        return rng.choice(WRONG)
    holder, key = rng.choice(holders)
    if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        holder[key] = _with_wrong_value(holder[key], rng)
    elif rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(WRONG)
    return value


ANY: list[Spoil] = [cut, empty, flipped, flipped_early, zeroed, exchanged]
BY_SUFFIX: dict[str, list[Spoil]] = {
    ".safetensors": [_safetensors_header, _safetensors_header, _nan],
    ".json": [_json, _json, not_utf8],
    ".jsonl": [_json_lines, _json_lines, not_utf8],
    ".yaml": [_yaml, _yaml, not_utf8],
}
"""What else can happen to files of a kind."""


def spoil(path: Path, other: bytes, rng: Random) -> str:
    """Damage a file, or put a folder in its place, or remove it; return in words what was done."""
    chance = rng.random()
    if chance < 0.04:
        path.unlink()
        return "removed"
    if chance < 0.08:
        path.unlink()
        path.mkdir()
        return "a folder"
    data = path.read_bytes()
    way = rng.choice(ANY + BY_SUFFIX.get(path.suffix, []))
    path.write_bytes(way(data, other, rng) if data else b"x")
    return way.__name__.strip("_")
