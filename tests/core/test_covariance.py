"""Half a symmetric matrix behaves as the whole."""

import pytest
import torch

from corda_core import covariance
from corda_core.covariance import Covariance, Symmetric, together

SIZES = [1, 5, 96, 97, 200, 1100]


@pytest.mark.parametrize("n", SIZES)
def test_gram_and_back(n: int) -> None:
    rows = torch.randn(7, n, dtype=torch.float64)
    packed = Symmetric.gram(rows)
    torch.testing.assert_close(packed.dense(), rows.T @ rows)
    torch.testing.assert_close(Symmetric.of(rows.T @ rows).dense(), rows.T @ rows)
    torch.testing.assert_close(packed.diagonal(), rows.square().sum(0))
    assert packed.n == n


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_is_the_dense_product_in_the_type_of_the_other(n: int, dtype: torch.dtype) -> None:
    packed, X = Symmetric.gram(torch.randn(7, n)), torch.randn(n, 3, dtype=dtype)
    product = packed.times(X)
    assert product.dtype == dtype
    torch.testing.assert_close(product, packed.dense().to(dtype) @ X, rtol=1e-4, atol=1e-4 * n**0.5)


def test_sums() -> None:
    first, second = Symmetric.gram(torch.randn(4, 130)), Symmetric.gram(torch.randn(4, 130))
    expected = first.dense() + second.dense()
    torch.testing.assert_close(first.plus(second).dense(), expected)
    first.add_(second)
    first.divide_(2.0)
    torch.testing.assert_close(first.dense(), expected / 2)


@pytest.mark.parametrize("n", [576, 1536, 4096])
def test_takes_little_more_than_half_the_memory(n: int) -> None:
    size = Symmetric.num_bytes(n, torch.float32)
    assert size == sum(panel.nbytes for panel in Symmetric.zeros(n, torch.float32, torch.device("cpu")).panels)
    assert size < 0.6 * 4 * n * n


def test_a_covariance_over_both_is_the_mean_by_weight() -> None:
    X, Y, w = (torch.randn(40, 6).double(), torch.randn(25, 6).double(), torch.rand(25).double())
    left = Covariance.of((X.T @ X / 40).float(), 40)
    right = Covariance(Symmetric.of((Y.T @ (w[:, None] * Y) / w.sum()).float()), 25, float(w.sum()))
    total = left.plus(right)
    expected = (X.T @ X + Y.T @ (w[:, None] * Y)) / (40 + w.sum())
    torch.testing.assert_close(total.matrix, expected.float(), rtol=1e-5, atol=1e-6)
    assert total.num_tokens == 65
    assert total.weight == pytest.approx(40 + float(w.sum()))


def test_layers_that_share_share_the_sum_and_what_saw_nothing_adds_nothing() -> None:
    first, second, third = (Covariance.of(torch.eye(3) * size, 10) for size in (1.0, 3.0, 5.0))
    total = together([{"q": first, "k": first, "up": first}, {"q": second, "k": second, "vision": third}])
    assert total["q"] is total["k"]
    torch.testing.assert_close(total["q"].matrix, 2 * torch.eye(3))
    assert total["up"] is first
    assert total["vision"] is third


def test_halves_are_multiplied_in_float32_by_whatever_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 200).bfloat16()
    exact = rows.double().T @ rows.double()
    assert Symmetric.gram(rows).panels[0].dtype == torch.float32
    torch.testing.assert_close(Symmetric.gram(rows).dense().double(), exact, rtol=1e-5, atol=1e-4)
    asked = []

    def into_float32(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        asked.append((left.dtype, right.dtype))
        return left.to(out_dtype) @ right.to(out_dtype)

    monkeypatch.setattr(covariance, "multiplies_halves", lambda rows: True)
    monkeypatch.setattr(torch, "mm", into_float32)
    torch.testing.assert_close(Symmetric.gram(rows).dense().double(), exact, rtol=1e-5, atol=1e-4)
    assert set(asked) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.gpu
def test_tensor_cores_lose_nothing_but_the_order_of_the_sum() -> None:
    rows = torch.randn(4096, 1024, device="cuda") * torch.logspace(-2, 2, 1024, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        exact = rows.to(dtype).double().T @ rows.to(dtype).double()
        error = (Symmetric.gram(rows.to(dtype)).dense().double() - exact).abs() / exact.diagonal().sqrt().outer(exact.diagonal().sqrt())
        assert float(error.max()) < 1e-5
