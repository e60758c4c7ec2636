"""Resident memory of this process, from Linux's own figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def reset_peak() -> float:
    """Forget the peak of resident memory and return what is resident now, in kilobytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    """Return one of this process's memory figures, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextmanager
def peak_megabytes() -> Iterator[Callable[[], float]]:
    """Yield what returns the peak of resident memory since the start of the block, in megabytes."""
    reset_peak()
    yield lambda: status("VmHWM") / 1e3
