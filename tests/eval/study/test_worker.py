"""One run of a study, and its training loop, on a network of two layers."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corda_eval.study import worker as study_run
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.lora import Lora
from corda_eval.study.task import TARGET, Adapted, Score, Task
from corda_eval.study.train import train
from corda_eval.study.worker import RunSpec, run

INPUTS, HIDDEN = 12, 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


@dataclass(frozen=True)
class Toy:
    """Learn to negate what has many directions, and keep what is done with inputs of three."""

    steps: int = 30
    bad_after: int | None = None

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        torch.manual_seed(0)
        model = Net().eval().requires_grad_(False)
        kept = torch.randn(64, 3) @ torch.randn(3, INPUTS)
        with torch.no_grad():
            answers = model(kept)
        generator = torch.Generator().manual_seed(seed)
        batches = [{"x": torch.randn(8, INPUTS, generator=generator)} for _ in range(self.steps)]
        if self.bad_after is not None:
            batches[self.bad_after]["x"][0, 0] = math.inf
        test = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(99))

        def loss(adapted: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(adapted(batch["x"]), -batch["x"])

        @torch.no_grad()
        def measure(adapted: nn.Module) -> dict[str, Score]:
            right = (adapted(test) + test).abs().mean() < 0.5
            return {
                TARGET: Score(loss(adapted, {"x": test}).item(), 100.0 * right.item()),
                "kept": Score(F.mse_loss(adapted(kept), answers).item()),
            }

        return Task(
            model=model,
            layers=("first", "second"),
            loss=loss,
            batches=batches,
            contexts={"kept": [{"x": kept}], TARGET: batches[:5]},
            validate=lambda adapted: measure(adapted)[TARGET].loss or 0.0,
            measure=measure,
            cache=cache,
            seed=seed,
        )


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study_run.SETTINGS, "toy", Toy)


def test_the_base_is_measured_and_nothing_else(tmp_path: Path) -> None:
    result = run(RunSpec({"kind": "toy"}, None, 0.0, 0, []), tmp_path)
    assert result["scores"]["kept"] == {"loss": 0.0, "accuracy": None}
    assert result["kept_guessing"] == {}
    assert result["validation"] == result["scores"][TARGET]["loss"]
    trained = run(RunSpec({"kind": "toy"}, {"method": "lora", "rank": 4}, 1e-2, 0, []), tmp_path)
    assert trained["base_digest"] == result["base_digest"]
    assert trained["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_items_of_scores_are_whole_numbers() -> None:
    plain = study_run.plain_scores({"a": Score.of([0.0014, 2.0], [True, False]), "b": Score.of([math.inf, 1.0]), "c": Score(1.0)})
    assert plain == {
        "a": {"loss": pytest.approx(1.0007), "accuracy": 50.0, "losses": [1, 2000], "right": [1, 0]},
        "b": {"loss": math.inf, "accuracy": None},
        "c": {"loss": 1.0, "accuracy": None},
    }
    assert study_run.plain_scores({"a": Score.of([1.0], [True])}, items=False) == {"a": {"loss": 1.0, "accuracy": 100.0}}


@pytest.mark.parametrize(
    "method", [{"method": "lora", "rank": 4}, {"method": "corda", "rank": 4}, {"method": "corda", "rank": 4, "protect": "strict"}]
)
def test_a_run_learns_and_tells_what_it_took(method: dict[str, Any], tmp_path: Path) -> None:
    spec = RunSpec({"kind": "toy"}, method, 1e-2, 0, [0.5])
    result = run(spec, tmp_path)
    assert RunSpec(**result["spec"]) == spec
    losses = [loss for _, loss in result["validation_losses"]]
    assert len(losses) == 11
    assert losses[-1] < losses[0]
    assert len(result["training_losses"]) == 30
    assert not result["diverged"]
    assert result["scores"][TARGET]["loss"] == pytest.approx(losses[-1], abs=1e-5)
    assert result["change"] > 0
    assert result["change_on_context"] > 0
    assert 0 < result["interpolated"]["0.5"]["kept"]["loss"] < max(result["scores"]["kept"]["loss"], 1e-9) * 1.5
    expected = 2 * 4 * (INPUTS + HIDDEN)
    assert result["trainable_parameters"] == (4 * (INPUTS + HIDDEN) if method.get("protect") == "strict" else expected)
    assert result["peak_memory_gb"] > 0


def test_equal_runs_have_equal_results_and_other_seeds_other_ones(tmp_path: Path) -> None:
    spec = RunSpec({"kind": "toy"}, {"method": "lora", "rank": 4}, 1e-2, 1, [])
    first, second, other = run(spec, tmp_path), run(spec, tmp_path), run(dataclasses.replace(spec, seed=2), tmp_path)
    assert first["training_losses"] == second["training_losses"] != other["training_losses"]
    assert first["scores"] == second["scores"]


def test_what_the_context_has_is_kept_by_strict_protection(tmp_path: Path) -> None:
    forgotten = {}
    for name, method in {"lora": {"method": "lora", "rank": 4}, "strict": {"method": "corda", "rank": 6, "protect": "strict"}}.items():
        forgotten[name] = run(RunSpec({"kind": "toy", "steps": 60}, method, 1e-2, 0, []), tmp_path)["change_on_context"]
    assert forgotten["strict"] < 0.5 * forgotten["lora"]


def test_a_loss_that_is_not_finite_is_a_result(tmp_path: Path) -> None:
    result = run(RunSpec({"kind": "toy", "bad_after": 10}, {"method": "lora", "rank": 4}, 1e-2, 0, []), tmp_path)
    assert result["diverged"]
    assert "scores" not in result
    assert len(result["training_losses"]) == 11


def test_penalty_and_decay_reach_the_optimiser(tmp_path: Path) -> None:
    ends = []
    for strength in (0.0, 100.0):
        task = Toy().task(0, tmp_path)
        adapted = Lora(4).adapt(task)
        weights = [parameter for name, parameter in adapted.model.named_parameters() if "lora_B" in name]

        def penalty(weights: list[nn.Parameter] = weights, strength: float = strength) -> Tensor:
            return strength * sum((weight.square().sum() for weight in weights), torch.zeros(()))

        train(Adapted(adapted.model, penalty), task, 1e-2)
        ends.append(sum(weight.detach().norm().item() for weight in weights))
    assert ends[1] < 0.2 * ends[0]


def test_corda_plus_plus_spends_the_budget_of_constant_rank(tmp_path: Path) -> None:
    task = Toy().task(0, tmp_path)
    adapted = Corda(4, candidates=[["kept"], [TARGET]]).adapt(task)
    trained = sum(parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad)
    assert 0 < trained <= 2 * 4 * (INPUTS + HIDDEN)


@pytest.mark.parametrize(
    ("setting", "method", "words"),
    [
        ({"kind": "toys"}, None, "'toys' is unknown; expected kind: one of"),
        ({"kind": "toy", "step": 3}, None, "did you mean 'steps'"),
        ({"kind": "toy"}, {"method": "lorra", "rank": 2}, "'lorra' is unknown"),
        ({"kind": "toy"}, {"method": "corda", "rank": 2, "context": ["kept"], "candidates": [["kept"]]}, "both context and candidates"),
        ({"kind": "toy"}, {"method": "corda", "rank": 2, "context": ["photos"]}, "photos is not one of this setting's: kept, target"),
    ],
)
def test_wrong_options_are_named(setting: dict[str, Any], method: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run(RunSpec(setting, method, 1e-3, 0, []), tmp_path)
