"""Killed at any moment and run again, a command leaves what it would have left if nothing had happened."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from drill.conftest import Drill
from drill.kills import Bench, Ended, Moment, command, save_over
from drill.place import Place, content, tuned_model

pytestmark = pytest.mark.slow
LOCKED = 4
"""Changes of an output after which it must be locked."""


@dataclass(frozen=True)
class Work:
    """A command that writes an output, and what is read there."""

    name: str
    share: float
    """Of the kills that are asked for."""

    arguments: Callable[[Place, Path], list[str]]
    again: list[str]
    """Options to go on with."""

    outcome: Callable[[Path], Any]


def trained(output: Path) -> Any:
    """Return what training came to."""
    summary = json.loads((output / "training.json").read_text())
    weights = [content(output / name) for name in ("adapter_model.safetensors", "corda.safetensors")]
    checkpoints = sorted(folder.name for folder in output.glob("checkpoint-*"))
    return weights, summary["losses"], summary["evaluation"], checkpoints


def exported(output: Path) -> Any:
    """Return the files of a LoRA."""
    return {file.name: content(file) for file in output.iterdir() if file.is_file()}


def evaluated(output: Path) -> Any:
    """Return what an evaluation came to, without its times; and how many predictions each file holds of how many questions."""
    lines = {file: [json.loads(line) for line in file.read_text().splitlines()[1:]] for file in output.glob("*/*.jsonl")}
    return json.loads((output / "summary.json").read_text())["comparison"], {
        str(file.relative_to(output)): (len(rows), len({row["question_id"] for row in rows})) for file, rows in lines.items()
    }


WORKS = [
    Work("train", 0.6, lambda place, output: ["train", "--config", str(place.recipe), f"output={output}"], ["--resume"], trained),
    Work(
        "eval",
        0.2,
        lambda place, output: [
            *(
                "eval",
                "--base",
                place.base,
                "--dtype",
                "float32",
                "--suite",
                str(place.folder / "suite" / "suite.yaml"),
                "--output",
                str(output),
            ),
            *("--adapter", str(place.folder / "whole")),
        ],
        [],
        evaluated,
    ),
    Work(
        "export",
        0.1,
        lambda place, output: [
            *("export", "--adapter", str(place.folder / "whole"), "--output", str(output)),
            *("--base", place.base, "--dtype", "float32"),
        ],
        [],
        exported,
    ),
]


def run(bench: Bench, arguments: list[str], output: Path, moment: Moment = Moment()) -> Ended:  # noqa: B008
    return bench.run(command, *arguments, folder=output, moment=moment)


@pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])
def test_killed_and_run_again_it_comes_to_the_same(work: Work, place: Place, bench: Bench, drill: Drill, tmp_path: Path) -> None:
    usual = run(bench, work.arguments(place, tmp_path / "usual"), tmp_path / "usual")
    assert usual.code == 0, usual.output
    expected = work.outcome(tmp_path / "usual")
    faults, kills, trial = [], 0, 0
    while kills < work.share * drill.amounts["kills"]:
        trial += 1
        rng = Random(f"{drill.seed} {work.name} {trial}")
        output = tmp_path / str(trial)
        arguments = work.arguments(place, output)
        if work.name == "train" and rng.random() < 0.2:
            moments = [usual.moment(rng)]
            deaths = [run(bench, ["prepare", *arguments[1:]], output, moments[0])]
        else:
            moments, deaths = [], []
        for _ in range(rng.randint(1, 3)):
            moments.append(usual.moment(rng))
            deaths.append(run(bench, arguments + work.again * bool(deaths), output, moments[-1]))
        kills += sum(death.was_killed for death in deaths)
        drill.count(f"kills of {work.name}", "SIGKILLs", sum(death.was_killed for death in deaths))
        faults += [f"{trial}: {moments}: {problem}" for problem in _after(bench, work, [*arguments, *work.again], output, deaths, expected)]
        drill.count(f"kills of {work.name}", "runs")
        shutil.rmtree(output, ignore_errors=True)
    drill.count(f"kills of {work.name}", "other results, or errors", len(faults))
    assert not faults, "\n".join(faults)


def _after(bench: Bench, work: Work, arguments: list[str], output: Path, deaths: list[Ended], expected: Any) -> list[str]:
    """Return what is wrong with a command that died so, when it is run again; and, of every third, once more when it is done."""
    problems = [f"ended with {death.code}: {death.output[-500:]}" for death in deaths if not death.was_killed and death.code != 0]
    for what in ("run again", "run when done") if output.name.endswith(("1", "4", "7")) else ("run again",):
        ended = run(bench, arguments, output)
        if ended.code != 0:
            return [*problems, f"{what}, it ended with {ended.code}: {ended.output[-500:]}"]
        if work.outcome(output) != expected:
            return [*problems, f"{what}, it came to {work.outcome(output)}, not {expected}"]
    return problems + [f"{left.name} is left" for left in output.rglob(".partial-*")]


def test_an_adapter_saved_over_another_is_the_old_or_the_new(place: Place, bench: Bench, drill: Drill, tmp_path: Path) -> None:
    old, new, folder = place.folder / "whole", place.folder / "other-whole", tmp_path / "adapter"
    allowed = [_weights(old), _weights(new)]
    faults, kills, ended = [], 0, None
    rng = Random(f"{drill.seed} save")
    while kills < 0.1 * drill.amounts["kills"]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        moment = ended.moment(rng) if ended else Moment()
        death = bench.run(save_over, str(new), str(folder), folder=folder, moment=moment)
        ended = ended or death
        kills += death.was_killed
        try:
            outcome = "right" if _weights(folder) in allowed else "wrong"
        except (ValueError, FileNotFoundError):
            outcome = "refused"
        faults += [f"{moment}: a mixture loads"] * (outcome == "wrong")
        drill.count("kills of save", outcome)
    drill.count("kills of save", "SIGKILLs", kills)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("work", WORKS[:2], ids=[work.name for work in WORKS[:2]])
def test_of_two_at_once_one_is_told_so_and_the_other_is_right(work: Work, place: Place, bench: Bench, drill: Drill, tmp_path: Path) -> None:
    usual = run(bench, work.arguments(place, tmp_path / "usual"), tmp_path / "usual")
    expected = work.outcome(tmp_path / "usual")
    faults = []
    for trial in range(max(3, drill.amounts["kills"] // 20)):
        rng = Random(f"{drill.seed} two {work.name} {trial}")
        output = tmp_path / str(trial)
        arguments = work.arguments(place, output)
        moment = Moment(change=rng.randint(LOCKED, usual.changes), by=signal.SIGSTOP)
        first = bench.start(command, *arguments, folder=output, moment=moment)
        bench.wait_until_it_stops(first)
        second = run(bench, [*arguments, *work.again], output)
        os.kill(first.pid or 0, signal.SIGCONT)
        ends = [bench.wait(first), second]
        problems = [f"one ended with {end.code}: {end.output[-500:]}" for end, code in zip(ends, (0, 1), strict=True) if end.code != code]
        problems += [f"one said {end.output[-500:]}" for end in ends if "Traceback" in end.output]
        if not problems and work.outcome(output) != expected:
            problems.append(f"the one that ended well came to {work.outcome(output)}, not {expected}")
        faults += [f"{trial}: {moment}: {problem}" for problem in problems]
        drill.count(f"two at once of {work.name}", "wrong" if problems else "right")
    assert not faults, "\n".join(faults)


def _weights(folder: Path) -> list[bytes]:
    return [value.detach().numpy().tobytes() for _, value in sorted(tuned_model(folder).named_parameters())]
