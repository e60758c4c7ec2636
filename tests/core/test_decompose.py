"""The decomposition against float64 references: the papers' form with its inverse, and properties; whitening against the dense root."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_core import Covariance, Mode, decompose, factors
from corda_core.decompose import TOLERANCE, Solver, spectrum, whitening

SHAPES = [(12, 20), (16, 16), (20, 12)]


def random_case(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Covariance]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 3, n, dtype=torch.float64)
    return weight.to(dtype), Covariance.of((inputs.T @ inputs) / len(inputs), len(inputs))


def dense(covariance: Covariance, damping: float = 0.01) -> Tensor:
    return covariance.damped(damping).dense(torch.float64, torch.device("cpu"))


def papers_product(weight: Tensor, covariance: Covariance, rank: int, mode: str, damping: float) -> Tensor:
    """``B A`` of CorDA, section 3.3, as printed: SVD of W C, right factor times the inverse of C."""
    matrix = dense(covariance, damping)
    U, S, Vt = torch.linalg.svd(weight.double() @ matrix, full_matrices=False)
    chosen = slice(len(S) - rank, len(S)) if mode == "kpm" else slice(0, rank)
    return (U[:, chosen] * S[chosen]) @ (Vt[chosen] @ torch.linalg.inv(matrix))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("split", ["balanced", "paper"])
def test_product_is_the_papers(m: int, n: int, mode: str, split: str) -> None:
    weight, covariance = random_case(m, n)
    A0, B0 = factors(decompose(weight, covariance, 4, mode), split)
    expected = papers_product(weight, covariance, 4, mode, 0.01)
    torch.testing.assert_close((B0.double() @ A0.double()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_papers_split_has_the_papers_factors(m: int, n: int, mode: str) -> None:
    weight, covariance = random_case(m, n)
    decomposition = decompose(weight, covariance, 3, mode)
    A0, B0 = factors(decomposition, "paper")
    S = torch.linalg.svdvals(weight @ dense(covariance))[decomposition.components]
    torch.testing.assert_close(B0.double().norm(dim=0), S.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(A0.double(), decomposition.basis.T @ weight / S.sqrt()[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_spectrum_is_that_of_w_c(m: int, n: int) -> None:
    weight, covariance = random_case(m, n)
    torch.testing.assert_close(spectrum(weight, covariance), torch.linalg.svdvals(weight @ dense(covariance)), rtol=1e-8, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 18), n=st.integers(2, 18), data=st.data())
def test_eckart_young_in_the_context_norm(m: int, n: int, data: st.DataObject) -> None:
    """No r directions carry less (KPM) or more (IPM) context energy than the chosen ones: sums of the extreme σ²."""
    rank = data.draw(st.integers(0, min(m, n)))
    mode = data.draw(st.sampled_from([Mode.KPM, Mode.IPM]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    damping = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    solver = data.draw(st.sampled_from(list(Solver)))
    weight, covariance = random_case(m, n, seed=m * 31 + n, dtype=dtype)
    decomposition = decompose(weight, covariance, rank, mode, damping=damping, solver=solver)
    basis, product = decomposition.basis, weight.double() @ dense(covariance, damping)
    assert basis.shape == (m, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    singular = torch.linalg.svdvals(product)
    best = (singular[decomposition.components] ** 2).sum()
    tolerance = 2e-3 if solver is Solver.PARTIAL else 1e-6
    torch.testing.assert_close((basis.T @ product).square().sum(), best, rtol=tolerance, atol=1e-12 * singular[0].item() ** 2)


def test_balanced_split_ignores_the_scale_of_c_and_balances() -> None:
    weight, covariance = random_case(10, 14)
    A0, B0 = factors(decompose(weight, covariance, 4, "kpm"))
    scaled = Covariance.of(covariance.matrix * 1e6, covariance.num_tokens)
    A1, B1 = factors(decompose(weight, scaled, 4, "kpm"))
    torch.testing.assert_close(B1 @ A1, B0 @ A0)
    torch.testing.assert_close(A1.norm(dim=1), A0.norm(dim=1))
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_singular_covariance_without_damping(m: int, n: int) -> None:
    weight, _ = random_case(m, n)
    inputs = torch.randn(3, n, dtype=torch.float64)
    covariance = Covariance.of(inputs.T @ inputs / 3, 3)
    decomposition = decompose(weight, covariance, 4, "kpm", damping=0.0)
    A0, B0 = factors(decomposition)
    assert torch.isfinite(A0).all()
    assert torch.isfinite(B0).all()
    torch.testing.assert_close(decomposition.basis.T @ decomposition.basis, torch.eye(4, dtype=torch.float64))
    assert (decomposition.basis.T @ weight @ covariance.matrix).norm() < 1e-6 * (weight @ covariance.matrix).norm()


def test_a_direction_without_weight_can_still_learn() -> None:
    """Where W is rank-deficient a chosen component is zero: B A = 0 there, but B is not, so A gets a gradient."""
    weight, covariance = random_case(8, 10)
    weight[0] = 0
    A0, B0 = factors(decompose(weight, covariance, 2, "kpm"))
    assert torch.isfinite(A0).all()
    assert (B0.norm(dim=0) > 0.1).all()
    assert A0[-1].norm() < 1e-6 * A0[0].norm()


def test_refuses_what_cannot_be_decomposed() -> None:
    weight, covariance = random_case(6, 8)
    with pytest.raises(ValueError, match="all zero or not finite"):
        decompose(weight, Covariance.of(torch.zeros(8, 8), 5), 2, "kpm")
    with pytest.raises(ValueError, match="not finite"):
        decompose(weight, Covariance.of(torch.full((8, 8), torch.nan), 5), 2, "kpm")
    with pytest.raises(ValueError, match="different layers"):
        decompose(weight, Covariance.of(torch.eye(6), 5), 2, "kpm")
    with pytest.raises(ValueError, match="outside 0"):
        decompose(weight, covariance, 7, "kpm")
    with pytest.raises(ValueError, match="qpm"):
        decompose(weight, covariance, 2, "qpm")
    with pytest.raises(ValueError, match="weight holds values that are not finite"):
        decompose(weight * torch.inf, covariance, 2, "kpm")
    deficient = weight.clone()
    deficient[0] = deficient[1]
    with pytest.raises(ValueError, match="balanced"):
        factors(decompose(deficient, covariance, 1, "kpm"), "paper")


def decaying_covariance(n: int, decay: float, tokens: int) -> Covariance:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -decay, n, dtype=torch.float64)
    return Covariance.of((rows.T @ rows / tokens).float(), tokens)


@pytest.mark.parametrize(("n", "decay", "tokens"), [(12, 2.0, 100), (12, 0.0, 100), (300, 3.0, 2000), (300, 1.0, 40), (600, 2.0, 3000)])
def test_whitening_is_the_dense_inverse_square_root_within_its_bound(n: int, decay: float, tokens: int) -> None:
    covariance = decaying_covariance(n, decay, tokens)
    whitener = whitening(covariance)
    damped = dense(covariance)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt() @ vectors.T
    P = whitener.apply(torch.eye(n)).double()
    error = float(torch.linalg.matrix_norm(P @ root / whitener.unit - torch.eye(n), 2))
    assert whitener.error <= TOLERANCE + 1e-6
    assert error <= whitener.error + 5e-3
    assert whitener.vectors.shape == (n, len(whitener.lengths))
    assert float(whitener.lengths.max()) <= 1 + 1e-6


def test_undo_is_the_inverse_of_whitening() -> None:
    whitener = whitening(decaying_covariance(40, 2.0, 400))
    A = torch.randn(5, 40)
    torch.testing.assert_close(whitener.undo(whitener.apply(A)), A, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whitener.apply(A), A, atol=1e-2)


def test_no_direction_stands_out_of_white_inputs() -> None:
    whitener = whitening(Covariance.of(torch.eye(16), 64), damping=10.0)
    assert len(whitener.lengths) == 0
    A = torch.randn(3, 16)
    assert torch.equal(whitener.apply(A), A)


def test_the_change_of_the_context_is_the_size_of_the_factors() -> None:
    covariance = decaying_covariance(64, 2.0, 500)
    whitener = whitening(covariance)
    A, B = torch.randn(4, 64).double(), torch.randn(10, 4).double()
    change = B @ whitener.apply(A.float()).double()
    root = torch.linalg.cholesky(dense(covariance))
    assert float((change @ root).norm()) == pytest.approx(whitener.unit * float((B @ A).norm()), rel=TOLERANCE)


def test_whitening_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="damping is 0"):
        whitening(decaying_covariance(8, 1.0, 40), damping=0)
    with pytest.raises(ValueError, match="trace 0"):
        whitening(Covariance.of(torch.zeros(8, 8), 40))
