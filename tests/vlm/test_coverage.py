"""What share of a model is adapted is always told, and why the rest is not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import WORDS, tiny_llama, tiny_llava
from families import TEXT
from torch import nn
from typer.testing import CliRunner

import corda_vlm
from corda_core import lora_layers
from corda_core.linears import weight_matrix
from corda_vlm.cli import app
from corda_vlm.coverage import coverage
from corda_vlm.towers import family_of

MIXED = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def mixed(kind: str) -> Any:
    """Return a language model of four fused experts a layer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, "vocab_size": len(WORDS), **MIXED[kind]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*larger than min")
def test_fused_experts_are_told_of(kind: str, tokenizer: Any) -> None:
    model = mixed(kind)
    share = coverage(model, corda_vlm.select_layers(model))
    assert share.total == sum(parameter.numel() for parameter in model.parameters())
    assert share.stacked == sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 3)
    assert share.stacked > 0.6 * share.total
    assert share.adapted == sum(weight_matrix(model, name).numel() for name in corda_vlm.select_layers(model))
    sentence = (
        rf"{share.adapted / share.total:.1%} of the {share.total:,} parameters of language .* fused experts, 3-D weights such as .*experts"
    )
    texts = [(None, "a red circle in this shape is blue"), (None, "what color is the shape ?")] * 4
    with pytest.warns(UserWarning, match=sentence):
        corda_vlm.prepare(model, texts, processor=tokenizer, rank=2)


def test_the_share_is_logged_where_nothing_is_missed(processor: Any, samples: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llava()
    parts = ("vision", "language")
    counted = [parameter for name, parameter in model.named_parameters() if family_of(model).part_of(name) in parts]
    with caplog.at_level(logging.INFO, "corda_vlm"):
        adapted = corda_vlm.prepare(model, samples, processor=processor, rank=2, parts=parts)
    linears = [weight_matrix(adapted.get_base_model(), name).numel() for name in lora_layers(adapted)]
    total = sum(parameter.numel() for parameter in counted)
    assert f"{sum(linears) / total:.1%} of the {total:,} parameters of vision and language are in adapted layers." in caplog.text
    assert coverage(model.cpu(), [], parts).stacked == 0  # neither are convolutions stacks, nor embeddings of positions


def test_what_is_tied_counts_once_and_what_is_no_stack_is_none() -> None:
    model = tiny_llama()
    alone = coverage(model, ["lm_head"])
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = coverage(model, ["lm_head"])
    assert (alone.total - tied.total, tied.adapted) == (len(WORDS) * 32, len(WORDS) * 32)
    model.model.extra = nn.Module()
    model.model.extra.positions = nn.Parameter(torch.zeros(1, 9, 32))
    model.model.extra.conv = nn.Conv1d(8, 8, 3)
    assert coverage(model, ["lm_head"]).stacked == 0


def test_the_dry_run_tells_it(tmp_path: Path, tokenizer: Any) -> None:
    for name, model in (("experts", mixed("Mixtral")), ("plain", tiny_llama())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        recipe = {
            "model": {"path": str(tmp_path / name), "dtype": "float32"},
            "data": {"source": str(tmp_path / "rows.json")},
            "context": {"source": str(tmp_path / "rows.json")},
            "output": str(tmp_path / "output"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "recipe.yaml"), "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "parameters of language are in adapted layers" in result.output
        assert ("fused experts, 3-D weights such as model.layers.0" in result.output) is (name == "experts")
