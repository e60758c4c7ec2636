"""The shipped recipes: read, dry-run on tiny models of their kind, and one of each kind run for two steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import llama_config, tiny_llama, tiny_llava
from PIL import Image
from transformers import Gemma2Config, Gemma2ForCausalLM
from typer.testing import CliRunner

from corda_vlm.cli import app
from corda_vlm.training.estimate import estimate
from corda_vlm.training.recipe import read_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("compare", "demo", "suite")))
ROW = {
    **{"question": "what color is this ?", "answers": ["red", "red", "blue"], "query": "what is one ?", "response": "two"},
    **{"Question": "what is this ?", "Choice A": "red", "Choice B": "blue", "Choice C": "a", "Choice D": "one", "Answer_label": "red"},
    **{"caption": "a red circle", "answer": ["circle"], "image": "0.png", "Figure_path": "0.png"},
}


@pytest.fixture
def stand_ins(tmp_path: Path, processor: Any) -> Path:
    """A tiny model of each kind with a processor, and rows with the columns that the recipes name."""
    gemma = Gemma2Config(**{**llama_config().to_dict(), "head_dim": 8, "model_type": "gemma2"})
    for name, model in (("llava", tiny_llava()), ("llama2", tiny_llama()), ("gemma2", Gemma2ForCausalLM(gemma))):
        model.save_pretrained(tmp_path / name)
        (processor if name == "llava" else processor.tokenizer).save_pretrained(tmp_path / name)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "0.png")
    for kind, drop in (("image", ()), ("text", ("image", "Figure_path"))):
        rows = [{key: value for key, value in ROW.items() if key not in drop} for _ in range(8)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def changed(name: str, folder: Path) -> list[str]:
    """Return the overrides that put a stand-in in the place of model and data."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    kind, model = ("text" if "metamath" in name else "image"), "llava" if name.endswith("gb") else name.split("_")[0]
    overrides = [f"data.source={folder / kind}.jsonl", f"data.images={folder}", f"output={folder / 'output'}", "corda.rank=4"]
    if "context" in values:
        overrides += [f"context.source={folder / kind}.jsonl", f"context.images={folder}"]
        if model == "llava":
            overrides += ["context.columns={answer: answers}"]
    if name.endswith("gb"):
        overrides += ["data.columns={answer: answers}", "model.quantize=null"]
    if model != "clip":
        overrides += [f"model.path={folder / model}", "model.dtype=float32"]
    return overrides


def test_all_recipes_of_the_papers_are_there() -> None:
    tasks = {f"llava_{task}_{mode}" for task in ("okvqa", "pmcvqa") for mode in ("kpm", "ipm")}
    assert set(RECIPES) >= tasks | {"llama2_metamath_kpm", "gemma2_metamath_kpm", "clip_b32_kpm", "clip_l14_kpm"}


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_tells_what_it_will_take(name: str, stand_ins: Path) -> None:
    if name.startswith("clip"):
        pytest.importorskip("open_clip")
    result = CliRunner().invoke(app, ["train", "--config", str(CONFIGS / f"{name}.yaml"), "--dry-run", *changed(name, stand_ins)])
    assert result.exit_code == 0, result.output
    for word in (
        "layers",
        "rank",
        "parameters of A and B",
        "are in adapted layers",
        "trainable",
        "covariances",
        "while training",
        "float64",
        "it fits",
        "decomposition",
        "training:",
        "TFLOP",
        "about",
    ):
        assert word in result.output, result.output
    assert not (stand_ins / "output").exists()


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("clip")])
@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")
def test_recipes_run_on_tiny_models(name: str, stand_ins: Path) -> None:
    small = ["training.steps=2", "training.batch_size=4", "training.micro_batch_size=2", "training.log_to=none", "training.workers=0"]
    small += ["corda.num_samples=8", "corda.max_memory=null", "training.bf16=false", "corda.candidates=1"]
    result = CliRunner().invoke(app, ["train", "--config", str(CONFIGS / f"{name}.yaml"), *changed(name, stand_ins), *small])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Trained 2 steps" in result.output
    assert (stand_ins / "output" / "adapter_model.safetensors").exists()


def test_the_estimate_counts_what_attach_makes(stand_ins: Path) -> None:
    import corda_core

    overrides = [*changed("llama2_metamath_kpm", stand_ins), "training.steps=1", "training.log_to=none", "training.bf16=false"]
    overrides += ["training.batch_size=2", "training.micro_batch_size=2", "corda.max_memory=null"]
    recipe = read_recipe(CONFIGS / "llama2_metamath_kpm.yaml", overrides)
    estimated = estimate(recipe)
    CliRunner().invoke(app, ["train", "--config", str(CONFIGS / "llama2_metamath_kpm.yaml"), *overrides])
    adapted = corda_core.load(tiny_llama(), stand_ins / "output", is_trainable=True)
    assert estimated.num_trainable == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert estimated.num_base == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert estimated.memory.weights == 4 * estimated.num_base
    assert sum(part.num_layers for part in estimated.parts.values()) == 14
    frozen = sum(buffer.numel() for name, buffer in adapted.named_buffers() if "lora_A0" in name or "lora_B0" in name)
    assert estimated.memory.training == 4 * (4 * estimated.num_trainable + frozen)
    assert torch.tensor(estimated.flops_per_second) > 1e8
    plain = estimate(read_recipe(CONFIGS / "llama2_metamath_kpm.yaml", [*overrides, "corda.mode=lora", "corda.protect=null"]))
    assert (plain.memory.covariances, plain.context_flops, plain.decomposition_flops) == (0, 0, 0)
    assert plain.memory.training == 4 * 4 * plain.num_trainable
