"""Whitening against the dense inverse square root."""

import pytest
import torch

from corda_core import Covariance
from corda_core.decompose import TOLERANCE, whitening


def covariance(n: int, decay: float, tokens: int) -> Covariance:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -decay, n, dtype=torch.float64)
    return Covariance.of((rows.T @ rows / tokens).float(), tokens)


@pytest.mark.parametrize(("n", "decay", "tokens"), [(12, 2.0, 100), (12, 0.0, 100), (300, 3.0, 2000), (300, 1.0, 40), (600, 2.0, 3000)])
def test_is_the_dense_inverse_square_root_within_its_bound(n: int, decay: float, tokens: int) -> None:
    one = covariance(n, decay, tokens)
    found = whitening(one)
    damped = one.damped(0.01).dense(torch.float64, torch.device("cpu"))
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt() @ vectors.T
    P = found.apply(torch.eye(n)).double()
    error = float(torch.linalg.matrix_norm(P @ root / found.unit - torch.eye(n), 2))
    assert found.error <= TOLERANCE + 1e-6
    assert error <= found.error + 5e-3
    assert found.vectors.shape == (n, len(found.lengths))
    assert float(found.lengths.max()) <= 1 + 1e-6


def test_undo_is_the_inverse() -> None:
    found = whitening(covariance(40, 2.0, 400))
    A = torch.randn(5, 40)
    torch.testing.assert_close(found.undo(found.apply(A)), A, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.apply(A), A, atol=1e-2)


def test_no_direction_stands_out_of_white_inputs() -> None:
    found = whitening(Covariance.of(torch.eye(16), 64), damping=10.0)
    assert len(found.lengths) == 0
    A = torch.randn(3, 16)
    assert torch.equal(found.apply(A), A)


def test_the_change_of_the_context_is_the_size_of_the_factors() -> None:
    one = covariance(64, 2.0, 500)
    found = whitening(one)
    A, B = torch.randn(4, 64).double(), torch.randn(10, 4).double()
    change = B @ found.apply(A.float()).double()
    root = torch.linalg.cholesky(one.damped(0.01).dense(torch.float64, torch.device("cpu")))
    assert float((change @ root).norm()) == pytest.approx(found.unit * float((B @ A).norm()), rel=TOLERANCE)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="damping is 0"):
        whitening(covariance(8, 1.0, 40), damping=0)
    with pytest.raises(ValueError, match="trace 0"):
        whitening(Covariance.of(torch.zeros(8, 8), 40))
