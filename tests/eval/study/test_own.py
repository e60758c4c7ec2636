"""A user's own task: what is tried, what is held out, what a run measures, and the recipe that follows."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipes import write_open_clip, write_recipe
from typer.testing import CliRunner

from corda_eval.cli import app
from corda_eval.study.frontier import Run
from corda_eval.study.grid import planned
from corda_eval.study.own import SETTING, OwnTask
from corda_eval.study.own_arms import CONTEXT, arms_for
from corda_eval.study.own_run import held_out, split
from corda_eval.study.worker import run
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import Recipe, read_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")

ADAPTED = {"protect": None, "rank": 4, "train_fully": [], "parts": ["vision", "projector", "language"]}


def own_task(recipe: Recipe, folder: Path, steps: int = 4, rates: tuple[float, ...] = (1e-2,)) -> OwnTask:
    task = OwnTask.of(recipe, folder / "runs", steps, rates, 1)
    task.write_recipe()
    return task


def measured(task: OwnTask, folder: Path, arm: str) -> dict[str, Any]:
    rate = 0.0 if arm == "base" else task.study.arms[arm]["rates"][0]
    return run(planned(task.study, SETTING, arm, rate, 0).spec, folder / "cache")


def test_arms_have_as_many_parameters_and_leave_all_else_as_the_recipe_has_it(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor, corda=ADAPTED))
    arms = arms_for(recipe)
    assert list(arms) == ["lora", "strict", "strict_bound", "lora_keep"]  # the recipe's own is one of these
    of = {name: arm.applied(recipe, 1e-3, 10, 5) for name, arm in arms.items()}
    assert {name: (str(own.corda.protection), own.corda.rank) for name, own in of.items()} == {
        "lora": ("none", 2),
        "strict": ("strict", 4),
        "strict_bound": ("strict", 4),
        "lora_keep": ("none", 2),
    }
    assert (of["strict_bound"].training.max_drift, of["strict"].training.max_drift) == (0.02, None)
    assert (of["lora_keep"].keep.every, of["lora"].keep) == (4, None)
    assert all(own.corda.parts == ADAPTED["parts"] for own in of.values())
    assert {(own.training.steps, own.training.learning_rate, own.seed, own.corda.seed) for own in of.values()} == {(10, 1e-3, 5, 5)}
    other = read_recipe(tmp_path / "recipe.yaml", ["corda.protect=start", "keep={weight: 2.0}"])
    assert list(arms_for(other))[-1] == "recipe"
    assert arms_for(other)["recipe"].applied(other, 1e-3, 10, 0).keep.weight == 2.0
    study = OwnTask.of(recipe, tmp_path, 10, (), 1).study
    assert study.arms["lora"]["rates"] == [1.6e-3, 5e-3, 1.6e-2]
    assert study.arms["strict"]["rates"] == [4.8e-3, 1.5e-2, 4.8e-2]


def test_runs_of_another_recipe_or_of_changed_data_are_not_taken(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, corda=ADAPTED)

    def name(*overrides: str, steps: int = 10) -> str:
        return planned(OwnTask.of(read_recipe(path, list(overrides)), tmp_path, steps, (), 1).study, SETTING, "lora", 1e-3, 0).file_name

    first = name()
    assert name(f"output={tmp_path / 'elsewhere'}") == first
    assert len({first, name("training.batch_size=2"), name(steps=11)}) == 3
    data = tmp_path / "data.json"
    data.write_text(data.read_text() + " ")
    assert name() != first


def test_nothing_that_is_measured_is_trained_or_kept(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, corda=ADAPTED, keep={})
    for overrides in ([], [f"evaluation={{source: {tmp_path / 'kept.json'}, limit: 6}}"]):
        recipe = read_recipe(path, overrides)
        model, read = load_base(recipe.model)
        samples = split(recipe, model, read, "base", tmp_path)
        context: Any = samples.context.samples
        assert not {*samples.kept.indices} & {*context.indices}
        assert len(samples.kept) == 3
        assert samples.keep is context
        assert not {*samples.validation.indices} & {*samples.test.indices}
        if overrides:
            assert len(samples.training) == 24
        else:
            held = {samples.validation.dataset.indices[place] for part in (samples.validation, samples.test) for place in part.indices}
            assert len(held) == 4
            assert not held & {*samples.training.indices}
    assert held_out(1000, 64, "data") == held_out(1000, 64, "data")
    with pytest.raises(ValueError, match=r"context has 9 sample\(s\), of which one in 5 may be held out; give at least 10"):
        held_out(9, 64, "context")


def test_a_run_measures_what_was_learned_and_what_was_kept(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor, corda=ADAPTED, training={"batch_size": 4, "micro_batch_size": 2}))
    task = own_task(recipe, tmp_path, steps=8)
    base, held = measured(task, tmp_path, "base"), measured(task, tmp_path, "lora_keep")
    assert {name: len(score["losses"]) for name, score in base["scores"].items()} == {"target": 2, CONTEXT: 3}
    assert base["scores"]["target"]["loss"] == pytest.approx(sum(base["scores"]["target"]["losses"]) / 2000, abs=1e-3)
    assert base["base_digest"] == held["base_digest"]
    assert held["validation_losses"][-1] == [8, pytest.approx(held["validation_losses"][-1][1])]
    assert held["validation_losses"][-1][1] < base["validation"]
    assert 0 < held["kl"][CONTEXT] < 1
    assert held["scores"][CONTEXT]["loss"] != base["scores"][CONTEXT]["loss"]
    assert not held["diverged"]


def test_base_and_arms_are_measured_on_the_same_samples(processor: Any, tmp_path: Path) -> None:
    """Those of the user's recipe: an arm has no evaluation and perhaps no keep of its own."""
    path = write_recipe(tmp_path, processor, corda=ADAPTED, keep={"samples": {"source": str(tmp_path / "kept.json")}})
    recipe = read_recipe(path, [f"evaluation={{source: {tmp_path / 'kept.json'}, limit: 6}}", "seed=3"])
    task = own_task(recipe, tmp_path, steps=1, rates=(1e-12,))
    base = measured(task, tmp_path, "base")
    for arm in ("lora", "strict"):
        found = measured(task, tmp_path, arm)
        assert found["scores"]["target"]["losses"] == base["scores"]["target"]["losses"]
        assert found["scores"][CONTEXT]["losses"] == base["scores"][CONTEXT]["losses"]
        assert found["validation_losses"][-1][1] == pytest.approx(base["validation"], abs=1e-4)
    model, read = load_base(recipe.model)
    samples = split(recipe, model, read, "base", tmp_path)
    assert samples.keep.dataset is samples.context.samples.dataset  # the context again: what is measured of it is held to by no arm


def test_options_that_go_with_rate_and_rank_go_with_them(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(
        write_recipe(tmp_path, processor, corda=ADAPTED | {"alpha": 8.0}, training={"vision_learning_rate": 1e-3}, keep={"kind": "replay"})
    )
    arms = {name: arm.applied(recipe, 1e-2, 4, 0) for name, arm in arms_for(recipe).items()}
    assert {own.corda.alpha / own.corda.rank for own in arms.values()} == {2.0}
    assert {own.training.vision_learning_rate for own in arms.values()} == {2e-3}  # of 5e-3 a fifth
    assert str(arms["lora_keep"].keep.kind) == "distill"
    _, best = OwnTask.of(recipe, tmp_path, 4, (1e-2,), 1).advice(
        [Run("base", 0.0, 0, {"validation": 3.0}), run_at("lora", 1e-2, 1.0, 0.5)], 0.01
    )
    assert best is not None
    assert (best.keep.budget, best.training.vision_learning_rate) == (0.01, 2e-3)
    assert OwnTask.of(recipe, tmp_path, 4, (1.25e-4,), 1).study.arms["lora"]["rates"] == [1.25e-4]


def run_at(arm: str, rate: float, gain: float, kl: float) -> Run:
    return Run(arm, rate, 0, {"diverged": False, "validation_losses": [[10, 3.0 - gain]], "kl": {CONTEXT: kl}})


def test_the_best_is_what_learns_most_within_what_may_be_forgotten(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor, corda=ADAPTED))
    task = OwnTask.of(recipe, tmp_path, 10, (1e-4, 1e-3), 1)
    base = Run("base", 0.0, 0, {"validation": 3.0})
    runs = [base, run_at("lora", 1e-3, 1.0, 0.5), run_at("lora_keep", 1e-3, 0.9, 0.02), run_at("strict_bound", 3e-3, 0.8, 0.01)]
    text, best = task.advice(runs, 0.03)
    assert best is not None
    assert best.keep is not None
    assert "lora_keep at 0.001 (gain 0.900 nats, KL to the base 0.0200) learns most" in text
    assert (best.corda.mode, best.corda.rank, best.keep.every, best.training.learning_rate) == ("lora", 2, 4, 1e-3)
    assert (best.output, best.corda.seed, best.training.steps) == (recipe.output, recipe.corda.seed, recipe.training.steps)
    text, best = task.advice(runs, 0.015)
    assert best is not None
    assert "max_drift: 0.02" in text
    assert (str(best.corda.protection), best.training.max_drift, best.keep) == ("strict", 0.02, None)
    text, best = task.advice(runs, 0.001)
    assert best is not None
    assert best.keep is not None
    assert "Nothing stays within 0.001 nats; the least is strict_bound" in text
    assert (best.keep.budget, best.training.learning_rate) == (0.001, 1e-3)
    assert task.advice([base], 0.1) == ("No run was finite: try lower --rates.", None)
    with pytest.raises(ValueError, match="The base has not been measured"):
        task.advice(runs[1:], 0.1)


def test_a_dry_run_says_what_it_costs_and_writes_nothing(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, corda=ADAPTED)
    command = ["compare", "--recipe", str(path), "--steps", "7", "--output", str(tmp_path / "report"), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "12 runs of 7 steps, and the base" in result.output
    assert "  strict_bound: rates 0.0048, 0.015, 0.048" in result.output
    assert not (tmp_path / "report").exists()
    for options, message in (
        ([], "either --config (a study) or --recipe"),
        (["--config", "configs/compare_lab.yaml"], "--dry-run is for --recipe"),
        (["--recipe", str(path), "--rates", "1e-4,fast"], "--rates has 'fast'"),
        (["--recipe", str(path), "corda.mode=ipm"], "no context of what is to be kept"),
    ):
        result = CliRunner().invoke(app, ["compare", *options, *(["--dry-run"] if options else [])])
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.slow
def test_the_command_goes_from_a_recipe_to_one_that_trains(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, corda=ADAPTED)
    report = tmp_path / "report"
    command = ["compare", "--recipe", str(path), "--steps", "6", "--rates", "3e-3,1e-2", "--output", str(report), "--max-kl", "0.05"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"Train it: corda-vlm train --config {report / 'best.yaml'}" in result.output
    assert "lora_keep" in (report / "study.md").read_text()
    files = {file: file.stat().st_mtime_ns for file in (report / "runs").rglob("*.json")}
    assert len(files) == 9
    again = CliRunner().invoke(app, [*command, "--only-report"])
    assert again.exit_code == 0, again.output
    assert files == {file: file.stat().st_mtime_ns for file in (report / "runs").rglob("*.json")}
    trained = CliRunner().invoke(app, ["train", "--config", str(report / "best.yaml"), "training.steps=2"])
    assert trained.exit_code == 0, trained.output


def test_two_towers_and_a_context_that_the_base_writes(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    write_open_clip(tmp_path / "clip")
    rows = [{"image": f"{number}.png", "text": f"a picture of {['red', 'green', 'blue'][number % 3]}"} for number in range(24)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    overrides = [f"model.path=local-dir:{tmp_path / 'clip'}", "model.library=open_clip", f"data.source={tmp_path / 'pairs.json'}"]
    overrides += ["context=self", "corda.parts=null", "corda.protect=strict", "corda.train_fully=[]", "training.batch_size=6"]
    task = own_task(read_recipe(path, overrides), tmp_path)
    base, held = measured(task, tmp_path, "base"), measured(task, tmp_path, "lora_keep")
    assert len(list((tmp_path / "cache").glob("own-*.jsonl"))) == 1
    assert held["base_digest"] == base["base_digest"]
    assert held["kl"][CONTEXT] > 0
    assert held["scores"]["target"]["loss"] != base["scores"]["target"]["loss"]
    (tmp_path / "pairs.json").write_text(json.dumps(rows[:12]))
    with pytest.raises(ValueError, match=r"1 pair\(s\) to choose by and 2 of the context"):
        measured(task, tmp_path, "base")
