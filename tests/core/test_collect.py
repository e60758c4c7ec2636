"""Covariances against dense float64 references: chunked, padded, shared, masked."""

import pytest
import torch
from torch import Tensor, nn

from corda_core import collect


class Toy(nn.Module):
    """Three readers of one tensor, one reader of another, one layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 6)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, twice: bool = False) -> Tensor:
        mixed = self.q(x) + self.k(x) * self.v(x)
        if twice:
            self.q(2 * x)
        return self.out(mixed)


NAMES = ("q", "k", "v", "out")


def reference(model: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, 6).double()
    with torch.no_grad():
        mixed = (model.q(x) + model.k(x) * model.v(x)).reshape(-1, 5).double()
    return rows.T @ rows / len(rows), mixed.T @ mixed / len(mixed)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunked_equals_whole_equals_dense(chunk: int) -> None:
    model, x = Toy(), torch.randn(7, 4, 6)
    found = collect(model, [{"x": part} for part in x.split(chunk)], NAMES)
    shared, mixed = reference(model, x)
    torch.testing.assert_close(found["q"].matrix.double(), shared, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["out"].matrix.double(), mixed, rtol=1e-5, atol=1e-6)
    assert found["q"].num_tokens == 28


def test_layers_fed_by_one_tensor_share_one_covariance() -> None:
    found = collect(Toy(), [{"x": torch.randn(3, 4, 6)} for _ in range(2)], NAMES)
    assert found["q"] is found["k"] is found["v"]
    assert found["out"] is not found["q"]


def test_a_layer_that_also_reads_something_else_gets_its_own() -> None:
    model, x = Toy(), torch.randn(3, 4, 6)
    found = collect(model, [{"x": x, "twice": True}, {"x": x}], NAMES)
    shared, _ = reference(model, x)
    torch.testing.assert_close(found["k"].matrix.double(), shared, rtol=1e-5, atol=1e-6)
    # Seen three times 12 tokens, once doubled.
    assert found["q"].num_tokens == 36
    torch.testing.assert_close(found["q"].matrix.double(), shared * (1 + 1 + 4) / 3, rtol=1e-5, atol=1e-6)


def test_padding_never_counts() -> None:
    model, x = Toy(), torch.randn(2, 5, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = x.clone()
    padded[0, :2] = 1e6
    found = collect(model, [{"x": padded, "attention_mask": mask}], NAMES)
    rows = x[mask.bool()].double()
    torch.testing.assert_close(found["q"].matrix.double(), rows.T @ rows / 8, rtol=1e-5, atol=1e-6)
    assert found["q"].num_tokens == 8


def test_masks_are_per_layer() -> None:
    x, mask = torch.randn(2, 5, 6), torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = collect(
        Toy(),
        [{"x": x, "attention_mask": mask}],
        NAMES,
        valid_tokens=lambda name, batch: batch["attention_mask"] if name == "out" else None,
    )
    assert (found["q"].num_tokens, found["out"].num_tokens) == (10, 1)


def test_input_overwritten_in_place_after_the_call() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x.add_(1.0)
            return y + self.second(x)

    x = torch.randn(4, 6)
    before, after = x.clone().double(), (x + 1).double()
    found = collect(InPlace(), [{"x": x}], ("first", "second"))
    torch.testing.assert_close(found["first"].matrix.double(), before.T @ before / 4, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["second"].matrix.double(), after.T @ after / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulates_in_float32_or_better(dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    assert collect(model, [{"x": torch.randn(2, 4, 6, dtype=dtype)}], NAMES)["q"].matrix.dtype == torch.float32
    assert collect(model, [{"x": torch.randn(2, 4, 6, dtype=dtype)}], NAMES, dtype=torch.float64)["q"].matrix.dtype == torch.float64


def test_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = Toy().train()
    with pytest.raises(ValueError, match=r"q: batch 2 .* not finite"):
        collect(model, [{"x": torch.ones(1, 2, 6)}, {"x": torch.full((1, 2, 6), torch.inf)}], NAMES)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(key for module in model.modules() for key in vars(module) if "corda" in key)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="no batches"):
        collect(Toy(), [], NAMES)
    with pytest.raises(ValueError, match="idle.*never ran"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6)}], (*NAMES, "idle"))
    with pytest.raises(ValueError, match="the mask has"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6), "attention_mask": torch.ones(1, 3)}], NAMES)
    with pytest.raises(ValueError, match="q: no valid token"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6), "attention_mask": torch.zeros(1, 2)}], NAMES)
