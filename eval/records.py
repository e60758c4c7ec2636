"""Results, run descriptions, JSON files and Markdown tables, shared by all of eval.

- ``TaskResult``: the result of one task, with a score and a record for each example.
- ``describe_run``: what a result was made with: command, commit, options, versions, machine.
- JSON: whole files, files that carry their digest (``write_sealed``), and lines that are added as results come in (``add_line``).
- Markdown: tables whose cells show names and texts as they are.
"""

import dataclasses
import datetime
import json
import os
import platform
import re
import resource
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from corda_core.files import DIGEST, json_digest, read_json, write_whole


@dataclass(frozen=True)
class TaskResult:
    """One task done with one model."""

    task: str
    """Its usual name, such as "vqav2" or "imagenet1k"."""

    metrics: Mapping[str, float]
    """By their usual names; fractions from 0 to 1, perplexities as they are."""

    headline: str
    """Which of them is compared; higher is better, except for "perplexity" and "word_perplexity"."""

    scores: Sequence[float]
    """Each example's part of the headline, in the order of the data: what paired intervals are drawn from."""

    records: Sequence[Mapping[str, Any]]
    """One per question asked (JSON: id, prediction, right answer); more than ``scores`` only where an example is asked in several ways
    (MMBench)."""

    examples_per_second: float

    @property
    def num_examples(self) -> int:
        """How many examples were scored."""
        return len(self.scores)


LIBRARIES = ("corda-vlm", "torch", "transformers", "peft")
"""What answers may depend on."""
PACKAGES = (*LIBRARIES, "accelerate", "safetensors", "lm_eval")


def describe_run(config: Any, command: str, start: float) -> dict[str, Any]:
    """Return plain values that every summary has.

    Args:
        config: The run's options, a dataclass with a ``seed``.
        command: The shell command that makes the result again.
        start: ``time.time()`` when the run began.
    """
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "machine": {"cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "seconds": round(time.time() - start, 1),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that answers may depend on."""
    return {package: version(package) for package in LIBRARIES}


def peak_memory_gb() -> float:
    """Return the most resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _commit() -> str:
    """Return the commit of the checkout this file is in, or "not a checkout"."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return head.stdout.strip() or "not a checkout"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(path: Path, value: Any) -> None:
    """Write a value of JSON to a file of its own.

    Raises:
        ValueError: If it holds an infinity or NaN, which JSON cannot hold.
    """
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object of JSON with a digest of it, which ``read_sealed`` checks; a list of numbers is one line."""
    text = json.dumps({**value, DIGEST: json_digest(value)}, indent=1)
    # Only what has a line break: none is inside of a string.
    text = re.sub(r"\[\n[-+\d.eE,\s]+\]", lambda numbers: "".join(numbers[0].split()), text)
    write_whole(path, f"{text}\n".encode())


def read_sealed(path: Path, cure: str) -> dict[str, Any]:
    """Return an object that ``write_sealed`` wrote, or corda-vlm 0.1.0, which gave it no digest.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not an object.
    """
    value = read_json(path, cure)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object, as corda-vlm writes; {cure}.")
    digest = value.pop(DIGEST, None)
    if digest is None:
        # Without the name: one warning for all that an old output holds.
        warnings.warn("What corda-vlm 0.1.0 wrote as JSON has no digest: damage to it would not be seen.", stacklevel=3)
    elif digest != json_digest(value):
        raise ValueError(f"{path} is damaged: its content is not that which its digest was taken of; {cure}.")
    return value


def read_lines(path: Path) -> list[Any]:
    """Return the values of a file with a value of JSON a line; none if there is no such file.

    Raises:
        ValueError: If a line is not whole.
    """
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not whole JSON ({error}); get the file again, or mend the line.") from error
    return values


def add_line(path: Path, value: Any) -> None:
    """Add a value of JSON as a line to a file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def timed_log(path: Path) -> Callable[..., None]:
    """Begin a file of JSON lines anew; return what adds an entry to it, with the seconds since now in front."""
    start = time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return lambda **entry: add_line(path, {"seconds": round(time.time() - start), **entry})


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, the last of them empty."""
    lines = [f"| {' | '.join(map(escaped, line))} |" for line in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def escaped(text: str) -> str:
    """Return Markdown that shows a text as it is, on one line: no column, tag, code, emphasis or link comes of it."""
    # An ampersand counts only where it begins an entity, a bracket only where a link's target follows.
    return re.sub(r"[\\`|<*]|&(?=#?\w+;)|(?<=\])\(", r"\\\g<0>", " ".join(text.split(sep="\n")))


def code(text: str) -> str:
    """Return Markdown that shows a text as code."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"
