"""LoRA in other forms: some layers, A frozen, a distance penalty, intruders reduced, draws of CorDA++."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from test_neighbours import changes, weights
from tiny_study import TALL, WIDE, tiny_task

from corda_core import lora_layers, plan
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.intruders import Intruders
from corda_eval.study.methods.l2_sp import L2Sp, squared_norm
from corda_eval.study.methods.lora import Lora
from corda_eval.study.methods.milora import Milora
from corda_eval.study.methods.part import Part
from corda_eval.study.task import Adapted
from corda_eval.study.train import train

LORA = {"method": "lora", "rank": 3}


def trainable(adapted: Adapted) -> set[str]:
    return {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("adapter", [LORA, {"method": "corda", "rank": 3, "protect": "strict"}])
def test_a_part_of_the_layers_changes_and_no_other(adapter: dict[str, Any], tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    before = weights(task)
    adapted = Part(adapter, "^wi").adapt(task)
    train(adapted, task, 1e-2)
    after = changes(adapted, before)
    assert float(after[WIDE].abs().max()) > 1e-4
    assert float(after[TALL].abs().max()) < 1e-12
    with pytest.raises(ValueError, match="No layer contains 'attn'; expected part of a name such as wide"):
        Part(adapter, "attn").adapt(tiny_task(tmp_path))


def test_a_frozen_a_stays_as_it_was_drawn(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    adapted = Lora(3, freeze_a=True).adapt(task)
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(adapted.model).items()}
    assert all("lora_B" in name for name in trainable(adapted))
    run = train(adapted, task, 1e-2)
    assert run.validation_losses[-1][1] < run.validation_losses[0][1]
    assert all(torch.equal(layer.lora_A["default"].weight, before[name]) for name, layer in lora_layers(adapted.model).items())


def test_strict_without_a_context_is_frozen_at_the_smallest_components_of_the_weight(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    before = weights(task)
    adapted = Milora(3, protect="strict").adapt(task)  # type: ignore[arg-type]
    assert all("lora_B" in name for name in trainable(adapted))
    for name, layer in lora_layers(adapted.model).items():
        rows = torch.linalg.qr(layer.lora_A["default"].weight.T.double()).Q.T
        last = torch.linalg.svd(before[name], full_matrices=False).Vh[-3:]
        torch.testing.assert_close(rows.T @ rows, last.T @ last, rtol=0, atol=1e-5)


def test_a_longer_warm_up_begins_slower(tmp_path: Path) -> None:
    moved = []
    for warmup in (0.03, 0.5):
        task = tiny_task(tmp_path)
        before = weights(task)
        adapted = Lora(3, warmup=warmup).adapt(task)
        train(adapted, replace(task, batches=task.batches[:4]), 1e-2)
        moved.append(sum(float(change.norm()) for change in changes(adapted, before).values()))
    assert moved[1] < moved[0]


def test_l2_sp_is_the_squared_norm_of_the_change(tmp_path: Path) -> None:
    A, B = torch.randn(3, 12, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(squared_norm(A, B), (B @ A).square().sum())
    sizes = []
    for strength in (1e-3, 10.0):
        task = tiny_task(tmp_path)
        before = weights(task)
        adapted = L2Sp(3, strength).adapt(task)
        assert adapted.penalty is not None
        train(adapted, task, 1e-2)
        squares = sum(change.square().sum() for change in changes(adapted, before).values())
        torch.testing.assert_close(adapted.penalty(), strength * squares, rtol=1e-4, atol=1e-9, check_dtype=False)
        sizes.append(float(squares))
    assert sizes[1] < 0.2 * sizes[0]


def test_intruders_are_reduced_as_peft_does_after_the_training(tmp_path: Path) -> None:
    results = []
    for method in (Lora(3), Intruders(3, epsilon=0.99)):
        task = tiny_task(tmp_path)
        before = weights(task)
        torch.manual_seed(0)
        adapted = method.adapt(task)
        run = train(adapted, task, 1e-1)
        if isinstance(method, Lora):
            plain = changes(adapted, before)
            reduce_intruder_dimension(adapted.model, threshold_epsilon=0.99, logging_sink=None)
        results.append(changes(adapted, before))
    assert run.finish["layers_with_intruders"] > 0
    for name, change in results[0].items():
        torch.testing.assert_close(results[1][name], change)
    assert any(not torch.allclose(plain[name], results[0][name]) for name in plain)


def frozen_rows(adapted: Adapted) -> dict[str, torch.Tensor]:
    return {name: layer.lora_A["default"].weight for name, layer in lora_layers(adapted.model).items()}


def test_each_layer_takes_the_best_of_several_draws_or_a_rank_or_both(tmp_path: Path) -> None:
    """A draw is the next so many batches of the domain; switches are apart."""
    options: dict[str, Any] = {"rank": 2, "protect": "strict", "context": ["first"], "context_batches": 1}
    task = tiny_task(tmp_path, tokens=20)
    draws = [task.covariances("first", first=1, draw=number) for number in range(3)]
    whole = task.contexts["first"][1]["x"].flatten(0, 1)
    torch.testing.assert_close(draws[1][WIDE].matrix.double(), whole.T @ whole / len(whole), rtol=1e-4, atol=1e-6)
    singles = [plan(task.model, some, mode="kpm", rank=2) for some in draws]
    with pytest.raises(ValueError, match="too short for 4 draws of 1 batches"):
        task.covariances("first", first=1, draw=3)
    best = frozen_rows(Corda(**options, draws=3).adapt(task))
    for name, rows in best.items():
        assert any(torch.allclose(rows, single.layers[name].A0.to(rows), atol=1e-6) for single in singles)
    ranks = {}
    for kind, draws_of in (("allocated", 1), ("both", 3)):
        adapted = Corda(**options, draws=draws_of, allocated=True).adapt(tiny_task(tmp_path, tokens=20))
        ranks[kind] = {name: len(rows) for name, rows in frozen_rows(adapted).items()}
        assert sum(ranks[kind][name] * sum(shape) for name, shape in ((WIDE, (8, 12)), (TALL, (10, 8)))) <= 2 * (20 + 18)
    with pytest.raises(ValueError, match="with context_batches, the size of a draw"):
        Corda(2, draws=2).adapt(tiny_task(tmp_path))
