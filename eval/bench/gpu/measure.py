"""What the parts measure by: device events, medians, peaks of memory, speeds of this machine, and a record that outlives a crash."""

import gc
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from corda_core.layers import flops_per_second
from corda_eval.bench.process import reset_peak, status
from corda_eval.records import write_json

R = TypeVar("R")

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64


@dataclass
class Record:
    """The figures of one part, on the disk as soon as they are known."""

    path: Path
    device: torch.device
    small: bool
    """Whether everything is of a size for the CPU."""
    figures: dict[str, Any] = field(default_factory=dict)

    def say(self, **facts: Any) -> None:
        """Add facts that are not measured against anything."""
        self.figures |= {name: rounded(fact) for name, fact in facts.items()}
        write_json(self.path, self.figures)
        print({name: self.figures[name] for name in facts}, flush=True)

    def measured(
        self, name: str, value: float | None, unit: str, *, floor: float | None = None, aim: str = "", from_counts: str = ""
    ) -> None:
        """Add a figure.

        Args:
            name: What was measured.
            value: The figure; None where this machine cannot tell it.
            unit: "s", "GB", "tokens/s", a ratio, ...
            floor: What it cannot be less than, by counts at the speeds that were measured in this process.
            aim: What it is to be.
            from_counts: Operations and bytes that the floor was made of.
        """
        figure = {"value": value, "unit": unit, "floor": floor, "aim": aim, "floor_from": from_counts}
        self.say(**{name: {key: entry for key, entry in figure.items() if entry not in (None, "") or key == "value"}})


def rounded(value: Any) -> Any:
    """Return a value of JSON with four digits of each number; what is no finite number becomes a text."""
    if isinstance(value, Mapping):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if abs(value) < float("inf") else str(value)


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_once(run: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Return the seconds between two events of the device around a run, and its result; on CPUs by the clock."""
    wait(device)
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    result = run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, result


def seconds_of(run: Callable[[], R], device: torch.device, repeats: int = 3, warm_up: int = 1) -> tuple[float, R]:
    """Return the median seconds of some runs after others that warm up, and the last result."""
    for _ in range(warm_up):
        run()
    timed = [seconds_once(run, device) for _ in range(repeats)]
    return median(seconds for seconds, _ in timed), timed[-1][1]


class Peak:
    """The most memory that a region takes at once, of the device or, on CPUs, resident, beyond what was taken before."""

    def __init__(self, device: torch.device) -> None:
        """Begin here."""
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 1e9
        else:
            self.before = reset_peak() / 1e6

    @property
    def whole(self) -> float:
        """The peak in GB."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else status("VmHWM") / 1e6

    @property
    def extra(self) -> float:
        """The peak less what was taken before, in GB."""
        return self.whole - self.before


@dataclass(frozen=True)
class Speeds:
    """What this machine does a second, measured in this process: operations of matrix products by type, and bytes."""

    bfloat16: float
    float32: float
    float64: float
    copied: float
    """Bytes read and written by a copy on the device."""
    fetched: float
    """Bytes brought from the device to this machine's memory that can be paged; on CPUs as ``copied``."""
    hashed: float
    """Bytes by SHA-256 in one thread."""

    @staticmethod
    def of(device: torch.device) -> "Speeds":
        """Measure; under two seconds."""
        size = (1 << 30) if device.type == "cuda" else (1 << 26)
        source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        copied = 2 * size / seconds_of(lambda: target.copy_(source), device)[0]
        part = source[: 1 << 26]
        fetched = len(part) / seconds_of(lambda: part.cpu(), device)[0] if device.type == "cuda" else copied
        host = part.cpu().numpy().data
        hashed = len(part) / seconds_of(lambda: hashlib.sha256(host).digest(), torch.device("cpu"))[0]
        bfloat16, float32, float64 = (flops_per_second(device, dtype) for dtype in (BFLOAT16, FLOAT32, FLOAT64))
        return Speeds(bfloat16, float32, float64, copied, fetched, hashed)


def heavy_tailed(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Return random numbers (..., n) on the generator's device whose last axis has scales over three orders of magnitude."""
    scales = torch.exp(1.2 * torch.randn(shape[-1], generator=generator, device=generator.device))
    return (torch.randn(*shape, generator=generator, device=generator.device) * scales).to(dtype)
