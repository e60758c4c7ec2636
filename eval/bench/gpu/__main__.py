"""Does the package work on this GPU, how fast, and how near to what cannot be beaten? All of it within eight minutes of an H100.

    python -m corda_eval.bench.gpu --output eval/results/gpu                # all parts
    python -m corda_eval.bench.gpu --output /tmp/gpu --part step --part nf4 # some
    python -m corda_eval.bench.gpu --output /tmp/gpu --small                # the same code on the CPU at a small size

Needs torch, transformers, peft, accelerate, safetensors and typer, nothing that is fetched; a part that needs more (pydantic for what is in
``corda_vlm``, open_clip, bitsandbytes) says so and is left out. Each part runs in a process of its own with a limit of its own, so that a
crash or a hang costs that part alone, and what it had measured by then is kept. After each part ``gpu.json`` and ``gpu.md`` are written.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from corda_eval.bench.gpu.measure import Record
from corda_eval.bench.gpu.report import as_markdown
from corda_eval.records import write_json

WHOLE = 470.0
"""Seconds for everything: a part for which nothing is left is not begun."""
SMALL = 1800.0
"""The same on a CPU, where it takes two minutes if nothing else runs there."""


@dataclass(frozen=True)
class Part:
    """One part of the record: a file of this folder, whose ``run(record)`` measures."""

    file: str
    predicted: int
    """Seconds on an H100, start and imports included, counted before it was ever run."""
    limit: int
    """Seconds after which it is ended."""


PARTS = {
    "machine": Part("machine", 25, 60),
    "correct": Part("correct", 55, 110),
    "prepare": Part("prepare", 115, 200),
    "step": Part("step", 85, 150),
    "peft": Part("against_peft", 90, 150),
    "zeroshot": Part("images", 35, 70),
    "nf4": Part("quantized", 45, 80),
}
"""In the order in which they run: what matters most comes first."""

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.md and gpu.log.")],
    part: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be given several times. All by default.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Run everything on the CPU at a small size.")] = False,
    into: Annotated[Path | None, typer.Option(help="Run the one part in this process, its figures into this file.", hidden=True)] = None,
) -> None:
    """Measure, and write the record and its table."""
    unknown = next((name for name in part or [] if name not in PARTS), None)
    if unknown is not None:
        raise typer.BadParameter(f"--part is {unknown!r}; expected one of {', '.join(PARTS)}.")
    if not small and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; --small runs the same on the CPU.")
    chosen = list(dict.fromkeys(part or PARTS))
    if into is not None:
        run_here(chosen[0], into, small=small)
        return
    output.mkdir(parents=True, exist_ok=True)
    results = run_parts(chosen, output, small=small)
    typer.echo((output / "gpu.md").read_text())
    if any("failed" in result for result in results.values()):
        raise typer.Exit(1)


def run_here(name: str, path: Path, *, small: bool) -> None:
    """Run one part in this process; a package that is not installed is written down."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # convolutions have it by default
    device = torch.device("cpu") if small else torch.device("cuda", torch.cuda.current_device())
    record = Record(path, device, small)
    try:
        importlib.import_module(f"corda_eval.bench.gpu.{PARTS[name].file}").run(record)
    except ModuleNotFoundError as error:
        record.say(**{"left out": str(error)})


def run_parts(names: Sequence[str], output: Path, *, small: bool) -> dict[str, Any]:
    """Run parts one after the other, each in a process of its own; return what each measured, or how it ended."""
    results: dict[str, Any] = {}
    begin = time.perf_counter()
    command = f"python -m corda_eval.bench.gpu{' --small' if small else ''}" + "".join(f" --part {name}" for name in names)
    for name in names:
        left = (SMALL if small else WHOLE) - (time.perf_counter() - begin)
        limit = left if small else min(PARTS[name].limit, left)  # a CPU has no limits of its own for each
        results[name] = run_part(name, output, limit, small=small) if left > 15 else {"left out": "no time was left"}
        results[name]["predicted seconds"] = PARTS[name].predicted
        write_json(output / "gpu.json", {"command": command, "small": small, "parts": results})
        (output / "gpu.md").write_text(as_markdown(results, command), encoding="utf-8")
        typer.echo(f"{name}: {results[name].get('seconds', 0)} s, {results[name].get('failed') or results[name].get('left out') or 'done'}")
    return results


def run_part(name: str, output: Path, limit: float, *, small: bool) -> dict[str, Any]:
    """Run one part in a process of its own for at most so many seconds; return its figures, those it had by then if it was ended."""
    figures, log = output / "running.json", output / "gpu.log"
    figures.unlink(missing_ok=True)
    options = ["--output", str(output), "--into", str(figures), *(["--small"] if small else [])]
    start = time.perf_counter()
    with log.open("ab") as said:
        said.write(f"== {name}\n".encode())
        said.flush()
        child = subprocess.Popen(command_of(name, options), stdout=said, stderr=said, start_new_session=True, env=_environment())
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    result: dict[str, Any] = dict(_read(figures)) | {"seconds": round(time.perf_counter() - start, 1)}
    figures.unlink(missing_ok=True)
    if code is None:
        result["failed"] = f"ended after its limit of {limit:.0f} s"
    elif code != 0:
        result["failed"] = f"exit code {code}: {log.read_text(errors='replace')[-1500:]}"
    elif result.get("failed"):
        result["failed"] = f"these checks failed: {', '.join(result['failed'])}"
    else:
        result.pop("failed", None)
    return result


def command_of(name: str, options: Sequence[str]) -> list[str]:
    """Return the command that runs one part in a process of its own."""
    return [sys.executable, "-m", "corda_eval.bench.gpu", "--part", name, *options]


def _environment() -> dict[str, str]:
    """Return this process's environment, without a network, and with all said at once."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(path: Path) -> Mapping[str, Any]:
    """Return the figures of a part, none where it wrote none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return values


if __name__ == "__main__":
    app()
