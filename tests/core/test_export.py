"""Parts and compressions of the change, merging in every form, and what other readers make of the files."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama, tiny_llava
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_attach import FAMILIES, IDS, logits, planned, trained
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from corda_core import attach, change_factors, collect, export, load, lora_layers, merge, plan, save, select_linears
from corda_core.export import compressed
from corda_core.linears import weight_matrix

FORMS = [("start", "offset"), ("start", "subtract"), ("strict", "offset"), ("whitened", "offset")]


def tuned(protect: str = "start", residual: str = "offset", family: str = "llama", **options: Any) -> PeftModel:
    model = FAMILIES[family]()
    return trained(attach(model, planned(model), protect=protect, residual=residual, **options))


def changes(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: (lambda A, B: B @ A)(*change_factors(layer)) for name, layer in lora_layers(model).items()}


def test_compression_is_the_best_of_its_rank_and_its_loss_is_reported() -> None:
    A, B = torch.randn(8, 30), torch.randn(20, 8)
    U, sigma, Vt = torch.linalg.svd(B.double() @ A.double())
    for rank in (1, 3, 7):
        small_A, small_B, lost = compressed(A, B, rank)
        assert (small_A.shape, small_B.shape) == ((rank, 30), (20, rank))
        torch.testing.assert_close((small_B @ small_A).double(), U[:, :rank] * sigma[:rank] @ Vt[:rank], rtol=1e-4, atol=1e-4)
        assert lost == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), rel=1e-6)
    assert compressed(A, B, 8)[2] == 0.0
    assert compressed(A, torch.zeros_like(B), 2)[2] == 0.0  # untrained: nothing is lost, nothing divided by zero


def test_compressed_export_holds_the_rank_and_the_loss(tmp_path: Path) -> None:
    model = tuned()
    whole, small = export(model, tmp_path / "whole"), export(model, tmp_path / "small", compress=3)
    assert (whole.rank, whole.mean_lost, small.rank) == (12, 0.0, 3)
    assert 0 < small.mean_lost < 1
    expected = changes(model)
    loaded = PeftModel.from_pretrained(tiny_llama(), small.folder)
    for name, change in changes(loaded).items():
        assert float((change - expected[name]).norm() / expected[name].norm()) == pytest.approx(small.lost[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("protect", "residual"), FORMS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_interpolates_between_base_and_tuned_in_every_form(protect: str, residual: str, alpha: float, tmp_path: Path) -> None:
    model = tuned(protect, residual, train_fully=["model.layers.0.input_layernorm"])
    names = select_linears(tiny_llama())
    base, ours = tiny_llama(), copy.deepcopy(model)
    expected = {name: weight_matrix(base, name) + alpha * change for name, change in changes(model).items()}
    norm = torch.lerp(
        base.model.layers[0].input_layernorm.weight, model.get_base_model().model.layers[0].input_layernorm.weight.detach(), alpha
    )
    plain = merge(ours, alpha=alpha)
    assert plain.state_dict().keys() == base.state_dict().keys()
    loaded = PeftModel.from_pretrained(tiny_llama(), export(model, tmp_path, alpha=alpha).folder).merge_and_unload()
    for merged in (plain, loaded):
        for name in names:
            torch.testing.assert_close(weight_matrix(merged, name), expected[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(merged.model.layers[0].input_layernorm.weight.data, norm)
    if alpha == 1:
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_merging_a_layer_stored_the_other_way_round() -> None:
    model = tuned(family="gpt2")
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=0, atol=1e-5)


def test_merge_takes_plain_lora_too() -> None:
    model = trained(get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])))
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=0, atol=1e-5)


TRANSFORMERS = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, base = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
model.load_adapter(folder)
reference = load_file(folder + "/reference.safetensors")
with torch.no_grad():
    print((model.eval()(input_ids=reference["ids"]).logits - reference["logits"]).abs().max().item())
"""


@pytest.mark.parametrize("compress", [None, 200])
def test_transformers_loads_the_export_in_a_new_process(compress: int | None, tmp_path: Path) -> None:
    model = tuned()
    tiny_llama().save_pretrained(tmp_path / "base")
    folder = export(model, tmp_path / "adapter", compress=compress).folder
    save_file({"ids": IDS, "logits": logits(model)}, folder / "reference.safetensors")
    command = [sys.executable, "-c", TRANSFORMERS, str(folder), str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5


def test_the_export_is_what_vllm_reads(tmp_path: Path) -> None:
    """Its rules: one scaling lora_alpha / r and no patterns, names under base_model.model., no bias, no DoRA, nothing whole."""
    model = tuned(alpha=24)
    folder = export(model, tmp_path).folder
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = changes(model)
    scaling = config["lora_alpha"] / config["r"]
    for name, change in expected.items():
        A, B = (tensors.pop(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        assert len(A) == B.shape[1] <= config["r"]
        torch.testing.assert_close(scaling * B @ A, change, rtol=1e-5, atol=1e-7)
    assert not tensors
    assert not any(config[key] for key in ("modules_to_save", "use_dora", "use_rslora")), config
    assert config["bias"] == "none"
    assert config["peft_type"] == "LORA"


def test_refusals(tmp_path: Path) -> None:
    model = tuned()
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a number from 0 .the base. to 1"):
            export(model, tmp_path, alpha=alpha)
    with pytest.raises(ValueError, match="compress is 0"):
        export(model, tmp_path, compress=0)
    with pytest.raises(ValueError, match="no LoRA adapter named 'x'"):
        merge(model, adapter_name="x")
    name, layer = next(iter(lora_layers(model).items()))
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}: the trained weights are not finite"):
        merge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "lora_B" not in key)
    assert not any(tmp_path.iterdir())
    dora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="kind DoraLinearVariant, which is no product of two factors"):
        merge(dora)


def test_a_module_that_is_no_part_of_the_change_stays(tmp_path: Path) -> None:
    model = tuned()
    head = model.get_base_model().lm_head.weight.clone()
    merged: nn.Module = merge(model)
    assert torch.equal(merged.lm_head.weight, head)


def test_tied_weights_stay_with_the_other_module() -> None:
    config = llama_config()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    covariances = collect(model, [{"input_ids": torch.randint(2, 20, (8, 16))}], ["lm_head"])
    adapter_plan = plan(model, covariances, mode="kpm", rank=4)
    with pytest.raises(ValueError, match="lm_head, whose weight another module uses too"):
        attach(model, adapter_plan, residual="subtract")
    adapted = trained(attach(model, adapter_plan))
    expected, embedding = logits(adapted), model.model.embed_tokens.weight.detach().clone()
    plain = merge(adapted)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert torch.equal(plain.model.embed_tokens.weight, embedding)
    assert not plain.config.tie_word_embeddings


def test_an_adapter_in_training_is_not_written_over(tmp_path: Path) -> None:
    model = tuned()
    save(model, tmp_path)
    with pytest.raises(ValueError, match="holds an adapter in training"):
        export(model, tmp_path)


def test_what_is_merged_already_is_not_merged_twice() -> None:
    model = tuned()
    model.merge_adapter()
    with pytest.raises(ValueError, match="has its change in its weight already"):
        merge(model)
    model.unmerge_adapter()
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=0, atol=1e-5)


def test_a_bias_beside_the_factors_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match="q_proj has a bias beside its factors"):
        export(model, tmp_path)
    assert not any(tmp_path.iterdir())


class Tied(nn.Module):
    """Two layers of one weight, and no config."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_tied_weights_of_a_model_without_a_config() -> None:
    model, x = Tied(), torch.randn(40, 6)
    adapted = attach(model, plan(model, collect(model, [{"x": x}], ["second"]), mode="kpm", rank=2), protect="strict")
    lora_layers(adapted)["second"].lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        expected = adapted(x)
        torch.testing.assert_close(merge(adapted)(x), expected, rtol=0, atol=1e-5)


def tied(family: str) -> Any:
    """Return a model whose output layer is the embedding's, and what holds the embedding."""
    torch.manual_seed(0)
    config = llama_config() if family == "llama" else tiny_llava().config
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config) if family == "llama" else LlavaForConditionalGeneration(config)
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model.eval()


@pytest.mark.parametrize(
    ("family", "layers", "whole"),
    [
        ("llava", "model.multi_modal_projector.*", ["model.language_model"]),
        ("llama", ".*q_proj", ["model.embed_tokens"]),
        ("llama", ".*q_proj", ["lm_head"]),
        ("llama", ".*q_proj|lm_head", ["model.norm"]),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_what_is_tied_to_a_trained_module_stays_as_it_was(family: str, layers: str, whole: list[str], alpha: float, tmp_path: Path) -> None:
    model, pixels = tied(family), {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "llava" else {}
    ids = torch.cat([torch.full((2, 4), 4), IDS.clamp(min=5)], dim=1) if family == "llava" else IDS

    def outputs(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=ids, **pixels).logits

    names = select_linears(model, layers)
    adapter_plan = plan(model, collect(model, [{"input_ids": ids, **pixels}], names), mode="kpm", rank=2)
    embedding, head = (module.weight.detach().clone() for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    adapted = attach(model, adapter_plan, train_fully=whole)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        adapted(input_ids=ids, labels=ids, **pixels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.eval()
    folder = export(adapted, tmp_path / "lora", alpha=alpha).folder
    expected = outputs(adapted)
    torch.testing.assert_close(outputs(load(tied(family), save(adapted, tmp_path / "saved"))), expected, rtol=0, atol=1e-5)
    loaded = outputs(PeftModel.from_pretrained(tied(family), folder).eval())
    merged: Any = merge(adapted, alpha=alpha)
    torch.testing.assert_close(outputs(merged), loaded, rtol=0, atol=1e-5)
    if alpha == 1:
        torch.testing.assert_close(outputs(merged), expected, rtol=0, atol=1e-5)
    moved = {
        "model.language_model": (False, True),
        "model.embed_tokens": (False, True),
        "lm_head": (True, False),
        "model.norm": (True, False),
    }
    for before, now, stays in zip(
        (embedding, head), (merged.get_input_embeddings(), merged.get_output_embeddings()), moved[whole[0]], strict=True
    ):
        assert torch.equal(now.weight, before) is stays
    assert not merged.config.tie_word_embeddings
    assert not any(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(type(merged).from_pretrained(tmp_path / "plain").eval()), outputs(merged), rtol=0, atol=1e-6)


class Twice(nn.Module):
    """One layer in two places, and one whose weight another has by its memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.third, self.fourth = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fourth.weight = nn.Parameter(self.third.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fourth(self.third(self.second(self.first(x).relu())).relu())


@pytest.mark.parametrize(("layers", "whole"), [(["first", "third"], []), (["fourth"], ["first"]), (["first"], ["third"])])
def test_a_module_in_two_places_changes_in_the_one_that_trained(layers: list[str], whole: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(40, 6)
    adapter_plan = plan(model, collect(model, [{"x": x}], layers), mode="kpm", rank=2)
    with pytest.raises(ValueError, match="whose weight another module uses too"):
        attach(model, adapter_plan, residual="subtract")
    adapted = attach(model, adapter_plan, protect="strict", train_fully=whole)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    with torch.no_grad():
        expected = adapted(x)
        with pytest.raises(ValueError, match=r"PEFT would merge into the weight of .*merge with corda_core\.merge"):
            adapted.merge_and_unload()
        with pytest.raises(ValueError, match="PEFT would merge into the weight"):
            adapted.merge_adapter()
        torch.testing.assert_close(merge(adapted)(x), expected, rtol=0, atol=1e-5)


def test_weights_tied_within_a_module_that_trains_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Tied()), torch.randn(40, 6)
    adapted = attach(model, plan(model, collect(model, [{"input": x}], ["0"]), mode="kpm", rank=2), train_fully=["1"])
    adapted.get_base_model()[1].first.weight.data.normal_()
    with torch.no_grad():
        expected = adapted(x)
        save(adapted, tmp_path / "saved")
        export(adapted, tmp_path / "lora")
        plain: Any = merge(adapted)
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-5)
    assert plain[1].first.weight is plain[1].second.weight
