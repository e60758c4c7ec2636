"""What a result was made with: versions, commit, machine, options, time."""

import dataclasses
import datetime
import os
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("corda-vlm", "torch", "transformers", "peft")
"""What answers may depend on."""
PACKAGES = (*LIBRARIES, "accelerate", "safetensors", "lm_eval")


def describe_run(config: Any, command: str, start: float) -> dict[str, Any]:
    """Return plain values that stand in every summary.

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
        # Linux counts in KiB.
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that answers may depend on."""
    return {package: version(package) for package in LIBRARIES}


def _commit() -> str:
    """Return the commit of the checkout this file is in, or "not a checkout"."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a checkout"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
