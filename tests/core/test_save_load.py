"""Adapters on disk: saved, loaded in new processes, trained on; another base, another adapter or a damaged file is refused."""

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_attach import FAMILIES, IDS, logits, planned, trained

from corda_core import attach, attachment_of, export, load, lora_layers, merge, save
from corda_core.files import read_tensors
from corda_core.store import read_attachment, save_attachment

FORMS = [
    ("start", "offset", None),
    ("start", "offset", 12),
    ("start", "subtract", 12),
    ("strict", "offset", None),
    ("whitened", "offset", None),
]
LOAD = """
import pathlib, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import corda_core
for folder in pathlib.Path(sys.argv[1]).glob("*/adapter"):
    model = corda_core.load(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    reference = load_file(folder / "reference.safetensors")
    with torch.no_grad():
        print((model(input_ids=reference["ids"]).logits - reference["logits"]).abs().max().item())
"""


def test_round_trips_in_a_new_process(tmp_path: Path) -> None:
    for number, (family, (protect, residual, alpha)) in enumerate(product(FAMILIES, FORMS)):
        model = FAMILIES[family]()
        folder = tmp_path / str(number)
        model.save_pretrained(folder / "base")
        whole = ["model.norm" if family == "llama" else "transformer.ln_f"]
        adapted = trained(attach(model, planned(model), protect=protect, residual=residual, alpha=alpha, train_fully=whole))
        save(adapted, folder / "adapter")
        assert {file.name for file in (folder / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "corda.safetensors",
        }
        save_file({"ids": IDS, "logits": logits(adapted)}, folder / "adapter" / "reference.safetensors")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0"] * len(FORMS) * len(FAMILIES)


@pytest.mark.parametrize("protect", ["start", "strict", "whitened"])
def test_training_goes_on_as_if_nothing_had_happened(protect: str, tmp_path: Path) -> None:
    model = tiny_llama()
    adapted = trained(attach(model, planned(model), protect=protect))
    again = load(tiny_llama(), save(adapted, tmp_path), is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert torch.equal(logits(trained(again)), logits(trained(adapted)))


def test_what_peft_itself_saves_loads_too_if_the_plan_is_beside_it(tmp_path: Path) -> None:
    """As in a Trainer's checkpoint, which holds the frozen start once more."""
    adapted = trained(attach(tiny_llama(), planned(tiny_llama())))
    save(adapted, tmp_path)
    adapted.save_pretrained(tmp_path)
    assert any("lora_A0" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(load(tiny_llama(), tmp_path)), logits(adapted))


def test_strict_is_read_by_peft_alone(tmp_path: Path) -> None:
    adapted = trained(attach(tiny_llama(), planned(tiny_llama()), protect="strict"))
    loaded = PeftModel.from_pretrained(tiny_llama(), save(adapted, tmp_path))
    torch.testing.assert_close(logits(loaded.eval()), logits(adapted), rtol=0, atol=1e-6)


def test_what_was_attached_is_remembered_and_read_again(tmp_path: Path) -> None:
    adapted = attach(tiny_llama(), planned(tiny_llama()), alpha=9, train_fully=["model.norm"])
    saved, attached = read_attachment(save(adapted, tmp_path) / "corda.safetensors")[0], attachment_of(adapted)
    assert (saved.alpha, saved.protect, saved.residual, saved.quantize, saved.train_fully) == (9, "start", "offset", None, ("model.norm",))
    assert saved.plan.provenance == attached.plan.provenance
    for name, init in attached.plan.layers.items():
        assert torch.equal(init.A0, saved.plan.layers[name].A0)
        assert torch.equal(init.sigma, saved.plan.layers[name].sigma)


def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    model = tiny_llama()
    base = logits(model)
    first, second = planned(model), planned(model, "ipm", rank=3)
    adapted = trained(attach(model, first))
    first_logits = logits(adapted)
    adapted = attach(adapted, second, adapter_name="ipm")
    assert torch.equal(logits(adapted), base)  # the new one is active, at its start
    second_logits = logits(trained(adapted))
    assert not torch.equal(second_logits, base)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first_logits)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    for name, expected in (("default", first_logits), ("ipm", second_logits)):
        adapted.set_adapter(name)
        assert torch.equal(logits(adapted), expected)
        assert torch.equal(logits(load(tiny_llama(), save(adapted, tmp_path / name, adapter_name=name))), expected)
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(tiny_llama(), export(adapted, tmp_path / f"{name}-lora", adapter_name=name).folder).eval()),
            expected,
            rtol=0,
            atol=1e-5,
        )
    plain = adapted.merge_and_unload()
    assert not lora_layers(plain)
    torch.testing.assert_close(logits(plain), second_logits, rtol=0, atol=1e-5)


def test_weighted_sums_are_refused_in_training_and_right_when_exported(tmp_path: Path) -> None:
    model = tiny_llama()
    adapted = trained(attach(model, planned(model)))
    first_folder = export(adapted, tmp_path / "first").folder
    attach(adapted, planned(tiny_llama(), "ipm"), adapter_name="ipm")
    second_folder = export(trained(adapted), tmp_path / "second", adapter_name="ipm").folder
    plain = PeftModel.from_pretrained(tiny_llama(), first_folder, adapter_name="first")
    plain.load_adapter(second_folder, "second")
    before = set(adapted.peft_config)
    for names in (["default", "ipm"], ["ipm"]):
        with pytest.raises(ValueError, match="add_weighted_adapter got .*export it"):
            adapted.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type="cat")
    assert set(adapted.peft_config) == before
    plain.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", combination_type="cat")
    plain.set_adapter("sum")
    adapted.base_model.set_adapter(["default", "ipm"])
    torch.testing.assert_close(logits(plain.eval()), logits(adapted.eval()), rtol=0, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    adapter_plan = planned(tiny_llama())
    adapted = trained(attach(tiny_llama(), adapter_plan))
    folder = save(adapted, tmp_path / "a")
    with pytest.raises(ValueError, match="an adapter named 'default' already"):
        attach(adapted, adapter_plan)
    with pytest.raises(ValueError, match="which other adapters on this model need"):
        attach(adapted, adapter_plan, residual="subtract", adapter_name="second")
    for alpha in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            attach(tiny_llama(), adapter_plan, alpha=alpha)
    with pytest.raises(ValueError, match="train_fully names 'model.nothing'"):
        attach(tiny_llama(), adapter_plan, train_fully=["model.nothing"])
    with pytest.raises(ValueError, match=r"holds the planned layer model.layers.0.mlp.gate_proj"):
        attach(tiny_llama(), adapter_plan, train_fully=["model.layers.0.mlp"])
    with pytest.raises(ValueError, match="no CorDA adapter named 'default'"):
        save(tiny_llama(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="made for base weights"):
        load(other, folder)
    with pytest.raises(ValueError, match=r"torch.bfloat16\): attach it to the base it was made from, in the same dtype"):
        load(tiny_llama().bfloat16(), folder)
    with pytest.raises(FileNotFoundError, match="corda.safetensors does not exist"):
        load(tiny_llama(), tmp_path)
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if "up_proj.lora_B" not in key}, weights)
    with pytest.raises(ValueError, match=r"lacks .*up_proj.lora_B.weight"):
        load(tiny_llama(), folder)
    save_file(state, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged .* take an earlier checkpoint"):
        load(tiny_llama(), folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected the weights of an adapter"):
        load(tiny_llama(), folder)


def test_files_that_were_not_saved_together_are_refused(tmp_path: Path) -> None:
    """As a save that is killed between its two renames leaves them, or a folder that somebody put together."""
    adapter_plan = planned(tiny_llama())
    first = save(trained(attach(tiny_llama(), adapter_plan)), tmp_path / "first")
    second = save(trained(trained(attach(tiny_llama(), adapter_plan))), tmp_path / "second")
    for name in ("adapter_model.safetensors", "corda.safetensors"):
        mixed = shutil.copytree(first, tmp_path / f"mixed-{name}")
        shutil.copy(second / name, mixed / name)
        with pytest.raises(ValueError, match=r"was not saved together with corda\.safetensors"):
            load(tiny_llama(), mixed)
    save_attachment(attachment_of(attach(tiny_llama(), adapter_plan)), first / "corda.safetensors")  # of a run before its first step
    with pytest.raises(ValueError, match=r"was not saved together with corda\.safetensors"):
        load(tiny_llama(), first)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_weights_that_are_not_finite_or_of_another_shape_are_refused(name: str, tmp_path: Path) -> None:
    folder = save(trained(attach(tiny_llama(), planned(tiny_llama()))), tmp_path)
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    key = next(key for key in state if name in key)
    for spoilt, sentence in ((state[key] * float("nan"), "not finite"), (state[key][1:], "of shape"), (state[key][None], "of shape")):
        save_file({**state, key: spoilt}, weights)
        with pytest.raises(ValueError, match=rf"adapter_model\.safetensors has .*{name}.* {sentence}"):
            load(tiny_llama(), folder)


def test_an_adapter_of_the_first_version_loads_with_one_warning(tmp_path: Path) -> None:
    adapted = trained(attach(tiny_llama(), planned(tiny_llama())))
    folder = save(adapted, tmp_path)
    as_version_one(folder)
    with pytest.warns(UserWarning, match="was written by corda-vlm 0.1.0") as warned:
        again = load(tiny_llama(), folder)
    assert len([warning for warning in warned if "0.1.0" in str(warning.message)]) == 1
    assert torch.equal(logits(again), logits(adapted))


def as_version_one(folder: Path) -> None:
    """Rewrite an adapter as 0.1.0 wrote it."""
    for path in (folder / "corda.safetensors", folder / "adapter_model.safetensors"):
        tensors, metadata = read_tensors(path)
        header = json.loads(metadata.get("corda", "{}"))
        header.pop("beside", None)
        about = {"corda": json.dumps({**header, "format": 2})} if header else {"format": "pt"}
        save_file(tensors, path, about)


def test_a_deleted_adapter_leaves_nothing_behind() -> None:
    model = tiny_llama()
    base = logits(model)
    adapted = trained(attach(model, planned(tiny_llama()), adapter_name="a"))
    adapted = attach(adapted, planned(tiny_llama()), protect="strict", adapter_name="b")
    adapted.delete_adapter("a")
    adapted = attach(adapted, planned(tiny_llama()), protect="strict", adapter_name="a")
    assert torch.equal(logits(adapted), base)


def test_whole_modules_belong_to_their_adapter() -> None:
    model = tiny_llama()
    adapted = trained(attach(model, planned(tiny_llama()), train_fully=["model.norm"]))
    expected = logits(adapted)
    adapted = trained(attach(adapted, planned(tiny_llama()), train_fully=["model.norm"], adapter_name="two"))
    adapted = attach(adapted, planned(tiny_llama()), adapter_name="three")
    adapted.set_adapter("two")
    torch.testing.assert_close(logits(merge(adapted)), expected, rtol=0, atol=1e-5)
