"""The iterative solvers against float64 references: context energy, condition numbers, and their checks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corda_core import Covariance, decompose, factors, solvers
from corda_core.decompose import Decomposition, Solver, spectrum

SHAPES = {"square": (160, 160), "wide": (96, 200), "tall": (220, 110), "very wide": (40, 600), "very tall": (600, 40)}
CPU = torch.device("cpu")


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def case(m: int, n: int, weight_condition: float, input_condition: float) -> tuple[Tensor, Covariance]:
    """W and C with geometric spectra of the given condition numbers."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    sigma = torch.logspace(0, -torch.tensor(weight_condition).log10().item(), k, dtype=torch.float64)
    weight = (orthogonal(m, generator)[:, :k] * sigma) @ orthogonal(n, generator)[:k]
    basis = orthogonal(n, generator)
    scales = torch.logspace(0, -torch.tensor(input_condition).log10().item(), n, dtype=torch.float64)
    return weight, Covariance.of((basis * scales) @ basis.T, 10 * n)


def product(weight: Tensor, covariance: Covariance, damping: float) -> Tensor:
    return weight.double() @ covariance.damped(damping).dense(torch.float64, CPU)


def energy_ratio(decomposition: Decomposition, P: Tensor) -> float:
    """Context energy ‖U_Sᵀ P‖_F over that of the exact subspace, from a float64 singular value decomposition."""
    exact = torch.linalg.svdvals(P)[decomposition.components]
    return float((decomposition.basis.T @ P).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("conditions", [(1.0, 1.0), (10.0, 1e2), (1e4, 1e5), (1e4, 1e8)])
def test_partial_is_within_a_thousandth_of_exact(shape: str, rank: int, damping: float, conditions: tuple[float, float]) -> None:
    weight, covariance = case(*SHAPES[shape], *conditions)
    P = product(weight, covariance, damping)
    for mode, low, high in (("kpm", 0.9999, 1.001), ("ipm", 0.999, 1.0001)):
        for solver in ("partial", "exact"):
            decomposition = decompose(weight, covariance, rank, mode, damping=damping, solver=solver)
            # Four times as many components as are wanted leave the iteration room; then it must do the work itself.
            assert not decomposition.fell_back or min(SHAPES[shape]) < 4 * rank + 32 or max(conditions) > 1e6
            assert low <= energy_ratio(decomposition, P) <= high, (mode, solver, decomposition.fell_back)
            torch.testing.assert_close(decomposition.basis.T @ decomposition.basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
            torch.testing.assert_close(decomposition.sigma.norm(), (decomposition.basis.T @ P).norm(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_condition_number_of_a_billion(shape: str) -> None:
    """σ₁/σ_k of W C is 1e9: the Gram matrix alone, with its 1e18, could not tell the smallest components apart."""
    m, n = SHAPES[shape]
    k, generator = min(m, n), torch.Generator().manual_seed(0)
    right = orthogonal(n, generator)
    sigma = torch.logspace(0, -4, k, dtype=torch.float64)
    scales = torch.cat([torch.logspace(0, -5, k, dtype=torch.float64), torch.ones(n - k, dtype=torch.float64)])
    weight = (orthogonal(m, generator)[:, :k] * sigma) @ right.T[:k]
    covariance = Covariance.of((right * scales) @ right.T, 10 * n)
    P = product(weight, covariance, 0.0)
    singular = torch.linalg.svdvals(P)
    assert singular[0] / singular[-1] > 0.9e9
    for solver in ("partial", "exact"):
        assert energy_ratio(decompose(weight, covariance, 8, "kpm", damping=0.0, solver=solver), P) <= 1.001


def test_components_behind_a_massive_one_are_found() -> None:
    """One σ₁ is 1e4 above the rest and has all but 1e-8 of the energy: the others must be right nonetheless, to a hundredth."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.cat([torch.tensor([1e4]), torch.linspace(1.0, 0.2, 199)]).double()
    weight = (orthogonal(200, generator) * sigma) @ orthogonal(200, generator)
    covariance = Covariance.of(torch.eye(200, dtype=torch.float64), 2000)
    decomposition = decompose(weight, covariance, 9, "ipm", solver="partial")
    assert not decomposition.fell_back
    torch.testing.assert_close(decomposition.sigma, 1.01 * sigma[:9], rtol=1e-2, atol=0)


def test_flat_spectrum_where_iterations_converge_slowly() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = torch.linspace(1.0, 0.9, 300, dtype=torch.float64)
    weight = (orthogonal(300, generator) * sigma) @ orthogonal(300, generator)
    covariance = Covariance.of(torch.eye(300, dtype=torch.float64), 3000)
    P = product(weight, covariance, 0.01)
    for mode, low, high in (("kpm", 0.9999, 1.001), ("ipm", 0.999, 1.0001)):
        assert low <= energy_ratio(decompose(weight, covariance, 8, mode, solver="partial"), P) <= high


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_deficient_covariance_and_low_precision_weights(shape: str, dtype: torch.dtype) -> None:
    m, n = SHAPES[shape]
    inputs = torch.randn(5, n, dtype=torch.float64)
    weight, covariance = torch.randn(m, n).to(dtype), Covariance.of(inputs.T @ inputs / 5, 5)
    P = product(weight, covariance, 0.01)
    for mode, low, high in (("kpm", 0.9999, 1.001), ("ipm", 0.999, 1.0001)):
        assert low <= energy_ratio(decompose(weight, covariance, 4, mode, solver="partial"), P) <= high


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_falls_back_where_the_inverse_does_not_exist(shape: str) -> None:
    weight, covariance = case(*SHAPES[shape], 10.0, 10.0)
    if shape == "tall":
        weight[:, 5:10] = 0
    else:
        weight[5:10] = 0
    decomposition = decompose(weight, covariance, 4, "kpm", solver="partial")
    P = product(weight, covariance, 0.01)
    assert decomposition.fell_back
    assert (decomposition.basis.T @ P).norm() <= 1e-6 * P.norm()


def test_nothing_is_returned_that_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """With solves that are wrong the promised energy is not shown, and the exact solver does the work."""
    weight, covariance = case(160, 160, 10.0, 100.0)
    right = decompose(weight, covariance, 4, "kpm", solver="exact")
    monkeypatch.setattr(solvers, "_solve", lambda lower, X: X.roll(1, 0) + 2 * X)
    decomposition = decompose(weight, covariance, 4, "kpm", solver="partial")
    assert decomposition.fell_back
    torch.testing.assert_close(decomposition.sigma, right.sigma)


def test_an_iteration_that_does_not_settle_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers._Settling, "after", lambda self, energy: torch.tensor(False))
    weight, covariance = case(160, 160, 10.0, 100.0)
    assert decompose(weight, covariance, 4, "kpm", solver="partial").fell_back
    assert decompose(weight, covariance, 4, "ipm", solver="partial").fell_back


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_without_vectors(shape: str) -> None:
    weight, covariance = case(*SHAPES[shape], 10.0, 100.0)
    torch.testing.assert_close(spectrum(weight, covariance), torch.linalg.svdvals(product(weight, covariance, 0.01)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rough_spectrum_is_good_enough_to_choose_by(shape: str, dtype: torch.dtype) -> None:
    weight, covariance = case(*SHAPES[shape], 1e4, 1e5)
    weight, C = weight.to(dtype), covariance.damped(0.01)
    expected = torch.linalg.svdvals(product(weight, covariance, 0.01))
    estimate = solvers.rough_spectrum(weight, C)
    torch.testing.assert_close(estimate, expected, rtol=0, atol=3e-6 * float(expected[0]))
    torch.testing.assert_close(estimate.sum(), expected.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [20, 390, 400])
@pytest.mark.parametrize("damping", [1e-8, 1e-4, 0.01, 1.0])
def test_extreme_eigenvalues_without_the_others(rank: int, damping: float) -> None:
    """With a cluster at the lower end (C of low rank) or none, and conditions that float32 can and cannot invert."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * rank, rank, generator=generator) @ torch.randn(rank, 400, generator=generator)
    C = Covariance.of(rows.T @ rows, 2 * rank).damped(damping)
    values = torch.linalg.eigvalsh(C.dense(torch.float64, CPU))
    largest, smallest = solvers.extremes(C)
    assert largest == pytest.approx(float(values[-1]), rel=1e-2)
    assert smallest == pytest.approx(float(values[0]), rel=1e-2)


def test_auto_iterates_only_where_it_pays() -> None:
    weight, covariance = case(300, 300, 1e2, 1e3)
    singular = torch.linalg.svdvals(product(weight, covariance, 0.01))
    assert Solver.AUTO.iterates(300, 8)
    assert not Solver.AUTO.iterates(300, 200)
    assert not Solver.AUTO.iterates(100, 2)
    few, many = decompose(weight, covariance, 8, "kpm"), decompose(weight, covariance, 200, "kpm")
    torch.testing.assert_close(many.sigma, singular[100:], rtol=1e-6, atol=0)  # exact
    torch.testing.assert_close(few.sigma.norm(), singular[-8:].norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_spectrum_of_an_ill_conditioned_product_has_its_smallest_values(shape: str) -> None:
    """Squared, they would be rounding errors or 0, and rank allocation lives on them."""
    weight, covariance = case(*SHAPES[shape], 1e5, 1e6)
    sigma = spectrum(weight, covariance, damping=1e-7)
    expected = torch.linalg.svdvals(product(weight, covariance, 1e-7))
    assert float(expected[-1] / expected[0]) < 1e-7
    torch.testing.assert_close(sigma, expected, rtol=1e-3, atol=1e-14 * float(expected[0]))


def test_massive_direction_is_beyond_float32_and_done_in_float64() -> None:
    """σ₂ is 1e-6 σ₁: float32 alone would lose the others in its rounding errors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 300, generator=generator)
    rows = torch.randn(900, 300, generator=generator)
    rows[:, 7] *= 3000
    covariance = Covariance.of(rows.T @ rows / 900, 900)
    decomposition = decompose(weight, covariance, 16, "ipm", damping=0.0, solver="partial")
    P = product(weight, covariance, 0.0)
    exact = torch.linalg.svdvals(P)
    assert float(exact[1] / exact[0]) < 1e-5
    reached = (decomposition.basis.T @ P).square().sum(1).flip(0).cumsum(0)
    assert not decomposition.fell_back
    torch.testing.assert_close(reached, exact[:16].square().flip(0).cumsum(0), rtol=1e-2, atol=0)


class Waits(TorchDispatchMode):
    """Counts how often a value of a tensor is read, for which a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_a_device_is_waited_for_once_an_iteration(shape: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, covariance = case(*SHAPES[shape], 10.0, 100.0)
    after, read, iterations, reads = solvers._Settling.after, solvers._read, [], []
    monkeypatch.setattr(solvers._Settling, "after", lambda self, energies: iterations.append(1) or after(self, energies))
    monkeypatch.setattr(solvers, "_read", lambda *flags: reads.append(1) or read(*flags))
    with Waits() as waits:
        decomposition = decompose(weight, covariance, 4, mode, solver="partial")
        inside = waits.count
        factors(decomposition)
    assert not decomposition.fell_back
    assert len(iterations) >= 3
    assert len(reads) <= len(iterations) + 1, "and once for the factors"
    assert inside <= 4, "finite weight, mean of the diagonal, check of the factor and of the result"
    assert waits.count == inside, "no value is read to share the scale between the factors"
