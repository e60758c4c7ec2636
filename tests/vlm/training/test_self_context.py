"""Recipes whose base makes the context itself: kept beside the run, and read again when that is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipes import write_recipe

from corda_vlm.selfwritten import read_self_context, self_context
from corda_vlm.training import contexts
from corda_vlm.training.recipe import read_recipe
from corda_vlm.training.run import prepare_recipe, run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")


def recipe_of(folder: Path, processor: Any, **changes: Any) -> Path:
    corda = {"num_samples": 16, "protect": "strict", "parts": ["language"], "train_fully": []}
    return write_recipe(folder, processor, **{"context": "self", "corda": corda, "training": {"steps": 4}, **changes})


def test_a_run_writes_its_context_once_and_resumes_with_it(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_of(tmp_path, processor, keep={"weight": 1.0, "batch_size": 2}, corda={"num_samples": 16, "seed": 3})
    whole = run_recipe(read_recipe(path, [f"output={tmp_path / 'whole'}"]))
    prepare_recipe(read_recipe(path))  # and is killed
    written = (tmp_path / "output" / "context.jsonl").read_bytes()
    assert written == (tmp_path / "whole" / "context.jsonl").read_bytes()
    header = json.loads(written.splitlines()[0])
    assert header["self_context"]["seed"] == 3
    assert len(written.splitlines()) == 1 + header["self_context"]["count"] == 17

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("written anew")

    monkeypatch.setattr(contexts, "self_context", refuse)
    assert run_recipe(read_recipe(path), resume=True).losses == whole.losses
    assert (tmp_path / "output" / "context.jsonl").read_bytes() == written


def test_what_a_start_that_failed_has_written_is_not_taken(processor: Any, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, processor)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "context.jsonl").write_text("of another recipe\n")
    plan = prepare_recipe(read_recipe(path))
    assert len(read_self_context(tmp_path / "output" / "context.jsonl", [{}] * 24)) == 16
    assert plan.layers


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_context_that_a_run_has_lost_is_told(harm: str, processor: Any, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, processor, keep={"weight": 1.0, "batch_size": 2})
    prepare_recipe(read_recipe(path))
    file = tmp_path / "output" / "context.jsonl"
    if harm == "gone":
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"context.jsonl does not exist"):
            run_recipe(read_recipe(path), resume=True)
    else:
        file.write_text(file.read_text().replace("seed", "sead", 2))
        with pytest.raises(ValueError, match=r"context.jsonl is damaged|no whole file"):
            run_recipe(read_recipe(path), resume=True)


def test_candidates_are_drawn_from_as_many_samples_as_they_take(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(recipe_of(tmp_path, processor, corda={"num_samples": 12, "candidates": 2, "damping": 0.1}))
    counts: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(options["count"])
        return self_context(*args, **options)

    monkeypatch.setattr(contexts, "self_context", counted)
    prepare_recipe(recipe)
    assert counts == [24]
