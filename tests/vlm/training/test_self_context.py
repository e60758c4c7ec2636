"""Recipes whose base makes the context itself: kept beside the run, and read again when that is resumed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_open_clip, write_recipe
from typer.testing import CliRunner

from corda_core.store import read_covariances
from corda_vlm.cli import app
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


def test_a_collection_writes_anew_beside_its_file(processor: Any, tmp_path: Path) -> None:
    """Whatever run or keep file lies where it is written: with the count and the seed that were asked for."""
    path = recipe_of(tmp_path, processor)
    prepare_recipe(read_recipe(path))
    of_the_run = (tmp_path / "output" / "context.jsonl").read_bytes()
    place = tmp_path / "output" / "general.safetensors"
    asked = (["corda.num_samples=6", "corda.seed=7"], ["corda.num_samples=4", "corda.seed=0"])
    for options, file in zip(asked, (place, place.with_name("second.safetensors")), strict=True):
        done = CliRunner().invoke(app, ["collect", "--config", str(path), "--output", str(file), *options])
        assert done.exit_code == 0, done.output
    written = [read_self_context(place.with_name(f"{name}.safetensors.jsonl"), [{}] * 24) for name in ("general", "second")]
    assert [(len(one), one.options["seed"]) for one in written] == [(6, 7), (4, 0)]
    about = read_covariances(place).about
    assert (about["context"], about["num_samples"], about["seed"]) == (["self"], 6, 7)
    assert (tmp_path / "output" / "context.jsonl").read_bytes() == of_the_run
    asked_later = replace(read_recipe(path), corda=replace(read_recipe(path).corda, seed=8))
    with pytest.raises(
        ValueError, match=r"context\.jsonl was made with count 16 and seed 0, but the recipe asks for 16 and 8; put it back"
    ):
        contexts.read_context(asked_later, torch.nn.Linear(1, 1), processor, [{}] * 24, tmp_path / "output")  # type: ignore[arg-type]


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


def test_a_clip_keeps_its_pictures_with_captions_of_its_own_choice(processor: Any, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    folder = tmp_path / "clip"
    write_open_clip(folder)
    rows = [{"image": f"{number}.png", "text": f"a picture of {['red', 'green', 'blue'][number % 3]}"} for number in range(24)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    path = recipe_of(tmp_path, processor, keep={"batch_size": 4}, corda={"num_samples": 16, "parts": None, "train_fully": []})
    overrides = [f"data.source={tmp_path / 'pairs.json'}", f"model.path=local-dir:{folder}", "model.library=open_clip"]
    summary = run_recipe(read_recipe(path, overrides))
    captions = [json.loads(line)["text"] for line in (summary.output / "context.jsonl").read_text().splitlines()[1:]]
    assert len(set(captions)) == 16
    assert all(caption.startswith("a photo of ") for caption in captions)
    command = ["export", "--adapter", summary.output, "--output", tmp_path / "plain", "--merge", "--max-kl", "1e-6"]
    done = CliRunner().invoke(app, [str(argument) for argument in (*command, "--on", tmp_path / "pairs.json")])
    assert done.exit_code == 0, done.output
    assert "nats a pair, on 24 samples" in done.output


@pytest.mark.slow
def test_two_processes_write_the_context_of_one(processor: Any, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, processor, keep={"batch_size": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "corda_vlm.cli"]
    command += ["train", "--config", str(path), f"output={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_recipe(read_recipe(path))
    assert (tmp_path / "two" / "context.jsonl").read_bytes() == (alone.output / "context.jsonl").read_bytes()
    losses = json.loads((tmp_path / "two" / "training.json").read_text())["losses"]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in alone.losses], abs=2e-5)
