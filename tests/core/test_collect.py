"""Covariances against dense float64 references: chunked, padded, shared, masked."""

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from corda_core import collect
from corda_core.collect import split_layers
from corda_core.covariance import Symmetric
from corda_core.linears import evaluating

collecting = sys.modules["corda_core.collect"]  # the name in the package is the function


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
        token_weights=lambda name, batch: batch["attention_mask"] if name == "out" else None,
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


def test_input_given_by_name_is_read() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(input=x)

    x = torch.randn(4, 6)
    found = collect(ByName(), [{"x": x}], ("first",))["first"]
    torch.testing.assert_close(found.matrix, x.T @ x / 4)


def test_inference_mode_outside_changes_nothing() -> None:
    model, batches = Toy(), [{"x": torch.randn(2, 4, 6)}]
    expected = collect(model, batches, NAMES)
    with torch.inference_mode():
        found = collect(model, batches, NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name].matrix, expected[name].matrix, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulates_in_float32_or_better(dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    assert collect(model, [{"x": torch.randn(2, 4, 6, dtype=dtype)}], NAMES)["q"].matrix.dtype == torch.float32


def test_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = Toy().train()
    with pytest.raises(ValueError, match=r"q: batch 2 .* not finite"):
        collect(model, [{"x": torch.ones(1, 2, 6)}, {"x": torch.full((1, 2, 6), torch.inf)}], NAMES)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(key for module in model.modules() for key in vars(module) if "corda" in key)


def test_a_layer_that_runs_twice_is_checked_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.q(torch.zeros_like(x))

    with pytest.raises(ValueError, match=r"q: batch 1 .* not finite"):
        collect(Twice(), [{"x": torch.full((1, 2, 6), torch.inf)}], ("q",))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="no batches"):
        collect(Toy(), [], NAMES)
    with pytest.raises(ValueError, match="no batches"):
        split_layers(Toy(), [], NAMES, 1)
    with pytest.raises(ValueError, match="idle.*never ran"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6)}], (*NAMES, "idle"))
    with pytest.raises(ValueError, match="the mask has"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6), "attention_mask": torch.ones(1, 3)}], NAMES)
    with pytest.raises(ValueError, match="q: no valid token"):
        collect(Toy(), [{"x": torch.randn(1, 2, 6), "attention_mask": torch.zeros(1, 2)}], NAMES)


def test_weights_count_tokens_by_parts() -> None:
    model, x, weights = Toy(), torch.randn(2, 5, 6), torch.tensor([[0.0, 0.5, 1.0, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0, 3.0]])
    found = collect(model, [{"x": x[:1], "attention_mask": weights[:1]}, {"x": x[1:], "attention_mask": weights[1:]}], NAMES)
    rows, w = x.reshape(-1, 6).double(), weights.reshape(-1, 1).double()
    torch.testing.assert_close(found["q"].matrix.double(), (rows * w).T @ rows / w.sum(), rtol=1e-5, atol=1e-6)
    assert found["q"].num_tokens == 7


def test_weights_of_halves_round_nothing_where_halves_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum for each weight: rows times √w would have to be rounded to bfloat16 again."""
    asked = []

    def multiplies_halves(rows: Tensor) -> bool:
        asked.append(rows.dtype)
        return rows.dtype == torch.bfloat16

    monkeypatch.setattr(collecting, "multiplies_halves", multiplies_halves)
    x, weights = torch.randn(3, 7, 6).bfloat16(), torch.tensor([0.0, 0.2, 1.0, 0.2, 1.0, 1.0, 0.2]).expand(3, 7)
    found = collect(Toy().bfloat16(), [{"x": x}], ("q",), token_weights=lambda name, batch: weights)
    rows, w = x.reshape(-1, 6).double(), weights.reshape(-1, 1).double()
    torch.testing.assert_close(found["q"].matrix.double(), (rows * w).T @ rows / w.sum(), rtol=1e-6, atol=1e-6)
    assert torch.bfloat16 in asked
    assert (found["q"].num_tokens, found["q"].weight) == (18, pytest.approx(3 * 3.6))


@pytest.mark.parametrize("chunk", [1, 3])
def test_sample_max_is_the_papers_mean_over_scaled_samples(chunk: int) -> None:
    model, x = Toy(), torch.randn(3, 4, 6) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    x[1, 0] = 1e9
    batches = [{"x": a, "attention_mask": m} for a, m in zip(x.split(chunk), mask.split(chunk), strict=True)]
    found = collect(model, batches, NAMES, normalize="sample-max")
    samples = [one[kept.bool()].double() for one, kept in zip(x, mask, strict=True)]
    expected = sum((s / s.abs().max()).T @ (s / s.abs().max()) for s in samples) / 3
    torch.testing.assert_close(found["q"].matrix.double(), expected, rtol=1e-5, atol=1e-6)


class Flat(nn.Module):
    """Passes all tokens on as one row, as OPT does."""

    def __init__(self, inner: Toy) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(x.flatten(0, 1))


def test_sample_max_knows_samples_whose_tokens_come_as_one_row() -> None:
    model, x = Toy(), torch.randn(3, 4, 6) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    batches = [{"x": x, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])}]
    expected = collect(model, batches, NAMES, normalize="sample-max")
    found = collect(Flat(model), batches, [f"inner.{name}" for name in NAMES], normalize="sample-max")
    for name in NAMES:
        torch.testing.assert_close(found[f"inner.{name}"].matrix, expected[name].matrix, rtol=1e-5, atol=1e-6)


class Again(nn.Module):
    """A layer that has run before stands between two that read different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.a(y) + self.c(y)


def test_layers_of_different_inputs_are_no_group() -> None:
    model, batches = Again(), [{"x": torch.randn(4, 6)}]
    one = Symmetric.num_bytes(6, torch.float32)
    assert split_layers(model, batches, ["a", "b", "c"], one) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(("budget", "passes"), [(10**9, 1), (300, 1), (200, 2), (1, 2), (None, 1)])
def test_passes_within_a_budget_give_the_same(budget: int | None, passes: int) -> None:
    model, batches = Toy(), [{"x": torch.randn(3, 4, 6)} for _ in range(3)]
    whole = collect(model, batches, NAMES)
    parts = [collect(model, batches, part) for part in split_layers(model, batches, NAMES, budget)]
    assert len(parts) == passes
    assert sorted(name for part in parts for name in part) == sorted(NAMES)
    assert parts[0]["q"] is parts[0]["k"] is parts[0]["v"]
    for part in parts:
        for name, covariance in part.items():
            assert torch.equal(covariance.matrix, whole[name].matrix)
            assert covariance.num_tokens == whole[name].num_tokens
    if passes > 1:
        assert all(
            len({id(one) for one in part.values()}) * Symmetric.num_bytes(6, torch.float32) <= max(budget or 0, 144) for part in parts
        )


def test_several_passes_need_batches_that_can_be_gone_over_again() -> None:
    with pytest.raises(ValueError, match=r"max_memory is 100 bytes.*only once; give a list or a DataLoader"):
        split_layers(Toy(), iter([{"x": torch.randn(1, 2, 6)}]), NAMES, 100)


class Counting(Toy):
    """Counts how often a forward pass reached its end."""

    ends = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, twice: bool = False) -> Tensor:
        result = super().forward(x, attention_mask, twice)
        self.ends += 1
        return result


def test_leaves_the_forward_pass_behind_the_last_wanted_layer() -> None:
    batches = [{"x": torch.randn(1, 2, 6)} for _ in range(4)]
    model = Counting()
    early = collect(model, batches, ("q", "k"))
    assert model.ends == 1  # the first batch runs whole, to see whether a layer runs twice
    assert torch.equal(early["q"].matrix, collect(Toy(), batches, ("q", "k"))["q"].matrix)
    model = Counting()
    collect(model, [{**batch, "twice": True} for batch in batches], NAMES)
    assert model.ends == 4
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_stays_to_the_end_where_the_first_batch_did_not_reach_all() -> None:
    class Sometimes(Toy):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, twice: bool = False) -> Tensor:
            mixed = self.q(x)
            if twice:
                mixed = mixed + self.q(2 * x) + self.k(x)
            return mixed

    model, x = Sometimes(), torch.randn(1, 4, 6)
    found = collect(model, [{"x": x}, {"x": x, "twice": True}], ("q", "k"))
    assert (found["q"].num_tokens, found["k"].num_tokens) == (12, 4)


@pytest.mark.parametrize("budget", [None, 100])
def test_each_module_keeps_its_own_mode(budget: int | None) -> None:
    model = Toy().train()
    model.norm, model.k.training = nn.BatchNorm1d(6), False
    forward = model.forward
    model.forward = lambda x: forward(model.norm(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[method-assign]
    before = model.norm.running_mean.clone()
    batches = [{"x": torch.randn(2, 3, 6)}]
    for part in split_layers(model, batches, NAMES, budget):
        collect(model, batches, part)
    assert model.training
    assert model.norm.training
    assert not model.k.training
    assert torch.equal(model.norm.running_mean, before)


def test_autocast_does_not_reach_the_sums() -> None:
    model, x = Toy(), torch.randn(4, 50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect(model, [{"x": x}], ("q",))["q"].matrix
    assert torch.equal(found, collect(model, [{"x": x}], ("q",))["q"].matrix)


def test_two_models_at_once_do_not_disturb_each_other() -> None:
    """A model whose forward collects on another one meanwhile."""
    inner, batches = Toy(), [{"x": torch.randn(2, 3, 6)} for _ in range(2)]

    class Outer(Toy):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, twice: bool = False) -> Tensor:
            collect(inner, batches, NAMES)
            return super().forward(x)

    outer = Outer()
    alone = Toy()
    alone.load_state_dict(outer.state_dict())
    assert torch.equal(collect(outer, batches, NAMES)["out"].matrix, collect(alone, batches, NAMES)["out"].matrix)


def test_conv1d_reads_its_input_as_linear_does() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 6))
    x = torch.randn(4, 3, 6)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    rows = x.reshape(-1, 6).double()
    found = collect(Wrapper(), [{"x": x}], ("body.0",))["body.0"]
    torch.testing.assert_close(found.matrix.double(), rows.T @ rows / 12, rtol=1e-5, atol=1e-6)


def test_every_module_gets_its_mode_back_after_an_error(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    during: list[bool] = []

    def fail() -> None:
        with evaluating(llama):
            during.extend(module.training for module in llama.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(during)
    assert [module.training for module in llama.modules()] == before
