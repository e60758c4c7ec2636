"""CorDA++ on spectra and matrices, against dense references and the algorithms as printed."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_core import Covariance
from corda_core.allocate import Candidate, allocate_ranks, anisotropy, assess, compactness
from corda_core.decompose import spectrum


def covariance(n: int, seed: int = 0, decay: float = 2.0) -> Covariance:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * n, n, generator=generator) * torch.logspace(0, -decay, n)
    return Covariance.of(rows.T @ rows / len(rows), len(rows))


def dense_damped(one: Covariance, damping: float = 0.01) -> Tensor:
    """C scaled to a mean diagonal of 1, then damped."""
    C = one.matrix.double()
    return C / C.diagonal().mean() + damping * torch.eye(len(C), dtype=torch.float64)


@pytest.mark.parametrize("n", [5, 300])
def test_compactness_is_the_formula(n: int) -> None:
    one = covariance(n)
    values = torch.linalg.eigvalsh(dense_damped(one))
    expected = math.sqrt(7 * float(values[-1])) / float(values[0])
    assert compactness(anisotropy(one, 0.01), 7) == pytest.approx(expected, rel=2e-3)


def test_compactness_does_not_depend_on_the_scale_of_the_inputs() -> None:
    one = covariance(12)
    assert anisotropy(Covariance.of(1e4 * one.matrix, one.num_tokens), 0.01) == pytest.approx(anisotropy(one, 0.01), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_compactness_bounds_what_dropping_a_component_changes(seed: int) -> None:
    torch.manual_seed(seed)
    one, W = covariance(10, seed), torch.randn(6, 10, dtype=torch.float64)
    C = dense_damped(one)
    U, sigma, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    X = torch.linalg.cholesky(C) @ torch.randn(10, 1, dtype=torch.float64)
    X = X / X.norm()
    for r in range(1, 7):
        kept = U[:, : 6 - r] * sigma[: 6 - r] @ Vh[: 6 - r] @ torch.linalg.inv(C)
        one_more = U[:, : 7 - r] * sigma[: 7 - r] @ Vh[: 7 - r] @ torch.linalg.inv(C)
        assert ((one_more - kept) @ X).abs().sum() <= compactness(anisotropy(one, 0.01), 6) * sigma[6 - r] * 1.001


def test_assessment_is_the_formula() -> None:
    torch.manual_seed(0)
    W = torch.randn(9, 14)
    candidates = [covariance(14, seed, decay) for seed, decay in enumerate((1.0, 3.0, 0.5, 2.0))]
    scores = []
    for one in candidates:
        C = dense_damped(one)
        values = torch.linalg.eigvalsh(C)
        sigma = torch.linalg.svdvals(W.double() @ C)
        scores.append(math.log(math.sqrt(9 * float(values[-1])) / float(values[0])) * float(sigma.sum() / sigma[0]))
    assessed = [assess(W, one, anisotropy(one, 0.01)) for one in candidates]
    assert [one.score for one in assessed] == pytest.approx(scores, rel=1e-3)
    expected = spectrum(W, candidates[1])
    torch.testing.assert_close(assessed[1].spectrum, expected, rtol=0, atol=3e-6 * float(expected[0]))


def test_bad_candidates_are_named() -> None:
    one = covariance(8)
    with pytest.raises(ValueError, match="log π > 0"):
        compactness(anisotropy(Covariance.of(torch.eye(8), 64), 0.01), 1)
    with pytest.raises(ValueError, match="damping is 0"):
        anisotropy(one, 0)
    with pytest.raises(ValueError, match="all zero"):
        assess(torch.zeros(4, 8), one, 2.0)
    with pytest.raises(ValueError, match="different layers"):
        assess(torch.randn(4, 9), one, 2.0)


def literal(
    spectra: dict[str, list[float]], log_pi: dict[str, float], costs: dict[str, int], budget: int, mode: str, low: int, high: int | None
) -> dict[str, int]:
    """The greedy loop as printed, and the two limits."""
    k = {name: len(sigma) for name, sigma in spectra.items()}
    least = {name: min(low, k[name]) for name in k}
    most = {name: min(high or k[name], k[name]) for name in k}
    f = dict(least) if mode == "kpm" else {name: min(max(1, k[name] - most[name]), k[name] - least[name]) for name in k}

    def cost(filtered: dict[str, int]) -> int:
        return sum(costs[name] * (filtered[name] if mode == "kpm" else k[name] - filtered[name]) for name in k)

    while mode == "kpm" or cost(f) > budget:
        open_layers = [name for name in k if f[name] < (most[name] if mode == "kpm" else k[name] - least[name])]
        if not open_layers:
            break
        scores = {}
        for name in open_layers:
            sigma = sorted(spectra[name])
            smallest = sigma[f[name] - 1]
            scores[name] = 0.0 if smallest == 0 else log_pi[name] * smallest / sum(sigma[f[name] :][::-1])
        best = min(open_layers, key=lambda name: scores[name])
        if mode == "kpm" and cost({**f, best: f[best] + 1}) > budget:
            break
        f[best] += 1
    return {name: f[name] if mode == "kpm" else k[name] - f[name] for name in k}


def candidates_of(spectra: dict[str, Tensor], log_pi: dict[str, float]) -> dict[str, Candidate]:
    return {name: Candidate(log_pi[name], sigma) for name, sigma in spectra.items()}


values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 7.0])
layers = st.lists(
    st.tuples(st.lists(values, min_size=1, max_size=8), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 9)), min_size=1, max_size=5
)


@settings(max_examples=400, deadline=None)
@given(layers, st.integers(0, 150), st.sampled_from(["kpm", "ipm"]), st.integers(1, 3), st.sampled_from([None, 3, 5]))
def test_allocation_is_the_greedy_loop_as_printed(
    drawn: list[tuple[list[float], float, int]], budget: int, mode: str, low: int, high: int | None
) -> None:
    spectra = {f"layer{place}": sorted(sigma, reverse=True) for place, (sigma, _, _) in enumerate(drawn)}
    log_pi = {f"layer{place}": value for place, (_, value, _) in enumerate(drawn)}
    costs = {f"layer{place}": value for place, (_, _, value) in enumerate(drawn)}
    tensors = {name: torch.tensor(sigma) for name, sigma in spectra.items()}
    least = sum(costs[name] * min(low, len(sigma)) for name, sigma in spectra.items())
    if budget < least:
        with pytest.raises(ValueError, match=re.escape(f"The budget of {budget} parameters is below {least}")):
            allocate_ranks(candidates_of(tensors, log_pi), costs, budget, mode, min_rank=low, max_rank=high)
        return
    ranks = allocate_ranks(candidates_of(tensors, log_pi), costs, budget, mode, min_rank=low, max_rank=high)
    assert ranks == literal(spectra, log_pi, costs, budget, mode, low, high)
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
    assert all(min(low, len(spectra[name])) <= rank <= min(high or 99, len(spectra[name])) for name, rank in ranks.items())


def test_random_spectra_follow_the_loop_too() -> None:
    torch.manual_seed(0)
    for mode in ("kpm", "ipm"):
        spectra = {f"{place}": torch.rand(int(k)).sort(descending=True).values for place, k in enumerate(torch.randint(1, 40, (6,)))}
        log_pi = {name: float(torch.rand(()) * 5 + 0.1) for name in spectra}
        costs = {name: int(torch.randint(1, 100, ())) for name in spectra}
        budget = sum(costs[name] * (1 + len(sigma) // 3) for name, sigma in spectra.items())
        lists = {name: sigma.double().tolist() for name, sigma in spectra.items()}
        assert allocate_ranks(candidates_of(spectra, log_pi), costs, budget, mode) == literal(lists, log_pi, costs, budget, mode, 1, None)


def test_compact_layers_get_more_in_kpm_and_less_in_ipm() -> None:
    sigma = torch.linspace(2, 0.1, 32)
    spectra, costs = {"compact": sigma, "spread": sigma}, {"compact": 1, "spread": 1}
    kpm = allocate_ranks(candidates_of(spectra, {"compact": 1.0, "spread": 4.0}), costs, 32, "kpm")
    ipm = allocate_ranks(candidates_of(spectra, {"compact": 1.0, "spread": 4.0}), costs, 32, "ipm")
    assert kpm["compact"] > kpm["spread"]
    assert ipm["compact"] < ipm["spread"]


def test_more_budget_than_there_are_components_is_left_over() -> None:
    ranks = allocate_ranks(candidates_of({"a": torch.ones(4)}, {"a": 1.0}), {"a": 10}, 10**6, "kpm")
    assert ranks == {"a": 4}
    # The paper filters at least one component, so it never trains all of them in IPM.
    assert allocate_ranks(candidates_of({"a": torch.ones(4)}, {"a": 1.0}), {"a": 10}, 10**6, "ipm") == {"a": 3}


def test_bad_arguments_are_named() -> None:
    spectra, log_pi, costs = {"a": torch.ones(4)}, {"a": 1.0}, {"a": 10}
    for bad, words in (
        (lambda: allocate_ranks({}, {}, 10, "kpm"), "no layers"),
        (lambda: allocate_ranks(candidates_of(spectra, log_pi), {"b": 10}, 10, "kpm"), "different layers: a is"),
        (lambda: allocate_ranks(candidates_of(spectra, log_pi), {}, 10, "kpm"), "candidates and costs"),
        (lambda: allocate_ranks(candidates_of(spectra, log_pi), costs, 10, "kpm", min_rank=0), "min_rank is 0"),
        (lambda: allocate_ranks(candidates_of(spectra, log_pi), costs, 10, "kpm", min_rank=3, max_rank=2), "max_rank 2"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
