"""Merged models take the keep files of their ancestors: each task can be prepared with the files of all before it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llava
from test_keepfiles import EVERYWHERE, TEXTS, keep
from torch import nn
from transformers import AutoModelForImageTextToText

import corda_vlm
from corda_core import context_drift, load_covariances, weight_change
from corda_core.bases import ANCESTRY, ancestry_of
from corda_vlm import collect_context
from corda_vlm.training.models import load_base
from corda_vlm.training.recipe import ModelConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min", "ignore:.*get no adapter"
)

NEXT = """
import sys, warnings
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText
import corda_vlm

folder, output, *files = map(Path, sys.argv[1:])
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
ids = torch.arange(20)[None]
with torch.no_grad():
    expected = model(input_ids=ids).logits
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = corda_vlm.prepare(model, files, rank=4)
    print(torch.equal(adapted(input_ids=ids).logits, expected))
    print(*(warning.message for warning in told if "ancestor" in str(warning.message)), sep="\\n")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
corda_vlm.merge(adapted).save_pretrained(output)
"""


def change_(adapted: nn.Module) -> None:
    """Train: put something into each B."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.slow
def test_a_model_is_prepared_with_the_files_of_all_its_past(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    base = tiny_llava()
    general = keep(TEXTS, tmp_path / "general.safetensors", processor, model=base)
    first = keep(samples, tmp_path / "first.safetensors", processor, model=base)
    joint = collect_context(base, [*TEXTS, *samples], EVERYWHERE, processor)
    adapted = corda_vlm.prepare(base, general, rank=4)
    change_(adapted)
    moved = weight_change(adapted)
    drift = context_drift(adapted, collect_context(tiny_llava(), TEXTS, EVERYWHERE, processor))
    corda_vlm.merge(adapted).save_pretrained(tmp_path / "one")
    one = AutoModelForImageTextToText.from_pretrained(tmp_path / "one").eval()
    with pytest.warns(UserWarning, match="ancestor") as told:
        found = collect_context(one, [general, first], EVERYWHERE)
    text = str(next(warning.message for warning in told if "ancestor" in str(warning.message)))
    assert text.startswith(f"{general} was made from an ancestor of this model: 14 of its 14 layers have moved since, by at most ")
    assert f"{max(moved.values()):.2%} (mean {sum(moved.values()) / 14:.2%}) of their weights' norm" in text
    assert f"{max(drift.values()):.2%} (mean {sum(drift.values()) / 14:.2%}) of their outputs on what they were to keep" in text
    assert found.keys() == joint.keys()
    for name, covariance in found.items():
        torch.testing.assert_close(covariance.matrix, joint[name].matrix, rtol=1e-5, atol=1e-6)
    second = keep(samples[:4], tmp_path / "second.safetensors", processor, model=one)
    command = [sys.executable, "-c", NEXT]
    for folder, output, files in (("one", "two", (general, first)), ("two", "three", (general, first, second))):
        done = subprocess.run([*command, tmp_path / folder, tmp_path / output, *files], capture_output=True, text=True, check=True)
        same, *told_there = done.stdout.splitlines()
        assert same == "True"
        assert len(told_there) == len(files)
    assert len(json.loads((tmp_path / "three" / "config.json").read_text())[ANCESTRY]) == 3
    with pytest.raises(ValueError, match=r"second\.safetensors was made with other base weights.*nor was this model merged from such"):
        corda_vlm.prepare(tiny_llava(), second, rank=4)  # a descendant's


def test_what_trains_whole_has_moved_too(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    base = tiny_llava()
    path = keep(samples, tmp_path / "general.safetensors", processor, model=base)
    adapted = corda_vlm.prepare(base, samples, processor=processor, rank=4, train_fully=["projector"])
    change_(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter *= 1.5
    merged = corda_vlm.merge(adapted, alpha=0.5)
    (step,) = ancestry_of(merged)
    assert step["model.multi_modal_projector.linear_1"][2].change == pytest.approx(0.25, rel=1e-3)
    with pytest.warns(UserWarning, match=r"16 of its 28 layers have moved since, by at most 25\."):
        load_covariances(path, model=merged, options={})


@pytest.mark.parametrize("options", [{"residual": "subtract"}, {"protect": "start"}, {"protect": "whitened"}])
def test_the_base_is_remembered_in_every_form(options: dict[str, str], processor: Any, samples: list[Any], tmp_path: Path) -> None:
    base = tiny_llava()
    path = keep(samples, tmp_path / "general.safetensors", processor, model=base)
    adapted = corda_vlm.prepare(base, path, rank=4, **options)  # type: ignore[arg-type]
    change_(adapted)
    merged = corda_vlm.merge(adapted)
    with pytest.warns(UserWarning, match=r"14 of its 28 layers have moved since"):
        load_covariances(path, model=merged, options={})


def test_a_plain_lora_leaves_its_base_as_an_ancestor(processor: Any, samples: list[Any], tmp_path: Path) -> None:
    base = tiny_llava()
    path = keep(samples, tmp_path / "general.safetensors", processor, model=base)
    adapted = corda_vlm.attach_lora(base, corda_vlm.select_layers(base), rank=4)
    change_(adapted)
    merged = corda_vlm.merge(adapted)
    with pytest.warns(
        UserWarning, match=r"14 of its 28 layers have moved since, by at most [\d.]+% \(mean [\d.]+%\) of their weights' norm; the"
    ):
        load_covariances(path, model=merged, options={})


def test_weights_that_no_merge_left_are_refused(processor: Any, tmp_path: Path) -> None:
    """Random ones, those trained whole since, and those trained whole between two merges, under the config of a merged model."""
    path = keep(TEXTS, tmp_path / "general.safetensors", processor, model=tiny_llava())

    def merged(base: nn.Module) -> Any:
        adapted = corda_vlm.prepare(base, TEXTS, processor=processor, rank=4)
        change_(adapted)
        return corda_vlm.merge(adapted)

    def moved_(model: Any) -> Any:
        model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").data *= 1.01
        return model

    with pytest.warns(UserWarning, match="made from an ancestor of this model: 14 of its 14"):
        load_covariances(path, model=merged(tiny_llava()), options={})
    torch.manual_seed(1)
    for other in (type(tiny_llava())(merged(tiny_llava()).config), moved_(merged(tiny_llava())), merged(moved_(merged(tiny_llava())))):
        with pytest.raises(ValueError, match=r"but \S+ was changed since the merge by something that is not recorded.*; collect anew"):
            load_covariances(path, model=other, options={})


def test_an_ancestry_of_another_form_is_refused() -> None:
    model = tiny_llava()
    model.config.corda_ancestry = [["layer"]]
    with pytest.raises(ValueError, match=r"corda_ancestry is not as merge wrote it .* remove it from its config\.json"):
        ancestry_of(model)


def test_open_clip_s_weights_say_it_themselves(samples: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from corda_vlm.training.deploy import deploy

    folder = Path(__file__).parents[2] / "eval/lab/weights/clip"
    place = f"local-dir:{folder}"
    model, processor = load_base(ModelConfig(place, library="open_clip", dtype="float32"))
    pairs = [(sample["image"], f"a {sample['answer']} square") for sample in samples]
    config = corda_vlm.CordaConfig(rank=4)
    path = keep(pairs, tmp_path / "general.safetensors", processor, config, model)
    adapted = corda_vlm.prepare(model, path, rank=4)
    change_(adapted)
    corda_vlm.save(adapted, tmp_path / "adapter")
    (tmp_path / "adapter" / "recipe.yaml").write_text(f"model: {{path: '{place}', library: open_clip, dtype: float32}}")
    deploy(tmp_path / "adapter", tmp_path / "merged", merge=True)
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "merged")
    merged, _ = load_base(ModelConfig(f"local-dir:{tmp_path / 'merged'}", library="open_clip", dtype="float32"))
    with pytest.warns(UserWarning, match="was made from an ancestor of this model"):
        again = corda_vlm.prepare(merged, path, rank=4)
    assert len(ancestry_of(again)) == 1
