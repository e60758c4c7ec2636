"""Commands in processes of their own, that are killed by SIGKILL at a moment of choice.

Each process is forked from one that has imported everything: it runs the very code of ``corda-vlm``, and starts in milliseconds.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

LONGEST = 60.0
"""Seconds after which a process counts as hanging."""
IMPORTED = [
    *(
        "corda_eval.cli",
        "corda_vlm.training.run",
        "corda_vlm.training.deploy",
        "corda_vlm.training.estimate",
        "corda_eval.suite.measure",
        "conftest",
        "drill.kills",
    ),
    *("transformers.models.llava.modeling_llava", "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama"),
    *("transformers.models.llava.processing_llava", "transformers.models.clip.image_processing_clip"),
    *("sklearn.datasets", "matplotlib.pyplot", "jinja2"),
]
"""What the commands import sooner or later."""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""What Python tells of what changes a folder, besides opening files to write."""


@dataclass(frozen=True)
class Moment:
    """When a process dies: before its n-th change of a file in a folder, after so many seconds, or not at all; or only stops there."""

    change: int | None = None
    seconds: float | None = None
    by: int = signal.SIGKILL


NEVER = Moment()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: by that signal), what it wrote, how long it took, how often it changed a file."""

    code: int
    output: str
    seconds: float
    changes: int

    @property
    def was_killed(self) -> bool:
        """Whether it died of SIGKILL."""
        return self.code == -signal.SIGKILL

    def moment(self, rng: Random) -> Moment:
        """Return a moment of such a run: half of them between two changes of files, where little is left to chance."""
        if rng.random() < 0.5:
            return Moment(change=rng.randint(1, self.changes))
        return Moment(seconds=rng.uniform(0, self.seconds))


class Bench:
    """Starts processes and waits for their ends."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.number = logs, 0
        logs.mkdir()
        os.environ["OMP_NUM_THREADS"] = "1"  # of the process that the others are forked from
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(IMPORTED)
        self.running: dict[BaseProcess, tuple[Path, float]] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: object) -> None:
        for process in list(self.running):
            process.kill()
            process.join()

    def start(self, work: Callable[..., Any], *arguments: Any, folder: Path, moment: Moment = NEVER) -> BaseProcess:
        """Start ``work(*arguments)`` in a process that dies at a moment of what it does to ``folder``."""
        self.number += 1
        log = self.logs / f"{self.number}.log"
        log.touch()
        process = self.context.Process(target=_child, args=(work, arguments, str(folder), str(log), moment))
        process.start()
        self.running[process] = (log, time.monotonic())
        return process

    def wait(self, process: BaseProcess, moment: Moment = NEVER) -> Ended:
        """Return how a process ended; it is killed at its moment, or when it takes too long.

        Raises:
            TimeoutError: If it took too long.
        """
        log, start = self.running[process]
        process.join(LONGEST if moment.seconds is None else moment.seconds)
        hangs = process.is_alive() and moment.seconds is None
        if process.is_alive():
            process.kill()
            process.join()
        del self.running[process]
        output, count = log.read_text(errors="replace"), log.with_suffix(".changes")
        if hangs:
            raise TimeoutError(f"did not end within {LONGEST:.0f} s; it had said: {output[-2000:]}")
        return Ended(process.exitcode or 0, output, time.monotonic() - start, int(count.read_text()) if count.exists() else 0)

    def wait_until_it_stops(self, process: BaseProcess) -> None:
        """Wait until a process has stopped at its moment, or ended."""
        end = time.monotonic() + LONGEST
        while process.is_alive() and time.monotonic() < end and " (stopped)" not in Path(f"/proc/{process.pid}/status").read_text():
            time.sleep(0.01)

    def run(self, work: Callable[..., Any], *arguments: Any, folder: Path, moment: Moment = NEVER) -> Ended:
        """Start a process and wait for its end."""
        return self.wait(self.start(work, *arguments, folder=folder, moment=moment), moment)


def command(*arguments: str) -> None:
    """Run ``corda-vlm`` with arguments."""
    from corda_eval.cli import app

    sys.argv = ["corda-vlm", *arguments]
    app()


def save_over(adapter: str, folder: str) -> None:
    """Load an adapter and save it into a folder, where another one may be."""
    from conftest import tiny_llava

    import corda_vlm

    corda_vlm.save(corda_vlm.load(tiny_llava(), adapter), folder)


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], folder: str, log: str, moment: Moment) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    changes = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event in CHANGES or (event == "open" and bool(values[2] & (os.O_WRONLY | os.O_RDWR)))
        if writes and str(values[0]).startswith(folder):
            changes += 1
            if changes == moment.change:
                os.kill(os.getpid(), moment.by)

    sys.addaudithook(watch)
    try:
        work(*arguments)
    finally:
        Path(log).with_suffix(".changes").write_text(str(changes))
