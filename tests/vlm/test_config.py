"""Configs: every shipped one loads, contradictions and unknown keys are refused in the user's words."""

from pathlib import Path
from typing import Any

import pytest

from corda_eval.demo.demo import METHODS, DemoConfig
from corda_vlm import CordaConfig
from corda_vlm.yaml import read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("demo*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = read_config(path, DemoConfig)
    assert set(config.learning_rates) == set(METHODS)


@pytest.mark.parametrize(
    ("options", "protection"),
    [
        ({}, "strict"),
        ({"protect": "start"}, "start"),
        ({"protect": "whitened"}, "whitened"),
        ({"mode": "ipm"}, "start"),
        ({"residual": "subtract"}, "start"),
    ],
)
def test_kpm_is_strict_unless_something_else_is_asked_for(options: dict[str, Any], protection: str) -> None:
    assert CordaConfig(**options).protection == protection


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "kmp"}, "mode is 'kmp'"),
        ({"split": "even"}, "split is 'even'"),
        ({"residual": "none"}, "residual is 'none'"),
        ({"protect": "hard"}, "protect is 'hard'"),
        ({"protect": "whitened", "mode": "ipm"}, "goes with mode"),
        ({"rank": 0}, "rank is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"tokens": "imgae"}, "tokens is 'imgae'"),
        ({"tokens": {"image": 1.0}}, "tokens is "),
        ({"tokens": {"image": 0.0, "text": 0.0}}, "not all zero"),
        ({"max_memory": "eight"}, "max_memory is 'eight'"),
        ({"max_memory": 0}, "max_memory is 0"),
        ({"protect": "strict", "mode": "ipm"}, "goes with mode"),
        ({"protect": "strict", "residual": "subtract"}, "goes with mode"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CordaConfig(**options)


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), (123, 123), ("8GB", 8 * 10**9), ("1.5 MB", 1_500_000), ("500k", 500_000), ("77", 77)]
)
def test_memory_sizes(text: str | int | None, size: int | None) -> None:
    assert CordaConfig(max_memory=text).max_bytes == size


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_config(path, CordaConfig)
    path.write_text("mode: ipm\nrnak: 3\n")
    with pytest.raises(ValueError, match="unknown option 'rnak'; did you mean 'rank'"):
        read_config(path, CordaConfig)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="holds a list"):
        read_config(path, CordaConfig)
    path.write_text("mode: ipm\nrank: 3\n")
    assert read_config(path, CordaConfig) == CordaConfig(mode="ipm", rank=3)
