"""Selection of layers, orientation of weights, digests."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from corda_core import select_linears
from corda_core.bases import base_digest
from corda_core.files import weight_digest
from corda_core.linears import weight_matrix


def test_takes_all_linears_but_the_output_layer() -> None:
    names = select_linears(tiny_llama())
    assert len(names) == 14
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 4), ("model.layers.0.mlp.*", 3), (["layers.1.mlp.up_proj"], 1), (["lm_head"], 1)],
)
def test_targets_as_in_peft(targets: str | list[str], count: int) -> None:
    assert len(select_linears(tiny_llama(), targets)) == count


def test_exclude() -> None:
    assert len(select_linears(tiny_llama(), ["q_proj"], exclude="model.layers.0.*")) == 1


def test_a_pattern_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"'qproj' matches no linear layer; closest: .*q_proj"):
        select_linears(tiny_llama(), ["k_proj", "qproj"])
    with pytest.raises(ValueError, match="exclude"):
        select_linears(tiny_llama(), ["k_proj"], exclude=["nothing"])
    with pytest.raises(ValueError, match="No linear layer is left"):
        select_linears(tiny_llama(), ["k_proj"], exclude=["k_proj"])


def test_weight_matrix_is_outputs_by_inputs() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 5), "conv": Conv1D(5, 3), "norm": nn.LayerNorm(3)})
    assert weight_matrix(model, "linear").shape == weight_matrix(model, "conv").shape == (5, 3)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        weight_matrix(model, "norm")
    model["linear"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="packed"):
        weight_matrix(model, "linear")


def test_digest_tells_one_bit() -> None:
    model = tiny_llama().to(torch.bfloat16)
    names = select_linears(model)
    digest = base_digest(model, names)
    assert digest == base_digest(tiny_llama().to(torch.bfloat16), names)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(torch.int16)[0, 0] ^= 1
    assert digest != base_digest(model, names)
    assert weight_digest({"a": torch.zeros(2)}) != weight_digest({"b": torch.zeros(2)})


def test_core_stands_alone() -> None:
    code = "import corda_core, sys; print([m for m in sys.modules if m.startswith(('corda_vlm', 'corda_eval'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
