"""Federated rounds: what the server computes is exact or optimal, and clients take up work where they stopped."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from corda_eval.replications.federated import __main__ as command
from corda_eval.replications.federated.changes import Change, aligned, average_changes, average_factors, truncated
from corda_eval.replications.federated.rules import FedAvg, FedSmooth, FullRank, Rule, cosine
from corda_eval.replications.federated.simulate import Client, Federation, Round, federate

RANK, RATE = 2, 0.02
SIZES = {"first": (6, 8), "second": (6, 6)}
FULL = 6
"""All components of either layer."""


class TwoLayers(nn.Module):
    """A network of two layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, (m, n) in SIZES.items():
            layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
            layer.weight.data = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
            setattr(self, name, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (model(batch["inputs"]) - batch["targets"]).square().mean()


def _client(seed: int, rounds: int = 3, steps: int = 4) -> Client:
    """A client whose inputs and whose function are its own."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, generator=generator, dtype=torch.float64)
    true = torch.randn(6, 8, generator=generator, dtype=torch.float64)

    def batch() -> dict[str, Tensor]:
        inputs = centre + torch.randn(16, 8, generator=generator, dtype=torch.float64)
        return {"inputs": inputs, "targets": inputs @ true.T}

    held_out = batch()
    return Client([[batch() for _ in range(steps)] for _ in range(rounds)], lambda model: _loss(model, held_out).item())


def _federation(*clients: Client) -> Federation:
    return Federation(TwoLayers().requires_grad_(False), tuple(SIZES), _loss, clients)


def _run(rule: Rule, *clients: Client, rank: int = RANK) -> tuple[list[Round], dict[str, Tensor]]:
    """Return the rounds, and what the server's model computes in the end, layer by layer."""
    torch.manual_seed(0)
    federation = _federation(*clients)
    rounds = list(federate(federation, rule, rank=rank, rate=RATE))
    return rounds, {name: federation.model.get_submodule(name)(torch.eye(n).double()).T for name, (_, n) in SIZES.items()}


def _changes(count: int, m: int = 9, n: int = 7, rank: int = 2) -> list[Change]:
    generator = torch.Generator().manual_seed(0)
    return [
        Change(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))) for _ in range(count)
    ]


def test_change_is_the_product() -> None:
    change, other = _changes(2)
    torch.testing.assert_close((change + 0.5 * other).dense(), change.B @ change.A + 0.5 * other.B @ other.A)
    torch.testing.assert_close((change - other).dense(), change.B @ change.A - other.B @ other.A)
    assert change.norm() == pytest.approx(float((change.B @ change.A).norm()))
    assert (change - change).norm() < 1e-14 * change.norm()


def test_average_of_changes_is_exact_and_of_factors_is_not() -> None:
    changes = _changes(3)
    mean = sum(change.B @ change.A for change in changes) / 3
    torch.testing.assert_close(average_changes(changes).dense(), mean)
    apart = average_factors(changes)
    torch.testing.assert_close(apart.A, sum(change.A for change in changes) / 3)
    assert len(apart.A) == 2
    assert (apart.dense() - mean).norm() > 0.3 * mean.norm()
    for average in (average_changes, average_factors):
        torch.testing.assert_close(average([changes[0]] * 4).dense(), changes[0].dense())


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9), (3, 7)])
def test_truncation_is_optimal(m: int, n: int) -> None:
    mean = average_changes(_changes(3, m, n))
    dense = mean.dense()
    U, sigma, Vh = torch.linalg.svd(dense, full_matrices=False)
    nearest = truncated(mean, 2)
    assert nearest.A.shape == (2, n)
    torch.testing.assert_close(nearest.dense(), U[:, :2] * sigma[:2] @ Vh[:2])
    assert float((nearest.dense() - dense).norm()) == pytest.approx(float(sigma[2:].norm()))  # Eckart and Young
    torch.testing.assert_close(nearest.A.norm(dim=1), nearest.B.norm(dim=0))
    torch.testing.assert_close(truncated(mean, 6).dense(), dense)
    assert truncated(Change(mean.A.float(), mean.B.float()), 2).A.dtype == torch.float32


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40)])
def test_aligned_to_the_gradient(m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(m, n, generator=generator, dtype=torch.float64)
    gradient = gradient @ torch.diag(torch.logspace(0, -6, n).double())
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    state = torch.random.get_rng_state()
    change = aligned(gradient, 3, gamma=16.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    scale = m**0.25 / 4
    torch.testing.assert_close((change.A @ Vh[:3].T).abs(), scale * torch.eye(3).double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((U[:, 3:6].T @ change.B).abs(), scale * torch.eye(3).double(), atol=1e-6, rtol=1e-6)
    whole = aligned(gradient, min(m, n), gamma=16.0)
    assert torch.linalg.matrix_rank(whole.dense()) == min(m, n)
    with pytest.raises(ValueError, match="rank of 31 is more than the 30"):
        aligned(gradient, 31, gamma=16.0)


def _trained_plainly(client: Client, rank: int, gamma: float) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses of plain LoRA-GA training, merged after each round: dense matrices, no server."""
    model = TwoLayers()
    losses = []
    for number, batches in enumerate(client.batches):
        weights = {name: model.get_submodule(name).weight.detach().clone() for name in SIZES}
        total = sum(_loss(model, batch) for batch in batches) / len(batches)
        gradients = torch.autograd.grad(total, [model.get_submodule(name).weight for name in SIZES])
        starts = {name: aligned(gradient, rank, gamma) for name, gradient in zip(SIZES, gradients, strict=True)}
        factors = {name: Change(start.A.clone().requires_grad_(), start.B.clone().requires_grad_()) for name, start in starts.items()}
        parameters = [*(factor.A for factor in factors.values()), *(factor.B for factor in factors.values())]
        optimizer = torch.optim.AdamW(parameters, lr=RATE * cosine(number, len(client.batches)), weight_decay=0.0)

        def current(weights: dict = weights, starts: dict = starts, factors: dict = factors) -> dict[str, Tensor]:
            return {f"{name}.weight": weights[name] - starts[name].dense() + factors[name].dense() for name in SIZES}

        for batch in batches:
            optimizer.zero_grad()
            outputs = torch.func.functional_call(model, current(), batch["inputs"])
            (outputs - batch["targets"]).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        for name in SIZES:
            model.get_submodule(name).weight.data = current()[f"{name}.weight"].detach()
        losses.append(client.validate(model))
    return {name: model.get_submodule(name).weight.detach() for name in SIZES}, losses


def test_one_client_trains_as_if_alone() -> None:
    client = _client(0)
    rounds, weights = _run(FedSmooth(gamma=4.0), client, rank=FULL)
    alone, losses = _trained_plainly(client, FULL, gamma=4.0)
    for name in SIZES:
        torch.testing.assert_close(weights[name], alone[name])
    assert [end.served[0] for end in rounds] == pytest.approx(losses)
    assert [end.ended[0] for end in rounds] == pytest.approx(losses)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("rule", [FedSmooth(1.0, 1.0), FedAvg(), FullRank()])
def test_identical_clients_are_one(rule: Rule) -> None:
    client = _client(0)
    alone, weights = _run(rule, client)
    together, same = _run(rule, client, client, client)
    for name in SIZES:
        torch.testing.assert_close(weights[name], same[name])
    assert [end.served[0] for end in alone] == pytest.approx([end.served[2] for end in together])
    assert all(end.aggregation_error < 1e-12 for end in together)


def test_full_rank_is_exact_and_factors_apart_are_not() -> None:
    clients = [_client(seed) for seed in range(3)]
    assert all(end.aggregation_error < 1e-12 for end in _run(FullRank(), *clients)[0])
    # Less from round to round, as what all clients start from grows and the rate falls.
    averaged = zip(_run(FedAvg(), *clients)[0], (0.05, 0.02, 1e-3), strict=True)
    assert [end.aggregation_error > limit for end, limit in averaged] == [True] * 3
    truncating, enough = (_run(FedSmooth(1.0, 1.0), *clients, rank=rank)[0] for rank in (RANK, FULL))
    assert all(end.aggregation_error > 0.05 for end in truncating)
    assert all(few.aggregation_error > many.aggregation_error for few, many in zip(truncating, enough, strict=True))


def test_clients_take_up_work_where_they_stopped() -> None:
    clients = [_client(seed) for seed in range(3)]
    smooth = _run(FedSmooth(1.0, 1.0, gamma=4.0), *clients, rank=FULL)[0]
    assert smooth[0].jump is None
    for before, after in zip(smooth, smooth[1:], strict=False):
        assert after.started == pytest.approx(before.ended)
        assert after.jump == pytest.approx(0, abs=1e-9)
    for rule in (FedAvg(), FullRank(), FedSmooth(0.0, 0.0, gamma=4.0)):
        rounds = _run(rule, *clients, rank=FULL)[0]
        for before, after in zip(rounds, rounds[1:], strict=False):
            assert after.started == pytest.approx(before.served)  # all from the server's model
            assert after.jump is not None
            assert after.jump > 0.01


def test_rank_limits_how_smooth_it_is() -> None:
    clients = [_client(seed) for seed in range(3)]
    jumps = {rank: [end.jump or 0.0 for end in _run(FedSmooth(1.0, 1.0, gamma=4.0), *clients, rank=rank)[0][1:]] for rank in (1, 2, FULL)}
    assert sum(map(abs, jumps[1])) > sum(map(abs, jumps[FULL]))
    assert sum(map(abs, jumps[2])) > sum(map(abs, jumps[FULL]))


def test_small_aligned_part_leaves_room_for_matching() -> None:
    clients = [_client(seed) for seed in range(3)]
    jumps = [[abs(end.jump or 0.0) for end in _run(FedSmooth(1.0, 1.0, gamma), *clients)[0][1:]] for gamma in (4.0, 64.0)]
    assert sum(jumps[1]) < 0.5 * sum(jumps[0])


def test_matched_throughout_clients_never_meet() -> None:
    """With ζ = 1 and nothing truncated, a client's start is the same whoever else takes part; from the server's model it is not."""
    own, some, other = (_client(seed) for seed in range(3))
    for rule, alone in ((FedSmooth(1.0, 1.0, gamma=4.0), True), (FedSmooth(0.5, 0.5, gamma=4.0), False), (FedAvg(), False)):
        with_some, with_other = (_run(rule, own, another, rank=FULL)[0] for another in (some, other))
        assert with_some[0].ended[0] == with_other[0].ended[0]
        assert (with_some[1].started[0] == pytest.approx(with_other[1].started[0])) is alone


def test_first_step_starts_at_the_base() -> None:
    client = _client(0)
    base = client.validate(TwoLayers())
    for rule in (FedSmooth(gamma=4.0), FedAvg(), FullRank()):
        assert _run(rule, client)[0][0].started == pytest.approx([base])


def test_zeta_falls_by_a_cosine() -> None:
    assert [cosine(number, 4) for number in range(5)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_same_seed_same_rounds() -> None:
    clients = [_client(seed) for seed in range(2)]
    for rule in (FedSmooth(), FedAvg(), FullRank()):
        assert _run(rule, *clients)[0] == _run(rule, *clients)[0]


def test_refuses_clients_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"2 clients have batches for \[2, 3\] rounds"):
        _run(FedAvg(), _client(0), _client(1, rounds=2))
    with pytest.raises(ValueError, match="0 clients"):
        _run(FedAvg())


def test_command_writes_a_line_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "smollm2_federation", lambda *_, **__: _federation(_client(0), _client(1)))
    result = CliRunner().invoke(_app(), [str(tmp_path / "rounds.jsonl"), "--method", "fedavg", "--rank", "2"])
    assert result.exit_code == 0, result.output
    first, *rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert first["options"]["method"] == "fedavg"
    assert len(first["base"]) == 2
    assert [end["number"] for end in rounds] == [0, 1, 2]
    assert rounds[0]["jump"] is None
    assert len(rounds[1]["served"]) == 2


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.main)
    return app
