"""The bound on the drift: against dense float64 matrices, held at rates far too high, refusals, shards, files."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from corda_core import Covariance, attach, change_factors, collect, context_drift, load, lora_layers, plan, save, select_linears
from corda_core.drift import DriftBound
from corda_core.store import read_plan, save_plan

RANK = 6
IDS = torch.arange(2, 20).reshape(2, 9)
ADAPTERS = ("strict", "whitened", "start", "plain")

WORKER = """
import sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from safetensors.torch import save_file
from test_drift import adapted, moved_
from corda_core import change_factors, lora_layers
from corda_core.drift import DriftBound
dist.init_process_group("gloo")
result = {{}}
for how in ("ddp", "fsdp"):
    for protect in ("strict", "whitened", "start"):
        model, covariances = adapted(protect)
        moved_(model)
        wrapped = model
        if how == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard
            for block in model.get_base_model().model.layers:
                fully_shard(block)
            fully_shard(model)
        assert DriftBound(wrapped, 0.02, covariances if protect == "start" else None).hold_() == 0.02
        for name, layer in lora_layers(wrapped).items():
            A, B = change_factors(layer)
            result[f"{{how}} {{protect}} {{name}}"] = B @ A
save_file(result, f"{{sys.argv[1]}}/{{dist.get_rank()}}.safetensors")
dist.destroy_process_group()
"""


def context(model: nn.Module) -> dict[str, Covariance]:
    return collect(
        model, [{"input_ids": torch.randint(2, 20, (16, 32), generator=torch.Generator().manual_seed(1))}], select_linears(model)
    )


def adapted(protect: str, alpha: int = 2 * RANK) -> tuple[PeftModel, dict[str, Covariance]]:
    torch.manual_seed(0)
    model = tiny_llama()
    covariances = context(model)
    if protect == "plain":
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(covariances))), covariances
    made = plan(model, covariances, mode="kpm", rank=RANK, whiten=protect == "whitened")
    return attach(model, made, protect=protect, alpha=alpha), covariances


def moved_(model: nn.Module) -> None:
    """Train without training: some layers move far, some hardly."""
    generator = torch.Generator().manual_seed(2)
    for number, layer in enumerate(lora_layers(model).values()):
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor["default"].weight
            if weight.requires_grad:
                weight.data += 10.0 ** (2 * (number % 3) - 4) * torch.randn(weight.shape, generator=generator)


def step_(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate, weight_decay=0.0)


def dense_drift(model: PeftModel, covariances: dict[str, Covariance], damping: float = 0.0) -> dict[str, float]:
    """Return ``‖ΔW (C + λI)^(1/2)‖ / ‖W C^(1/2)‖`` in float64."""
    drift = {}
    for name, layer in lora_layers(model).items():
        A, B = (factor.double() for factor in change_factors(layer))
        W, C = layer.get_base_layer().weight.double(), covariances[name].matrix.double()
        damped = C + damping * C.diagonal().mean() * torch.eye(len(C))
        drift[name] = float((torch.trace(B @ A @ damped @ A.T @ B.T) / torch.trace(W @ C @ W.T)).sqrt())
    return drift


def root_mean_square(drifts: dict[str, float]) -> float:
    return math.sqrt(sum(drift**2 for drift in drifts.values()) / len(drifts))


@pytest.mark.parametrize("from_plan", [True, False])
@pytest.mark.parametrize("protect", ADAPTERS)
def test_drift_is_the_dense_ratio(protect: str, from_plan: bool) -> None:
    model, covariances = adapted(protect)
    if from_plan and protect in ("start", "plain"):
        with pytest.raises(ValueError, match="needs to know"):
            DriftBound(model, 0.02)
        return
    bound = DriftBound(model, 0.02, None if from_plan else covariances)
    assert bound.drift() < 1e-6
    optimiser = adamw(model, 1e-2)
    for _ in range(3):
        step_(model, optimiser)
    measured, expected = bound.drifts(), dense_drift(model, covariances)
    assert bound.drift() == pytest.approx(root_mean_square(measured))
    if from_plan and protect == "whitened":
        assert all(measured[name] > 0.9 * expected[name] for name in expected)
        expected = dense_drift(model, covariances, damping=0.01)
        assert measured == pytest.approx(expected, rel=0.11)
    else:
        assert measured == pytest.approx(expected, rel=1e-3)
        assert context_drift(model, covariances) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("protect", ADAPTERS)
def test_drift_is_held_after_each_step_at_rates_far_too_high(protect: str) -> None:
    model, covariances = adapted(protect)
    free, _ = adapted(protect)
    bound = DriftBound(model, 0.02, None if protect in ("strict", "whitened") else covariances)
    optimiser, other = adamw(model, 0.3), adamw(free, 0.3)
    for _ in range(5):
        step_(model, optimiser)
        step_(free, other)
        before = bound.drifts()
        assert bound.hold_() == 0.02
        after = bound.drifts()
        assert root_mean_square(after) == pytest.approx(0.02, rel=1e-4)
        assert root_mean_square(dense_drift(model, covariances)) <= 0.02 * (1.11 if protect == "whitened" else 1.001)
        if protect != "start":  # all layers alike
            assert after == pytest.approx({name: value * 0.02 / root_mean_square(before) for name, value in before.items()}, rel=1e-3)
    assert root_mean_square(dense_drift(free, covariances)) > 0.2


@pytest.mark.parametrize("protect", ["strict", "start"])
def test_nothing_is_changed_below_the_bound(protect: str) -> None:
    model, covariances = adapted(protect)
    optimiser = adamw(model, 1e-2)
    for _ in range(3):
        step_(model, optimiser)
    before = [parameter.clone() for parameter in model.parameters()]
    drift = root_mean_square(dense_drift(model, covariances))
    assert DriftBound(model, 1.01 * drift, covariances).hold_() == pytest.approx(drift, rel=1e-3)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert DriftBound(model, 0.5 * drift, covariances).hold_() == 0.5 * drift
    assert root_mean_square(dense_drift(model, covariances)) == pytest.approx(0.5 * drift, rel=1e-3)


def test_a_layer_that_gives_nothing_on_the_context_does_not_count() -> None:
    model, covariances = adapted("plain")
    name = "model.layers.1.mlp.up_proj"
    lora_layers(model)[name].get_base_layer().weight.data.zero_()
    bound = DriftBound(model, 0.02, covariances)
    step_(model, adamw(model, 1e-1))
    before = change_factors(lora_layers(model)[name])[1].norm()
    assert bound.hold_() == 0.02
    assert name not in bound.drifts()
    assert 0 < change_factors(lora_layers(model)[name])[1].norm() < before  # but it is taken back as the others are


def test_bfloat16_is_held_up_to_rounding() -> None:
    model, covariances = adapted("strict")
    for layer in lora_layers(model).values():
        layer.lora_B.to(torch.bfloat16)
    bound = DriftBound(model, 0.02)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(std=100)
    bound.hold_()
    assert root_mean_square(dense_drift(model, covariances)) == pytest.approx(0.02, rel=2e-3)


@pytest.mark.parametrize("value", [0.0, -0.02, float("nan"), float("inf")])
def test_a_bound_is_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"max_drift is .*; expected a finite number above 0"):
        DriftBound(adapted("strict")[0], value)


def test_every_layer_needs_a_covariance() -> None:
    model, covariances = adapted("plain")
    del covariances["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"has no covariance for model\.layers\.0\.mlp\.up_proj"):
        DriftBound(model, 0.02, covariances)


def test_plans_keep_what_the_bound_needs_and_older_ones_load_without(tmp_path: Path) -> None:
    model, covariances = adapted("strict")
    save(model, tmp_path / "new")
    again = load(tiny_base(), tmp_path / "new", is_trainable=True)
    step_(again, adamw(again, 1e-1))
    assert DriftBound(again, 0.02).hold_() == 0.02
    made = plan(tiny_base(), covariances, mode="kpm", rank=RANK)
    older = dataclasses.replace(made, layers={name: dataclasses.replace(init, energy=None) for name, init in made.layers.items()})
    save_plan(older, tmp_path / "old.safetensors")
    assert not any("energy" in key for key in load_file(tmp_path / "old.safetensors"))
    older = read_plan(tmp_path / "old.safetensors")[0]
    model = attach(tiny_base(), older, protect="strict")
    with pytest.raises(ValueError, match=r"that of model\.layers\.0\.self_attn\.q_proj is older; give it the context's covariances"):
        DriftBound(model, 0.02)
    assert DriftBound(model, 0.02, covariances).drifts().keys() == made.layers.keys()


def tiny_base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def test_two_processes_hold_as_one_does(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for protect in ("strict", "whitened", "start"):
        model, covariances = adapted(protect)
        moved_(model)
        assert DriftBound(model, 0.02, covariances if protect == "start" else None).hold_() == 0.02
        for name, layer in lora_layers(model).items():
            A, B = change_factors(layer)
            for found in (result[f"{how} {protect} {name}"] for result in results for how in ("ddp", "fsdp")):
                torch.testing.assert_close(found, B @ A, rtol=1e-4, atol=1e-6)
