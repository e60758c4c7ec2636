"""A base in nf4 at LLaVA-1.5-7B's shape: memory, collection and decomposition of eight blocks, and a training step of all."""

from statistics import median
from typing import Any

import torch

from corda_core import attach, collect, plan
from corda_core.linears import quantize_linears_
from corda_eval.bench.gpu.measure import Peak, Record, Speeds, seconds_once
from corda_eval.bench.gpu.prepare import block_of
from corda_eval.bench.gpu.shapes import RANK, language_linears, llava_7b, llava_batches, num_tokens

BLOCKS, SAMPLES, BATCH = 8, 64, 8
STEPS, STEP_SAMPLES, LENGTH = 3, 4, 2048


def run(record: Record) -> None:
    """Measure."""
    device, small = record.device, record.small
    speeds, rank = Speeds.of(device), 8 if small else RANK
    model = llava_7b(device, small)
    seconds, _ = seconds_once(lambda: quantize_linears_(model, language_linears(model)), device)
    record.measured("quantising", seconds, "s")
    peak = Peak(device)
    record.measured("the base in nf4", peak.before, "GB", floor=sum(_bytes(model)) / 1e9, from_counts="4.127 bits a quantised weight")
    names = block_of(language_linears(model), BLOCKS)
    batches = llava_batches(model.train(), 4 if small else SAMPLES, BATCH)  # in evaluation mode bitsandbytes packs anew on CPUs
    seconds, covariances = seconds_once(lambda: collect(model, batches, names), device)
    record.measured(f"collection of {BLOCKS} blocks, {num_tokens(batches)} tokens", seconds, "s")
    seconds, made = seconds_once(lambda: plan(model, covariances, mode="kpm", rank=rank), device)
    record.measured(f"decomposition of {len(names)} layers", seconds, "s")
    record.measured("peak beyond the base", peak.extra, "GB")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = attach(model, made, protect="strict")
    text = 48 if small else LENGTH - 576
    batch = llava_batches(model, 2 if small else STEP_SAMPLES, STEP_SAMPLES, text=text, train=True)[0]
    peak = Peak(device)
    seconds = _seconds_a_step(adapted, batch, device)
    floor = 3 * sum(2 * batch["input_ids"].numel() * count for count in _logical(model)) / speeds.bfloat16
    record.measured("a step", seconds, "s", floor=floor, from_counts="three forward passes' products with weights")
    record.measured("tokens a second", batch["input_ids"].numel() / seconds, "tokens/s")
    record.measured("peak of memory of a step", peak.whole, "GB", aim="<= 24")


def _seconds_a_step(adapted: Any, batch: dict[str, Any], device: torch.device) -> float:
    """Return the median seconds of a training step."""
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-5)
    adapted.train()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return median(seconds_once(step, device)[0] for _ in range(STEPS))


def _logical(model: Any) -> list[int]:
    """Return how many weights each quantised layer stands for."""
    modules = (module for module in model.modules() if type(module).__name__ == "Linear4bit")
    return [module.in_features * module.out_features for module in modules]


def _bytes(model: Any) -> list[float]:
    """Return how many bytes each tensor takes at least: half a byte and its scales for each quantised weight."""
    plain = [parameter.numel() * parameter.element_size() for parameter in model.parameters() if type(parameter).__name__ != "Params4bit"]
    return [*plain, *(count * 4.127 / 8 for count in _logical(model))]
