"""Half a symmetric matrix behaves as the whole."""

import pytest
import torch

from corda_core.covariance import Symmetric

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
