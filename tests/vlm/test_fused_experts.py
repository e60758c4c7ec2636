"""Fused experts through ``prepare``: asked for by name, in a model that sees, in parts, with a keep file, and in the dry run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import image_of, text, tiny_model
from torch import Tensor
from typer.testing import CliRunner

import corda_vlm
from corda_core import attachment_of, lora_layers, save_covariances, select_linears
from corda_core.linears import expert_of
from corda_vlm import CordaConfig
from corda_vlm.cli import app
from corda_vlm.coverage import coverage
from corda_vlm.prepare import collect_context
from corda_vlm.towers import _pattern, image_tokens, select_layers
from corda_vlm.training.memory import _activation_sizes, size

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*larger than min", "ignore:.*matrices of experts saw no token")
KIND = "qwen3_vl_moe"


def seeing() -> Any:
    return tiny_model(KIND, "Qwen3VLMoeForConditionalGeneration")


def rows(model: Any) -> list[dict[str, Tensor]]:
    """Return four rows of text behind an image."""
    token = image_tokens(model)[0]
    batches = []
    for seed in range(4):
        image = image_of(KIND, model, seed)
        ids = torch.cat([torch.tensor([[model.config.vision_start_token_id, *[token] * 4]]), text(seed, 16)], dim=1)
        types = torch.zeros_like(ids).masked_fill(ids == token, 1)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **image})
    return batches


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_a_model_that_sees_is_adapted_in_its_experts() -> None:
    model = seeing()
    batches = rows(model)
    before = logits(model, batches[0])
    adapted = corda_vlm.prepare(model, batches, targets=["attention", "experts"], rank=2)
    assert torch.equal(logits(adapted, batches[0]), before)
    planned = attachment_of(adapted).plan.layers
    assert {expert_of(name).parameter for name in planned if expert_of(name)} == {"gate_up_proj", "down_proj"}  # type: ignore[union-attr]
    assert any(".self_attn." in name for name in planned)
    assert attachment_of(adapted).protect == "strict"
    adapted.train()(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    experts = [p.grad for name, p in adapted.named_parameters() if "experts" in name and p.requires_grad]
    assert len(experts) == 4
    assert all(grad is not None and grad.any() for grad in experts)


def test_tokens_parts_and_files_give_what_they_should(tmp_path: Path) -> None:
    model = seeing()
    batches = rows(model)
    whole = collect_context(model, batches, CordaConfig(targets="experts"))
    apart = [collect_context(model, batches, CordaConfig(targets="experts", tokens=kind)) for kind in ("image", "text")]
    for name, covariance in whole.items():
        counted = [part[name] for part in apart if name in part]
        assert covariance.num_tokens == sum(part.num_tokens for part in counted)
        total = sum(part.num_tokens * part.matrix for part in counted)
        torch.testing.assert_close(covariance.num_tokens * covariance.matrix, total, rtol=1e-4, atol=1e-5)
    size = 4 * 32 * 33 // 2
    in_parts = collect_context(model, batches, CordaConfig(targets="experts", max_memory=3 * size))
    assert in_parts.keys() == whole.keys()
    assert all(torch.equal(in_parts[name].matrix, covariance.matrix) for name, covariance in whole.items())
    path = tmp_path / "keep.safetensors"
    save_covariances(whole, path, model=model, data="", options={})
    adapted = corda_vlm.prepare(model, path, targets="experts", rank=2)
    assert attachment_of(adapted).plan.layers.keys() == whole.keys()


def test_experts_are_asked_for() -> None:
    model = seeing()
    none = select_layers(model)
    assert not any(map(expert_of, none))
    share = coverage(model, none)
    assert share.stacked > 0
    assert 'which get no adapter, as targets does not name "experts".' in str(share)
    assert coverage(model, select_layers(model, targets="experts")).stacked == 0
    both = select_layers(model, targets=["attention", "experts"])
    assert {*both} == {*select_layers(model, targets="attention"), *select_layers(model, targets="experts")}
    adapted = corda_vlm.prepare(model, rows(model), mode="lora", targets="experts", rank=2)
    assert len(lora_layers(adapted)) == len(select_layers(seeing(), targets="experts"))


def test_each_entry_of_a_list_stands_for_itself() -> None:
    model = tiny_model("qwen2_moe", "Qwen2MoeForCausalLM")
    mlp = {*select_layers(model, targets="mlp")}
    names = {*select_layers(model, targets=["mlp", "experts.down_proj"])}
    assert names - mlp == {*select_layers(model, targets=["experts.down_proj"])} != set()
    everything = select_layers(model, targets=["mlp", "experts", "attention"])
    without = select_layers(model, targets=["mlp", "experts", "attention"], exclude=["attention", "experts.down_proj"])
    assert {*everything} - {*without} == {*select_layers(model, targets=["attention", "experts.down_proj"])}
    for option in ("targets", "exclude"):
        wrong: dict[str, Any] = {option: ["attention", "q_prjo"]}
        with pytest.raises(ValueError, match=rf"{option}: 'q_prjo' matches no linear layer; closest: .*proj"):
            select_layers(model, **wrong)
    model = tiny_model("deepseek_v2", "DeepseekV2ForCausalLM")
    assert not any(map(expert_of, select_linears(model, _pattern(["mlp", "shared_experts.up_proj"]))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "ipm"}, "whose adapter PEFT cannot hold with protect='start'"),
        ({"protect": "whitened"}, "whose adapter PEFT cannot hold with protect='whitened'"),
        ({"quantize": "nf4"}, "quantize='nf4'"),
        ({"budget": "rank"}, "no budget can be spread and no candidate chosen"),
        ({"candidates": 2}, "no budget can be spread and no candidate chosen"),
    ],
)
def test_what_experts_cannot_have_is_refused(options: dict[str, Any], said: str) -> None:
    model = seeing()
    with pytest.raises(ValueError, match=said):
        corda_vlm.prepare(model, rows(model), targets="experts", rank=2, **options)


def test_the_dry_run_counts_a_covariance_and_a_copy_of_each_expert(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model("qwen3_moe", "Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    stacks = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    recipe = {
        "model": {"path": str(tmp_path / "base"), "dtype": "float32"},
        "data": {"source": str(tmp_path / "rows.json")},
        "context": {"source": str(tmp_path / "rows.json")},
        "corda": {"targets": "experts", "rank": 2},
        "output": str(tmp_path / "output"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    covariances = sum(len(p) * 4 * p.shape[2] * (p.shape[2] + 1) // 2 for p in stacks.values())
    trained = sum(len(p) * 2 * p.shape[1] for p in stacks.values())
    frozen = sum(len(p) * 2 * p.shape[2] for p in stacks.values())
    covered, training, copies = (
        size(count) for count in (covariances, 4 * (frozen + 4 * trained), 4 * sum(p.numel() for p in stacks.values()))
    )
    assert f"while preparing: covariances {covered}," in result.output
    assert f"adapters, gradients and optimiser {training}, a copy of the experts {copies}, activations" in result.output


def test_a_token_leaves_activations_in_the_experts_that_it_is_routed_to() -> None:
    model = tiny_model("qwen3_moe", "Qwen3MoeForCausalLM")
    names = select_layers(model, targets=["attention", "experts"])
    kept, *_ = _activation_sizes(model, {name: (1, 1) for name in names})
    modules = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    stacks = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    linear = sum(sum(module.weight.shape) for module in modules)
    assert kept == linear + model.config.num_experts_per_tok * sum(sum(stack.shape[1:]) for stack in stacks)
    assert len(stacks) == 4
    assert model.config.num_experts_per_tok > 1
