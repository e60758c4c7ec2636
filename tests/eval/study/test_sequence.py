"""Tasks in a row on a network of two layers: what is merged, remembered and measured."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_worker import Toy
from torch import Tensor, nn
from torch.nn import functional as F

from corda_eval.study import sequence
from corda_eval.study.sequence import InTurn, average, backward_transfer, run_in_turn
from corda_eval.study.task import TARGET, Score, Task

STRICT = {"method": "corda", "rank": 6, "protect": "strict", "context": ["files"]}


@dataclass(frozen=True)
class Halves(Toy):
    """Learn to negate one half of the inputs alone: the other half is 0, and its outputs are another task's."""

    first: bool = True

    def task(self, seed: int, cache: Path) -> Task:
        """Return model and data."""
        task = super().task(seed, cache)
        mask = (torch.arange(12) < 6) == self.first
        batches = [{"x": batch["x"] * mask} for batch in task.batches]
        test = torch.randn(64, 12, generator=torch.Generator().manual_seed(98)) * mask

        def loss(adapted: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(adapted(batch["x"])[:, mask], -batch["x"][:, mask])

        @torch.no_grad()
        def measure(adapted: nn.Module) -> dict[str, Score]:
            value = loss(adapted, {"x": test}).item()
            return task.measure(adapted) | {TARGET: Score(value, 100.0 * (value < 0.2))}

        contexts = {**task.contexts, TARGET: batches[:5]}
        return replace(
            task, loss=loss, batches=batches, measure=measure, contexts=contexts, validate=lambda model: measure(model)[TARGET].loss
        )


@pytest.fixture(autouse=True)
def _halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sequence.SETTINGS, "halves", Halves)


SETTING = InTurn([{"kind": "halves", "steps": 150, "first": True}, {"kind": "halves", "steps": 150, "first": False}])


def test_each_task_is_learned_and_the_matrix_tells_what_became_of_it(tmp_path: Path) -> None:
    base = run_in_turn(SETTING, None, 0.0, 0, tmp_path)
    run = run_in_turn(SETTING, {"method": "lora", "rank": 6}, 1e-2, 0, tmp_path)
    assert run["base_digest"] == base["base_digest"]
    assert (len(run["matrix"]), {len(row) for row in run["matrix"]}) == (3, {2})
    assert run["matrix"][0] == base["matrix"][0]
    assert run["matrix"][1][0][0] < 0.5 * base["matrix"][0][0][0]
    assert run["matrix"][2][1][0] < 0.5 * run["matrix"][1][1][0]
    assert run["scores"][TARGET]["loss"] == pytest.approx((run["matrix"][2][0][0] + run["matrix"][2][1][0]) / 2)
    assert run["validation_losses"] == [[300, pytest.approx(run["scores"][TARGET]["loss"], abs=1e-4)]]
    assert len(run["training_losses"]) == 300
    assert not run["diverged"]


def test_files_keep_the_base_and_the_past_task(tmp_path: Path) -> None:
    lora, files = (run_in_turn(SETTING, method, 1e-2, 0, tmp_path) for method in ({"method": "lora", "rank": 6}, STRICT))
    assert files["scores"]["kept"]["loss"] < 0.2 * lora["scores"]["kept"]["loss"]
    task = SETTING.drawn(0, tmp_path)[0]
    past = tuple(task.covariances(name) for name in ("kept", TARGET))
    known = replace(task, remembered=past).covariances("files")
    assert {name: C.num_tokens for name, C in known.items()} == {"first": 64 + 40, "second": 64 + 40}
    torch.testing.assert_close(known["first"].matrix, (64 * past[0]["first"].matrix + 40 * past[1]["first"].matrix) / 104)
    with pytest.raises(ValueError, match="The context files is not one of"):
        task.covariances("files")


def test_summaries_of_a_matrix() -> None:
    matrix = [
        [[9.0, 0.0]] * 3,
        [[1.0, 90.0], [9.0, 0.0], [9.0, 0.0]],
        [[2.0, 80.0], [1.0, 70.0], [9.0, 0.0]],
        [[3.0, 60.0], [1.5, 66.0], [1.0, 90.0]],
    ]
    assert (average(matrix), average(matrix, 0)) == (72.0, pytest.approx(5.5 / 3))
    assert (backward_transfer(matrix), backward_transfer(matrix, 0)) == (pytest.approx(-17.0), pytest.approx(1.25))


def test_what_cannot_be_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tasks has 1 entries; expected at least two settings"):
        InTurn([{"kind": "halves"}])
    with pytest.raises(ValueError, match="The method 'full' leaves no adapter to merge"):
        run_in_turn(SETTING, {"method": "full"}, 1e-3, 0, tmp_path)
    diverged = run_in_turn(
        InTurn([{"kind": "halves", "bad_after": 3}, {"kind": "halves"}]), {"method": "lora", "rank": 2}, 1e-2, 0, tmp_path
    )
    assert diverged["diverged"]
