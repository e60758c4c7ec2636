"""`corda-vlm compare`: the published tables come from the published runs, and a study without runs says so."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from corda_eval.cli import app

for package in ("jinja2", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[3]


def test_the_published_tables_are_those_of_the_published_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["compare", "--config", "configs/compare_lab.yaml", "--only-report", "--output", str(tmp_path)])
    assert done.exit_code == 0, (done.output, done.exception)
    result = (tmp_path / "study.md").read_text()
    assert result == (ROOT / "eval/results/compare/study.md").read_text()
    _title, headline, _rest = result.split("\n\n", 2)
    assert headline in (ROOT / "eval/results/README.md").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {
        "study.html",
        "study.json",
        "study.md",
        *(f"{name}{kind}.png" for name in ("clip", "llava", "smollm2", "smollm2_two") for kind in ("", ".size")),
    }


def test_the_table_of_keeping_is_that_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["compare", "--config", "configs/compare_keep.yaml", "--only-report", "--output", str(tmp_path)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "study.md").read_text() == (ROOT / "eval/results/keep/study.md").read_text()


def test_a_study_without_runs_says_so(tmp_path: Path) -> None:
    options = ["--config", str(ROOT / "configs/compare_lab.yaml"), f"results={tmp_path / 'none'}", "--only-report"]
    done = CliRunner().invoke(app, ["compare", *options, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "none' holds no finished run of this study; make some (without --only-report)" in done.output
    assert not (tmp_path / "out").exists()
