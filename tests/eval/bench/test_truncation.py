"""The truncation study: what is dropped, and that nothing stays dropped."""

import torch
from conftest import tiny_llama

from corda_core import collect, decompose, select_linears
from corda_core.files import weight_digest
from corda_core.layers import no_progress, over_layers
from corda_eval.bench.truncation import _smallest, _without, by_method, library_code


def test_the_smallest_components_go_and_come_back() -> None:
    model = tiny_llama()
    names = select_linears(model)
    covariances = collect(model, [{"input_ids": torch.randint(5, 20, (8, 16))}], names)
    before = weight_digest(model.state_dict())
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    bases = over_layers(model, names, _smallest(covariances, 0.01, most=6), no_progress, "")
    with torch.no_grad(), _without(model, bases, 4):
        for name in names:
            U = decompose(weights[name], covariances[name], 4, "kpm", solver="exact").basis.float()
            torch.testing.assert_close(model.get_submodule(name).weight, weights[name] - U @ (U.T @ weights[name]), rtol=1e-4, atol=1e-5)
        assert weight_digest(model.state_dict()) != before
    assert weight_digest(model.state_dict()) == before


def test_another_domain_comes_with_python() -> None:
    code = library_code()
    assert code.count("\ndef ") > 100


def test_table() -> None:
    figures = {"dropped": [0, 8], "perplexity": {"manual": {"CorDA": [14.06, 15.0], "plain SVD": [14.06, 60796.2]}}}
    assert "| plain SVD | 14.1 | 60,796.2 |" in by_method(figures)
