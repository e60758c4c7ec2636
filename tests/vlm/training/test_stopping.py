"""Signals to real processes: all of them end at once, and say how to go on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from recipes import write_recipe

from corda_vlm.training import stopping

PROGRAM = """
import importlib.util, os, subprocess, sys, threading, time
spec = importlib.util.spec_from_file_location("stopping", sys.argv[1])  # not corda_vlm, whose import takes seconds
stopping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stopping)
def say(number):
    print("stopped by " + number.name + "\\n", end="", flush=True)  # in one piece, whatever the main thread prints
with stopping.stoppable(say):
    print("ready", flush=True)
    {body}
print("went on", flush=True)
"""
DEAF_CHILD = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(__import__('os').getpid(), flush=True); time.sleep(60)"
)
BODIES = {
    "sleeping": "time.sleep(60)",
    "holding on": """
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass""",
    "deep in C": "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "waiting for a child that does not listen": f"""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:
        pool.submit(subprocess.run, [sys.executable, "-c", {DEAF_CHILD!r}])""",
    "closing": """
    try:
        time.sleep(60)
    finally:
        print("closed", flush=True)""",
}


def started(body: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(body=body)
    process = subprocess.Popen([sys.executable, "-c", program, stopping.__file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; nobody may have asked for its exit status yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("what", BODIES)
def test_a_signal_ends_whatever_runs_and_what_it_started(what: str, number: signal.Signals) -> None:
    process = started(BODIES[what])
    assert process.stdout is not None
    child = int(process.stdout.readline()) if "child" in what else None
    time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert output.count(f"stopped by {number.name}\n") == 1
    assert "went on" not in output
    assert ("closed" in output) == (what == "closing")
    assert child is None or has_ended(child)


def test_a_second_signal_changes_nothing() -> None:
    process = started(BODIES["holding on"])
    time.sleep(0.2)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.2)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "stopped by SIGINT\n")


def test_signals_to_forked_workers_are_theirs() -> None:
    body = """
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, 15)
    print("ended by", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.2)"""
    output, _ = started(body).communicate(timeout=30)
    assert output == "ended by -15\nwent on\n"


def test_what_was_ignored_stays_ignored_and_all_is_as_before_in_the_end() -> None:
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    try:
        with stopping.stoppable(lambda number: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in handlers
        assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
        with pytest.raises(ValueError, match="its own"), stopping.stoppable(lambda number: None):
            raise ValueError("its own")
    finally:
        signal.signal(signal.SIGHUP, before)


def run(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "corda_eval.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def wait_until(is_so: Callable[[], Any], *processes: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.1)


@pytest.mark.slow
def test_training_says_how_to_go_on(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 10_000, "workers": 1})
    process = run("train", "--config", path)
    wait_until(lambda: list((tmp_path / "output").glob("checkpoint-*")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "corda-vlm train: stopped by SIGINT; with --resume it continues from the last whole checkpoint" in errors
    assert "Traceback" not in errors
    assert all(has_ended(worker.pid) for worker in workers)


def runs_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    workers = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            workers += [child] if "corda_eval.study.worker" in child.cmdline() else []
    return workers


@pytest.mark.slow
def test_a_study_s_runs_end_with_it(tmp_path: Path) -> None:
    config = Path(__file__).parents[3] / "configs" / "compare_lab.yaml"
    process = run("compare", "--config", config, f"results={tmp_path / 'results'}", "--output", tmp_path / "report")
    wait_until(lambda: runs_of(process), process)
    runs = runs_of(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "corda-vlm compare: stopped by SIGTERM; the same command makes the runs that are missing." in errors
    assert "Traceback" not in errors
    assert all(has_ended(worker.pid) for worker in runs)


@pytest.mark.slow
def test_processes_that_lose_another_say_so(processor: Any, tmp_path: Path) -> None:
    """Without a launcher, which would end them itself."""
    path = write_recipe(tmp_path, processor, training={"steps": 10_000})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, other = (run("train", "--config", path, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01")
    wait_until((tmp_path / "output" / "recipe.yaml").exists, first, other)  # they have met
    other.kill()
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 1
    assert "corda-vlm train: Process 0 lost another one of this run" in errors
    assert "Traceback" not in errors
    other.communicate()
