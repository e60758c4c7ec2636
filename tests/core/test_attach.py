"""The adapter on PEFT: identical start, what trains, export, merge, refusals."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from corda_core import (
    AdapterPlan,
    attach,
    change_factors,
    collect,
    context_drift,
    export,
    load,
    lora_layers,
    plan,
    save,
    select_linears,
    weight_change,
)
from corda_core.bases import base_digest
from corda_core.plan import random_plan

RANK = 6
IDS = torch.arange(2, 20).reshape(2, 9)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=25, n_positions=64, n_embd=24, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3)
    return GPT2LMHeadModel(config).eval()


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def planned(model: nn.Module, mode: str = "kpm", rank: int = RANK) -> AdapterPlan:
    covariances = collect(model, [{"input_ids": torch.randint(2, 20, (8, 16))}], select_linears(model))
    return plan(model, covariances, mode=mode, rank=rank, whiten=mode == "kpm")


def trained(model: PeftModel, steps: int = 5) -> PeftModel:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "protect", "alpha"), [("kpm", "start", None), ("ipm", "start", 24), ("kpm", "strict", None), ("kpm", "whitened", None)]
)
def test_start_is_bit_identical_and_the_base_untouched(family: str, dtype: torch.dtype, mode: str, protect: str, alpha: int | None) -> None:
    model = FAMILIES[family]().to(dtype)
    expected, digest = logits(model), base_digest(model, select_linears(model))
    names = select_linears(model)
    adapted = attach(model, planned(model, mode), protect=protect, alpha=alpha)
    assert torch.equal(logits(adapted), expected)
    trained(adapted)
    assert not torch.equal(logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)
    assert base_digest(adapted.unload(), names) == digest


def test_start_is_bit_identical_for_inputs_that_are_not_contiguous() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(48, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x[:, 1:])

    model, x = Sliced(), torch.randn(6, 9, 48)
    with torch.no_grad():
        expected = model(x)
        adapted = attach(model, plan(model, collect(model, [{"x": x}], ["proj"]), mode="kpm", rank=8))
        assert torch.equal(adapted(x), expected)


def test_change_is_the_formula() -> None:
    """W x + s (B A x − B0 A0 x), against dense float64 matrices."""
    model = tiny_llama()
    made = planned(model)
    adapted = trained(attach(model, made, alpha=2 * RANK))
    for name, layer in lora_layers(adapted).items():
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        init, x = made.layers[name], torch.randn(5, layer.in_features)
        product = made.layers[name].B0.double() @ init.A0.double()  # s A0 B0 is the planned component whatever alpha is
        expected = x.double() @ (layer.get_base_layer().weight.double() + 2 * B @ A - product).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
        A1, B1 = change_factors(layer)
        torch.testing.assert_close((B1 @ A1).double(), 2 * B @ A - product, rtol=1e-4, atol=1e-5)


def test_strict_trains_b_only_even_after_switching_adapters() -> None:
    model = tiny_llama()
    made = planned(model)
    adapted = attach(model, made, protect="strict")
    adapted.set_adapter("default")
    trained(adapted)
    for name, layer in lora_layers(adapted).items():
        assert torch.equal(layer.lora_A["default"].weight, made.layers[name].A0)
        assert not layer.lora_A["default"].weight.requires_grad
        assert layer.lora_B["default"].weight.abs().max() > 0
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(i.B0.numel() for i in made.layers.values())


def test_a_random_start_is_pefts_plain_lora(tmp_path: Path) -> None:
    """With the same A it takes the very steps that PEFT's takes, its folder is one that plain PEFT reads, and ours reads it again."""
    model, names = tiny_llama(), select_linears(tiny_llama())
    adapted = attach(model, random_plan(model, names, RANK, seed=3), protect="none", alpha=2 * RANK)
    assert torch.equal(logits(adapted), logits(tiny_llama()))
    peer = get_peft_model(tiny_llama(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(names)))
    for name, layer in lora_layers(peer).items():
        start = lora_layers(adapted)[name].lora_A["default"].weight
        assert float(start.abs().max()) <= layer.in_features**-0.5
        assert float(start.std()) == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.25)
        layer.lora_A["default"].weight.data.copy_(start)
    trained(adapted)
    trained(peer)
    for name, layer in lora_layers(peer).items():
        for mine, other in ((getattr(lora_layers(adapted)[name], key), getattr(layer, key)) for key in ("lora_A", "lora_B")):
            assert torch.equal(mine["default"].weight, other["default"].weight)
    save(adapted, tmp_path)
    assert torch.equal(logits(load(tiny_llama(), tmp_path).eval()), logits(peer))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(peer))


def test_a_random_start_depends_on_seed_and_name_and_protects_nothing() -> None:
    model, names = tiny_llama(), select_linears(tiny_llama())
    first, same, other = (random_plan(model, some, 4, seed=seed) for some, seed in ((names, 0), (names[3:], 0), (names, 1)))
    assert all(torch.equal(same.layers[name].A0, first.layers[name].A0) for name in same.layers)
    assert not any(torch.equal(other.layers[name].A0, first.layers[name].A0) for name in names)
    assert len({init.A0.flatten()[0].item() for init in first.layers.values()}) == len(names)
    for protect in ("strict", "start", "whitened"):
        with pytest.raises(ValueError, match="nothing to protect or to subtract"):
            attach(model, first, protect=protect)
    with pytest.raises(ValueError, match='mode="lora" starts at random and decomposes nothing'):
        planned(model, "lora")
    with pytest.raises(ValueError, match="rank is 0"):
        random_plan(model, names, 0)


def test_whitened_starts_where_strict_does_and_trains_in_short_coordinates() -> None:
    """W x + s B Ã P x, against dense float64 matrices; and what it changes on the context is s √μ₀ ‖B Ã‖."""
    model = tiny_llama()
    names = select_linears(model)
    covariances = collect(model, [{"input_ids": torch.randint(2, 20, (16, 32))}], names)
    made = plan(model, covariances, mode="kpm", rank=RANK, whiten=True)
    adapted = attach(model, made, protect="whitened", alpha=2 * RANK)
    for name, layer in lora_layers(adapted).items():
        torch.testing.assert_close(change_factors(layer)[0], made.layers[name].A0, rtol=1e-3, atol=1e-4)
    trained(adapted)
    for name, layer in lora_layers(adapted).items():
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert not torch.allclose(change_factors(layer)[0], made.layers[name].A0, atol=1e-3)
        white = made.layers[name].whitening
        assert white is not None
        change = 2 * B.double() @ (A @ white.apply(torch.eye(layer.in_features))).double()
        x = torch.randn(5, layer.in_features)
        expected = x.double() @ (layer.get_base_layer().weight.double() + change).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
        damped = covariances[name].damped(0.01).dense(torch.float64, torch.device("cpu"))
        drift = float((change @ torch.linalg.cholesky(damped)).norm())
        assert drift == pytest.approx(2 * white.unit * float((B @ A).norm()), rel=0.11)


def test_start_trains_a_and_b_in_every_layer() -> None:
    model = tiny_llama()
    adapted = attach(model, planned(model))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for layer in lora_layers(adapted).values():
        assert layer.lora_A["default"].weight.grad.abs().max() > 0
        assert layer.lora_B["default"].weight.grad.abs().max() > 0
        assert not layer.lora_A0["default"].requires_grad


def test_subtract_is_the_papers_form() -> None:
    model = tiny_llama()
    made, before = planned(model), copy.deepcopy(model)
    expected = logits(model)
    adapted = attach(model, made, residual="subtract")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    for name, layer in lora_layers(adapted).items():
        init = made.layers[name]
        torch.testing.assert_close(layer.get_base_layer().weight, before.get_submodule(name).weight - init.B0 @ init.A0)


LOAD = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, base = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
assert "corda_core" not in sys.modules
reference = load_file(folder + "/reference.safetensors")
with torch.no_grad():
    print((model(input_ids=reference["ids"]).logits - reference["logits"]).abs().max().item())
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("protect", "residual", "alpha"),
    [("start", "offset", None), ("strict", "offset", 9), ("start", "subtract", 3), ("whitened", "offset", None)],
)
def test_export_is_an_ordinary_lora_in_a_new_process(family: str, protect: str, residual: str, alpha: int | None, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    adapted = trained(attach(model, planned(model, rank=20), protect=protect, residual=residual, alpha=alpha))
    folder = export(adapted, tmp_path / "adapter").folder
    save_file({"ids": IDS, "logits": logits(adapted)}, folder / "reference.safetensors")
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), str(tmp_path / "base")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
    assert {file.name for file in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "reference.safetensors"}
    ranks = {len(value) for key, value in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key}
    assert max(ranks) == (40 if protect == "start" else 20)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("protect", "safe"), [("start", True), ("start", False), ("strict", True), ("whitened", True)])
def test_merge_and_unmerge(family: str, protect: str, safe: bool) -> None:
    model = FAMILIES[family]()
    adapted = trained(attach(model, planned(model), protect=protect))
    expected = logits(adapted)
    adapted.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
    plain = adapted.merge_and_unload(safe_merge=safe)
    assert not lora_layers(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("protect", ["start", "whitened"])
def test_raw_save_of_what_is_no_plain_lora_is_refused_by_peft_not_misread(protect: str, tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, planned(model), protect=protect).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="corda_core.export"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_context_drift_is_the_dense_ratio() -> None:
    model = tiny_llama()
    names = select_linears(model)
    covariances = collect(model, [{"input_ids": torch.randint(2, 20, (8, 16))}], names)
    adapted = attach(model, plan(model, covariances, mode="kpm", rank=RANK))
    assert max(context_drift(adapted, covariances).values()) < 1e-5
    trained(adapted)
    for name, found in context_drift(adapted, covariances).items():
        layer = lora_layers(adapted)[name]
        values, vectors = torch.linalg.eigh(covariances[name].matrix.double())
        root = vectors * values.clamp(min=0).sqrt()
        A, B = change_factors(layer)
        expected = (B.double() @ A.double() @ root).norm() / (layer.get_base_layer().weight.double() @ root).norm()
        assert found == pytest.approx(expected.item(), rel=1e-3)


def test_weight_change_is_the_dense_ratio() -> None:
    adapted = attach(tiny_llama(), planned(tiny_llama()))
    assert max(weight_change(adapted).values()) < 1e-6
    trained(adapted)
    for name, found in weight_change(adapted).items():
        layer = lora_layers(adapted)[name]
        A, B = change_factors(layer)
        assert found == pytest.approx(float((B @ A).norm() / layer.get_base_layer().weight.norm()), rel=1e-4)


def test_refusals() -> None:
    model = tiny_llama()
    made, ipm = planned(model), planned(model, "ipm")
    with pytest.raises(ValueError, match="strict.*kpm"):
        attach(model, ipm, protect="strict")
    with pytest.raises(ValueError, match="goes with mode.*nothing to subtract"):
        attach(model, made, protect="strict", residual="subtract")
    with pytest.raises(ValueError, match="whitened.*kpm"):
        attach(model, ipm, protect="whitened")
    bare = {name: dataclasses.replace(init, whitening=None) for name, init in made.layers.items()}
    with pytest.raises(ValueError, match="whiten=True"):
        attach(model, dataclasses.replace(made, layers=bare), protect="whitened")
    with pytest.raises(ValueError, match="protect is 'hard'"):
        attach(model, made, protect="hard")
    with pytest.raises(ValueError, match="residual is 'none'"):
        attach(model, made, residual="none")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="attach it to the base it was made from"):
        attach(model, made)
    with pytest.raises(ValueError, match="no LoRA adapter named 'other'"):
        export(attach(tiny_llama(), made), "unused", adapter_name="other")


def test_a_plan_for_another_architecture_is_refused() -> None:
    made = planned(tiny_llama())
    with pytest.raises(ValueError, match=r"made for another model: this one has no layer model\.layers\.0"):
        attach(tiny_gpt2(), made)
