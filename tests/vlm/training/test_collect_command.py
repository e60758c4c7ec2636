"""``corda-vlm collect``: keep files on the command line, alone, added up, and in recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import write_recipe
from typer.testing import CliRunner

from corda_core.store import read_covariances, read_plan, write_covariances
from corda_vlm.cli import app
from corda_vlm.training.estimate import estimate
from corda_vlm.training.recipe import read_recipe
from corda_vlm.training.run import prepare_recipe, run_recipe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min", "ignore:.*get no adapter"
)


def collect(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["collect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["collect", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return result.output


@pytest.fixture
def recipe(processor: Any, tmp_path: Path) -> Path:
    kept = write_recipe(tmp_path, processor, evaluation=None)
    rows = json.loads((tmp_path / "kept.json").read_text())
    for name, part in (("pictures", rows[:6]), ("texts", rows[6:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    return kept


def test_files_in_a_recipe_stand_for_their_samples(recipe: Path, tmp_path: Path) -> None:
    expected = prepare_recipe(read_recipe(recipe))
    options = ["--model", tmp_path / "base", "model.dtype=float32", "corda.parts=[vision, language]"]
    for name in ("pictures", "texts"):
        said = collect(*options, "--data", tmp_path / f"{name}.json", "--output", tmp_path / f"{name}.safetensors")
        assert f"{tmp_path / name}.safetensors" in said
    assert "Covariances of 26 layers over" in collect("--config", recipe, "--output", tmp_path / "whole.safetensors")
    said = collect("--add", tmp_path / "pictures.safetensors", tmp_path / "texts.safetensors", "--output", tmp_path / "sum.safetensors")
    assert "Covariances of 26 layers over" in said
    whole, total = (read_covariances(tmp_path / f"{name}.safetensors") for name in ("whole", "sum"))
    assert whole.places.keys() == total.places.keys()
    assert (whole.base_digest, whole.weights, whole.options) == (total.base_digest, total.weights, total.options)
    assert [part["file"] for part in total.about["sum_of"]] == ["pictures.safetensors", "texts.safetensors"]
    for name, covariance in total.covariances().items():
        torch.testing.assert_close(covariance.matrix, whole.covariances()[name].matrix, rtol=1e-5, atol=1e-6)
        assert covariance.num_tokens == whole.covariances()[name].num_tokens
    said = collect(
        *options, "--data", f"[{tmp_path}/pictures.safetensors, {tmp_path}/texts.json]", "--output", tmp_path / "mixed.safetensors"
    )
    assert "Covariances of 26 layers over" in said
    collect(*options, "--data", tmp_path / "mixed.safetensors", "--output", tmp_path / "copy.safetensors")
    for name, covariance in read_covariances(tmp_path / "copy.safetensors").covariances().items():
        torch.testing.assert_close(covariance.matrix, whole.covariances()[name].matrix, rtol=1e-5, atol=1e-6)
    for context in (["whole"], ["sum"], ["pictures", "texts"], ["texts", "pictures.json"]):
        names = [str(tmp_path / (name if "." in name else f"{name}.safetensors")) for name in context]
        written = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
        output = tmp_path / "-".join(context)
        found = prepare_recipe(read_recipe(recipe, [f"context={written}", f"output={output}"]))
        assert list(found.layers) == list(expected.layers)
        for name, init in found.layers.items():
            torch.testing.assert_close(init.B0 @ init.A0, expected.layers[name].B0 @ expected.layers[name].A0, rtol=1e-4, atol=1e-4)


def test_a_run_from_a_file_is_estimated_trained_and_resumed_without_it(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "general.safetensors"
    collect("--config", recipe, "--output", path)
    override = [f"context={path}"]
    told = CliRunner().invoke(app, ["train", "--config", str(recipe), "--dry-run", *override])
    assert "context: 0.0 TFLOP" in told.output
    without, kept, more = (
        estimate(read_recipe(recipe, [*override, *keep])).training_flops or 0
        for keep in ([], [f"keep.samples.source={tmp_path / 'texts.json'}"], [f"keep.samples.source={tmp_path / 'pictures.json'}"])
    )
    assert 0 < without < kept < more
    told = CliRunner().invoke(app, ["train", "--config", str(recipe), "--dry-run", *override, "keep={}"])
    assert told.exit_code == 1
    assert f"keep needs samples, but the context is {path}, which holds none; name keep.samples, or leave keep out" in told.output
    written = estimate(read_recipe(recipe, ["context=self", "corda.num_samples=16"]))
    assert written.num_context_tokens == 128
    assert written.context_flops > 16 * 128 * 4 * written.num_base  # written, and read
    plan = prepare_recipe(read_recipe(recipe, override))
    path.unlink()
    done = run_recipe(read_recipe(recipe, override), resume=True)
    assert done.losses[-1][0] == 8
    again = read_plan(done.output / "corda.safetensors")[0]
    assert all(torch.equal(init.A0, plan.layers[name].A0) for name, init in again.layers.items())
    told = CliRunner().invoke(app, ["train", "--config", str(recipe), "--dry-run", *override])
    assert told.exit_code == 1
    assert f"{path} does not exist" in told.output


def test_what_cannot_be_collected_or_added_is_said(recipe: Path, tmp_path: Path) -> None:
    path, texts = tmp_path / "general.safetensors", tmp_path / "texts.safetensors"
    collect("--config", recipe, "--output", path)
    options = ["--config", recipe, "--data", tmp_path / "texts.json", "--output"]
    assert "name ends in .safetensors" in refused(*options, tmp_path / "general.bin")
    assert "There is no base, or nothing to collect" in refused("--model", tmp_path / "base", "--output", texts)
    assert "nowhere.json" in refused("--model", tmp_path / "base", "--data", "nowhere.json", "--output", texts)
    assert "unknown option 'sauce'" in refused(*options, texts, "corda.sauce=1")
    assert "reads pictures, but none of the 0 items has one" in refused("--model", tmp_path / "base", "--data", "self", "--output", texts)
    assert "context: unknown option 'sauce'" in refused("--model", tmp_path / "base", "--data", "{sauce: 1}", "--output", texts)
    assert "--add takes at least two keep files; 1 given" in refused("--add", path, "--output", texts)
    assert "was given twice" in refused("--add", path, path, "--output", texts)
    assert "none.safetensors does not exist" in refused("--add", path, tmp_path / "none.safetensors", "--output", texts)
    assert not texts.exists()
    collect(*options, texts, "corda.tokens={image: 0.5, text: 1}")
    said = refused("--add", path, texts, "--output", tmp_path / "sum.safetensors")
    assert f"{texts} was collected with the options {{'tokens': {{'image': 0.5, 'text': 1.0}}}}, {path} with {{}}" in said
    collect(*options, texts, "corda.parts=[language]")
    said = collect("--add", path, texts, "--output", tmp_path / "sum.safetensors")
    assert "Covariances of 14 layers" in said
    assert "18 layers that are not in all of them are left out" in said
    held = read_covariances(texts)
    name = next(iter(held.weights))
    header = {"data": held.data_digest, "options": held.options, "about": held.about}
    write_covariances(held.covariances(), texts, weights={**held.weights, name: "0" * 64}, **header)  # type: ignore[arg-type]
    said = refused("--add", path, texts, "--output", tmp_path / "sum.safetensors")
    assert f"{texts} is of another base than {path}: {name} has other weights" in said
    collect(*options, tmp_path / "half.safetensors", "corda.parts=[language]", "--half")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.75 * texts.stat().st_size  # of which a third is the header
