"""Preparing at LLaVA-1.5-7B's exact shape in bfloat16: bare forward passes, collection, decomposition, attaching; time, floor and memory.

256 samples of 576 image and 64 text tokens, all linears of the language model, rank 128. KPM is decomposed on all 32 blocks and IPM on the
first eight, as time is short. Before that each shape of layer by itself, and a profile of one batch's collection and of one block's
decomposition.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from corda_core import AdapterPlan, Covariance, attach, collect, decompose, plan
from corda_core.covariance import multiplies_halves
from corda_eval.bench.gpu.measure import Peak, Record, Speeds, seconds_of, seconds_once
from corda_eval.bench.gpu.shapes import (
    RANK,
    forward_flops,
    gram_flops,
    language_linears,
    least_seconds,
    llava_7b,
    llava_batches,
    num_tokens,
)

SAMPLES, BATCH = 256, 8
IPM_BLOCKS = 8


def run(record: Record) -> None:
    """Measure."""
    device, small = record.device, record.small
    speeds, rank = Speeds.of(device), 8 if small else RANK
    model = llava_7b(device, small)
    names = language_linears(model)
    batches = llava_batches(model, 8 if small else SAMPLES, 4 if small else BATCH)
    record.say(parameters=sum(p.numel() for p in model.parameters()), layers=len(names), tokens=num_tokens(batches), rank=rank)
    forward = _measure_forward(record, model, batches, speeds)
    collect(model, batches[:1], names)  # warms up
    peak = Peak(device)
    seconds, covariances = seconds_once(lambda: collect(model, batches, names), device)
    flops = gram_flops(model, names, num_tokens(batches))
    rate = speeds.bfloat16 if multiplies_halves(torch.empty(0, device=device, dtype=model.dtype)) else speeds.float32
    floor = forward_flops(model, batches) / speeds.bfloat16 + flops / rate
    record.measured("collection", seconds, "s", floor=floor, from_counts=f"forward and {flops / 1e12:.4g} TFLOP of products")
    record.measured("collection over bare forward", seconds / forward, "ratio", aim="<= 1.6")
    record.measured("peak of collection beyond the base", peak.extra, "GB")
    _measure_layers(record, model, covariances, names, rank, speeds)
    _profile(record, model, batches, covariances, rank)
    _measure_plans(record, model, covariances, names, rank, speeds)


def _measure_forward(record: Record, model: Any, batches: Sequence[dict[str, Any]], speeds: Speeds) -> float:
    """Return the seconds of bare forward passes."""

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    with torch.no_grad():
        model(**batches[0])
    peak = Peak(record.device)
    seconds, _ = seconds_of(forward, record.device, repeats=2, warm_up=0)
    flops = forward_flops(model, batches)
    record.measured("bare forward", seconds, "s", floor=flops / speeds.bfloat16, from_counts=f"{flops / 1e12:.4g} TFLOP")
    record.measured("the base", peak.before, "GB")
    return seconds


def _measure_layers(
    record: Record, model: Any, covariances: dict[str, Covariance], names: Sequence[str], rank: int, speeds: Speeds
) -> None:
    """Decompose one layer of each shape in both modes, without what a plan does beside it."""
    for projection in ("q_proj", "gate_proj", "down_proj"):
        name = next(name for name in names if name.endswith(projection))
        weight = model.get_submodule(name).weight.detach()
        for mode in ("kpm", "ipm"):
            seconds, done = seconds_of(partial(decompose, weight, covariances[name], rank, mode), record.device, repeats=2)
            floor = least_seconds([weight], rank, mode, speeds.float32, speeds.float64, with_energy=False)
            title = f"one {weight.shape[0]} × {weight.shape[1]}, {mode}"
            record.measured(title, seconds, "s", floor=floor, from_counts=f"rank {rank}{', fell back' * done.fell_back}")


def _measure_plans(record: Record, model: Any, covariances: dict[str, Covariance], names: Sequence[str], rank: int, speeds: Speeds) -> None:
    """Decompose in both modes, and attach what KPM made."""
    plans: dict[str, AdapterPlan] = {}
    peak = Peak(record.device)
    for mode, blocks in (("kpm", 32), ("ipm", IPM_BLOCKS)):
        chosen = block_of(names, blocks)
        plan_of(model, {name: covariances[name] for name in block_of(names, 1)}, mode, rank)  # warms up
        own = {name: covariances[name] for name in chosen}
        seconds, plans[mode] = seconds_once(partial(plan_of, model, own, mode, rank), record.device)
        weights = [model.get_submodule(name).weight for name in chosen]
        floor = least_seconds(weights, rank, mode, speeds.float32, speeds.float64) + _hashing(weights, speeds)
        counts = f"{len(chosen)} layers, float64 at {speeds.float64 / 1e12:.3g} and float32 at {speeds.float32 / 1e12:.3g} TFLOP/s"
        record.measured(f"decomposition, {mode}", seconds, "s", floor=floor, aim="<= 2 × its floor", from_counts=counts)
        record.say(**{f"fallbacks, {mode}": len(plans[mode].provenance["fallbacks"])})
    record.measured("peak of decomposition", peak.whole, "GB", aim="<= 40")
    peak = Peak(record.device)
    seconds, adapted = seconds_once(lambda: attach(model, plans["kpm"], protect="strict"), record.device)
    weights = [model.get_submodule(name).weight for name in names]
    record.measured("attaching", seconds, "s", floor=_hashing(weights, speeds), aim="<= 2 × its floor", from_counts="hashing the weights")
    record.measured("peak of attaching beyond what is held", peak.extra, "GB")
    adapted.unload()


def plan_of(model: Any, covariances: dict[str, Covariance], mode: str, rank: int) -> AdapterPlan:
    """Return the plan of these layers."""
    return plan(model, covariances, mode=mode, rank=rank)


def block_of(names: Sequence[str], count: int) -> list[str]:
    """Return the layers of the first blocks."""
    return [name for name in names if int(name.partition(".layers.")[2].partition(".")[0]) < count]


def _hashing(weights: Sequence[torch.Tensor], speeds: Speeds) -> float:
    """Return what hashing the weights takes at least."""
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return num_bytes / (speeds.hashed * min(8, torch.get_num_threads()))


def _profile(record: Record, model: Any, batches: Sequence[dict[str, Any]], covariances: dict[str, Covariance], rank: int) -> None:
    """Write down where the time goes, by kernels of the device and by what the processor does."""
    first = block_of(list(covariances), 1)
    own = {name: covariances[name] for name in first}
    names = list(covariances)
    regions: dict[str, Callable[[], Any]] = {
        "one batch's collection": lambda: collect(model, batches[:1], names),
        "one block's decomposition, kpm": lambda: plan_of(model, own, "kpm", rank),
        "one block's decomposition, ipm": lambda: plan_of(model, own, "ipm", rank),
    }
    on_device = record.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    for title, region in regions.items():
        with profile(activities=activities) as profiled:
            seconds_once(region, record.device)
        events = profiled.key_averages()
        by_device = sorted(events, key=lambda event: -event.self_device_time_total)[:12] if on_device else []
        by_cpu = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
        record.say(
            **{
                f"profile of {title}, ms": {
                    "device": {event.key[:90]: [event.self_device_time_total / 1e3, event.count] for event in by_device},
                    "processor": {event.key[:90]: [event.self_cpu_time_total / 1e3, event.count] for event in by_cpu},
                }
            }
        )
