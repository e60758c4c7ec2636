"""Plans: ranks, warnings, errors that name the layer, provenance."""

import warnings

import pytest
import torch
from conftest import tiny_llama

from corda_core import Covariance, collect, plan, select_linears
from corda_core.bases import base_digest


def covariances(model: torch.nn.Module, tokens: int = 64) -> dict[str, Covariance]:
    return collect(model, [{"input_ids": torch.randint(5, 20, (4, tokens // 4))}], select_linears(model))


def test_every_layer_gets_its_factors() -> None:
    model = tiny_llama()
    adapter_plan = plan(model, covariances(model), mode="kpm", rank=4)
    assert set(adapter_plan.layers) == set(select_linears(model))
    for name, init in adapter_plan.layers.items():
        m, n = model.get_submodule(name).weight.shape
        assert (init.A0.shape, init.B0.shape, init.rank) == ((4, n), (m, 4), 4)
        assert init.sigma.shape == (4,)
        assert init.components == slice(min(m, n) - 4, min(m, n))
        assert init.num_tokens == 64
    assert adapter_plan.provenance["base_digest"] == base_digest(model, adapter_plan.layers)


def test_rank_is_clipped_where_a_layer_is_smaller_and_said_once() -> None:
    model = tiny_llama()
    with pytest.warns(UserWarning, match=r"rank 24 is larger than min\(m, n\) of 4 layer") as caught:
        adapter_plan = plan(model, covariances(model), mode="ipm", rank=24)
    assert len(caught) == 1
    assert {init.rank for init in adapter_plan.layers.values()} == {16, 24}


def test_few_tokens_are_warned_about() -> None:
    model = tiny_llama()
    with pytest.warns(UserWarning, match="saw 16 tokens but has 32 inputs"):
        plan(model, covariances(model, tokens=16), mode="kpm", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, covariances(model, tokens=64), mode="kpm", rank=2)


def test_errors_name_the_layer() -> None:
    model = tiny_llama()
    bad = covariances(model)
    bad["model.layers.1.mlp.up_proj"] = Covariance.of(torch.zeros(32, 32), 64)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*all zero"):
        plan(model, bad, mode="kpm", rank=2)
    with pytest.raises(ValueError, match="rank is 0"):
        plan(model, bad, mode="kpm", rank=0)
