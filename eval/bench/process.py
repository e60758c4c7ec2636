"""What the benchmarks measure by: sides in turns, each run in a process of its own, and the memory that one takes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from corda_eval.records import add_line

Run = Mapping[str, Any]


def in_turns(sides: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, side) for each run, every other round backwards, so that none of the sides always comes first."""
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            yield turn, side


def fresh_run(module: str, arguments: Sequence[str], about: Run, output: Path | None) -> dict[str, Any]:
    """Return what ``python -m module arguments`` prints as JSON in its last line, after ``about``; print it, and add it to a file.

    Raises:
        RuntimeError: If the process fails; with the end of what it said.
    """
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return recorded({**about, **json.loads(result.stdout.splitlines()[-1])}, output)


def recorded(run: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Print a run, add it to a file, and return it."""
    print(json.dumps(run), flush=True)
    if output is not None:
        add_line(output, run)
    return run


def by_side(runs: Sequence[Run], sides: Sequence[str], turn: str = "round") -> dict[str, list[Run]]:
    """Return each side's runs in the order of their rounds."""
    return {side: sorted((run for run in runs if run["side"] == side), key=lambda run: run[turn]) for side in sides}


def median_of(runs: Sequence[Run], key: str) -> float:
    """Return the median of one figure."""
    return median(run[key] for run in runs)


def median_ratio(runs: Sequence[Run], others: Sequence[Run], key: str) -> float:
    """Return the median over the rounds of one figure over that of the other side."""
    return median(run[key] / other[key] for run, other in zip(runs, others, strict=True))


def reset_peak() -> float:
    """Forget the peak of resident memory and return what is resident now, in kilobytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    """Return one of this process's memory figures, in kilobytes, as Linux counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextmanager
def peak_megabytes() -> Iterator[Callable[[], float]]:
    """Yield what returns the peak of resident memory since the start of the block, in megabytes."""
    reset_peak()
    yield lambda: status("VmHWM") / 1e3
