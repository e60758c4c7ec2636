"""The record of one GPU: its parts run here at a small size; one that hangs or crashes costs itself alone; the same checks on a device."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from corda_eval.bench.gpu import __main__ as gpu
from corda_eval.bench.gpu.correct import CHECKS
from corda_eval.bench.gpu.measure import Record, rounded
from corda_eval.bench.gpu.report import as_markdown

CHEAP = ("iterations", "export", "attention")


@pytest.mark.parametrize("name", CHEAP)
def test_checks_hold_on_the_cpu(name: str) -> None:
    CHECKS[name](torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in CHEAP])
def test_the_other_checks_hold_on_the_cpu(name: str) -> None:
    CHECKS[name](torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_checks_hold_on_the_device(name: str) -> None:
    CHECKS[name](torch.device("cuda"))


@pytest.mark.parametrize("name", ["machine", "prepare"])
def test_a_part_runs_small(name: str, tmp_path: Path) -> None:
    gpu.run_here(name, tmp_path / "figures.json", small=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    measured = {title: figure for title, figure in figures.items() if isinstance(figure, dict) and "value" in figure}
    assert len(measured) >= 3
    assert all(figure["value"] >= 0 for figure in measured.values())
    assert "left out" not in figures


@pytest.mark.slow
def test_all_of_it_runs_small(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.app, ["--output", str(tmp_path), "--small"])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["parts"]) == list(gpu.PARTS)
    assert [name for name, figures in record["parts"].items() if "failed" in figures] == [], result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]


def test_a_part_that_hangs_or_crashes_keeps_what_it_had_and_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "machine": "import time; time.sleep(600)",
        "step": "raise SystemExit(3)",
        "nf4": "pass",
    }

    def command(name: str, options: Any) -> list[str]:
        write = f"open({str(tmp_path / 'running.json')!r}, 'w').write('{{\"first\": 1}}'); "
        return [sys.executable, "-c", write + bodies[name]]

    monkeypatch.setattr(gpu, "command_of", command)
    monkeypatch.setitem(gpu.PARTS, "machine", gpu.Part("machine", 1, 3))
    results = gpu.run_parts(["step", "nf4", "machine"], tmp_path, small=False)
    assert [results[name]["first"] for name in bodies] == [1, 1, 1]
    assert "limit" in results["machine"]["failed"]
    assert "exit code 3" in results["step"]["failed"]
    assert "failed" not in results["nf4"]
    assert "**Failed**: exit code 3" in (tmp_path / "gpu.md").read_text()


def test_the_whole_is_planned_for_eight_minutes() -> None:
    assert sum(part.predicted for part in gpu.PARTS.values()) <= gpu.WHOLE <= 480
    assert all(part.predicted < part.limit for part in gpu.PARTS.values())


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.app, ["--output", str(tmp_path), "--small", "--part", "prepair"])
    assert result.exit_code == 2
    assert "prepair" in result.output


def test_figures_stand_beside_floor_and_aim(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json", torch.device("cpu"), small=True)
    record.measured("forward", 3.0, "s", floor=1.5, aim="<= 2 × its floor", from_counts="9 TFLOP")
    record.measured("memory", None, "GB")
    text = as_markdown({"prepare": record.figures | {"seconds": 4.0, "predicted seconds": 5}}, "python")
    assert "| forward | 3 s | 1.5 s | 2.00 |" in text
    assert "| memory | unknown |" in text
    assert rounded({"a": [float("nan"), 1.23456]}) == {"a": ["nan", 1.235]}
