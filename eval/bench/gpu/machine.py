"""What the machine can do: products by precision, copies, hashing; and ``XᵀX`` of half precision by the width of its panels."""

import os
import platform
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from corda_core.bases import weight_digests
from corda_core.covariance import Symmetric, multiplies_halves
from corda_eval.bench.gpu.measure import BFLOAT16, FLOAT32, Record, Speeds, heavy_tailed, seconds_of

PACKAGES = ("torch", "transformers", "peft", "accelerate", "open_clip_torch", "bitsandbytes", "pydantic", "numpy")


def run(record: Record) -> None:
    """Measure."""
    device, small = record.device, record.small
    about: dict[str, Any] = (
        {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {"card": "CPU"}
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"memory_gb": properties.total_memory / 1e9, "multiprocessors": properties.multi_processor_count}
    record.say(
        **about, cpu_cores=os.cpu_count(), versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    )
    speeds = Speeds.of(device)
    record.say(speeds={name: speed / 1e9 for name, speed in asdict(speeds).items()}, speeds_unit="GFLOP/s and GB/s")
    _measure_gram(record, speeds)
    width, count = (256, 8) if small else (4096, 16)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device, dtype=BFLOAT16) for _ in range(count)))
    names = [str(place) for place in range(count)]
    num_bytes = sum(2 * parameter.numel() for parameter in base.parameters())
    threads = min(8, torch.get_num_threads())
    floor = num_bytes / min(speeds.hashed * threads, speeds.fetched * threads)
    seconds, _ = seconds_of(lambda: weight_digests(base, names), device)
    counts = f"{num_bytes / 1e9:.3f} GB by {threads} threads"
    record.measured("digest of weights", seconds, "s", floor=floor, from_counts=counts)
    record.say(digest_gb_per_second=num_bytes / 1e9 / seconds)


def _measure_gram(record: Record, speeds: Speeds) -> None:
    """Take ``XᵀX`` of bfloat16 in float32: dense, in panels of several widths, and as the package does."""
    tokens, n = (256, 192) if record.small else (8192, 11008)
    generator = torch.Generator(record.device).manual_seed(0)
    rows = heavy_tailed((tokens, n), generator, BFLOAT16)
    exact = rows[:, :64].double().T @ rows.double()
    scale = rows.double().square().sum(0).sqrt()
    native = multiplies_halves(rows)
    rate = speeds.bfloat16 if native else speeds.float32
    flops = tokens * n * n
    for width in (n, *(() if record.small else (2048, 1024, 512, 256))):
        seconds, last = seconds_of(partial(_panels, rows, width, native=native), record.device)
        error = (last[0][:64].double() - exact[:, : last[0].shape[1]]).abs() / (scale[:64, None] * scale[: last[0].shape[1]])
        record.measured(f"XᵀX, panels of {width}", seconds, "s", floor=flops / rate, from_counts=f"{flops / 1e12:.4f} TFLOP, half of all")
        record.say(**{f"XᵀX, panels of {width}, largest error": float(error.max())})
    seconds, _ = seconds_of(lambda: Symmetric.gram(rows), record.device)
    record.measured("XᵀX, as collected", seconds, "s", floor=flops / rate, from_counts=f"{flops / 1e12:.4f} TFLOP, half of all")


def _panels(rows: Tensor, width: int, *, native: bool) -> list[Tensor]:
    """Return the upper half of ``XᵀX`` in panels of this width."""
    values = rows if native else rows.to(FLOAT32)
    ends = [(start, min(start + width, rows.shape[1])) for start in range(0, rows.shape[1], width)]
    if native:
        return [torch.mm(values[:, :end].T, values[:, start:end], out_dtype=FLOAT32) for start, end in ends]
    return [values[:, :end].T @ values[:, start:end] for start, end in ends]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
