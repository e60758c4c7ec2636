"""One run of a benchmark in a process of its own, so that none finds the memory or caches of another."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def fresh_run(module: str, arguments: Sequence[str], about: Mapping[str, Any], output: Path | None) -> dict[str, Any]:
    """Return what ``python -m module arguments`` prints as JSON in its last line, after ``about``; print it, and add it to a file.

    Raises:
        RuntimeError: If the process fails; with the end of what it said.
    """
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    run = {**about, **json.loads(result.stdout.splitlines()[-1])}
    print(json.dumps(run), flush=True)
    if output is not None:
        with output.open("a") as file:
            file.write(json.dumps(run) + "\n")
    return run
