"""Choosing covariances for all layers of a model."""

import gc
import math
import re
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from corda_core import Covariance, choose, collect, plan, select_linears
from corda_core.decompose import spectrum
from corda_core.linears import weight_matrix


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


def some_set(model: nn.Module, seed: int, tokens: int = 160) -> dict[str, Covariance]:
    ids = torch.randint(2, 20, (tokens // 8, 8), generator=torch.Generator().manual_seed(seed))
    return collect(model, [{"input_ids": ids}], select_linears(model))


def test_each_layer_gets_the_covariance_with_the_lowest_score(model: nn.Module) -> None:
    sets = [some_set(model, seed) for seed in range(4)]
    covariances, choices = choose(model, sets)
    places = set()
    for name in select_linears(model):
        W = model.get_submodule(name).weight.detach().double()
        scores = []
        for candidate in sets:
            C = candidate[name].matrix.double()
            C = C / C.diagonal().mean() + 0.01 * torch.eye(len(C))
            values, sigma = torch.linalg.eigvalsh(C), torch.linalg.svdvals(W @ C)
            scores.append(math.log(math.sqrt(len(W) * float(values[-1])) / float(values[0])) * float(sigma.sum() / sigma[0]))
        assert [candidate.score for candidate in choices[name].candidates] == pytest.approx(scores, rel=1e-4)
        assert choices[name].index == scores.index(min(scores))
        assert covariances[name] is sets[choices[name].index][name]
        assert choices[name].best is choices[name].candidates[choices[name].index]
        places.add(choices[name].index)
    assert len(places) > 1


def test_of_equal_candidates_the_first_is_chosen(model: nn.Module) -> None:
    covariances = some_set(model, 0)
    _, choices = choose(model, [covariances, dict(covariances), dict(covariances)])
    assert {choice.index for choice in choices.values()} == {0}


def test_only_the_chosen_spectra_are_in_full(model: nn.Module) -> None:
    sets = [some_set(model, seed) for seed in range(3)]
    _, choices = choose(model, sets)
    covariances, full = choose(model, sets, in_full=True)
    for name, choice in choices.items():
        assert full[name].index == choice.index
        for number, (before, after) in enumerate(zip(choice.candidates, full[name].candidates, strict=True)):
            assert torch.equal(after.spectrum, before.spectrum) or number == choice.index
        expected = spectrum(weight_matrix(model, name), covariances[name])
        torch.testing.assert_close(full[name].best.spectrum, expected, rtol=0, atol=0)


def test_only_the_best_so_far_and_the_next_are_in_memory(model: nn.Module) -> None:
    alive: list[weakref.ref[Covariance]] = []
    most = 0

    def sets() -> Iterator[dict[str, Covariance]]:
        nonlocal most
        for seed in range(5):
            covariances = some_set(model, seed)
            alive.extend(weakref.ref(C) for C in {id(C): C for C in covariances.values()}.values())
            gc.collect()
            most = max(most, sum(C() is not None for C in alive))
            yield covariances
            del covariances

    chosen, _ = choose(model, sets())
    layers = len(chosen)
    distinct = len({id(C) for C in some_set(model, 0).values()})
    assert most <= layers + distinct  # at worst a chosen one for every layer, and the next set
    del chosen
    gc.collect()
    assert not any(C() for C in alive)


def test_a_plan_of_given_ranks(model: nn.Module) -> None:
    covariances = some_set(model, 0)
    ranks = {name: 1 + place % 5 for place, name in enumerate(covariances)}
    adapter_plan = plan(model, covariances, mode="kpm", rank=4, ranks=ranks)
    assert {name: init.rank for name, init in adapter_plan.layers.items()} == ranks
    assert adapter_plan.rank == 4
    assert adapter_plan.num_parameters == sum(r * sum(model.get_submodule(name).weight.shape) for name, r in ranks.items())
    with pytest.raises(ValueError, match="at least 1 for each layer"):
        plan(model, covariances, mode="kpm", rank=4, ranks={**ranks, next(iter(ranks)): 0})
    missing = ranks.popitem()[0]
    with pytest.raises(ValueError, match=rf"ranks has none for {re.escape(missing)}"):
        plan(model, covariances, mode="kpm", rank=4, ranks=ranks)
    _, choices = choose(model, [covariances])
    del choices[missing]
    with pytest.raises(ValueError, match=rf"choices has none for {re.escape(missing)}"):
        plan(model, covariances, mode="kpm", rank=4, choices=choices)


def test_mistakes_get_one_clear_sentence(model: nn.Module) -> None:
    first, second = some_set(model, 0), some_set(model, 1)
    second.pop("model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"Candidate 1 has other layers than candidate 0: model\.layers\.1\.mlp\.up_proj"):
        choose(model, [first, second])
    with pytest.raises(ValueError, match="no candidates"):
        choose(model, [])
    name = "model.layers.0.mlp.down_proj"
    nothing = Covariance.of(torch.zeros(first[name].packed.n, first[name].packed.n), first[name].num_tokens)
    with pytest.raises(ValueError, match=r"Candidate 1: model\.layers\.0\.mlp\.down_proj: the covariance has trace 0"):
        choose(model, [first, {**first, name: nothing}])
    with pytest.raises(ValueError, match="candidate 1 saw 16 tokens for 32 inputs"):
        choose(model, [first, some_set(model, 1, tokens=16)])
