"""The README's commands and code are real."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llava

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_two_set_up_commands_of_one_line_each() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/corda-vlm demo")
    assert commands[1].endswith(".venv/bin/pytest -n 2 --dist loadfile")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 -E '^python3 -m venv .*pytest' README.md" in ci
    assert ".venv/bin/pytest -n 2 --dist loadfile -m slow\n" in ci  # what that command leaves out


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_the_example_runs(processor: Any, samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python example of the README, word for word, on a tiny LLaVA saved where it looks for its model."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "prepare(" in block)
    monkeypatch.chdir(tmp_path)
    tiny_llava().save_pretrained(tmp_path / "my-llava")
    processor.save_pretrained(tmp_path / "my-llava")
    names: dict[str, Any] = {"kept_samples": samples, "training_samples": samples}
    exec(compile(code.replace("steps=200", "steps=2").replace("rank=32", "rank=4"), "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_help_lists_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "corda_eval.cli", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
