"""A training step at 8 × 2,048 tokens of LLaVA-1.5-7B's shape with checkpointing: PEFT's LoRA, our forms, and beside a kept context.

Each side is put on, warmed up and timed for some steps; LoRA comes first and last, which tells how far the machine wandered. The adapters
start at random: what a step takes does not depend on where it starts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from corda_core import AdapterPlan, Mode, attach
from corda_core.plan import random_plan
from corda_eval.bench.gpu.measure import Peak, Record, Speeds, seconds_once
from corda_eval.bench.gpu.shapes import RANK, forward_flops, language_linears, llava_7b, llava_batches, num_tokens

SAMPLES, LENGTH, STEPS = 8, 2048, 3
KEPT, KEPT_LENGTH = 2, 512
SIDES = ("lora", "strict", "start", "keep", "subtract", "lora again")
AIMS = {"strict": "<= 0.95", "start": "<= 1.02", "subtract": "<= 1.02"}


def run(record: Record) -> None:
    """Measure."""
    device, small = record.device, record.small
    model, rank = llava_7b(device, small), 8 if small else RANK
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    text = 48 if small else LENGTH - 576
    batch = llava_batches(model, 2 if small else SAMPLES, SAMPLES, text=text, train=True)[0]
    speeds, tokens = Speeds.of(device), num_tokens([batch])
    # Forward, again for the checkpoints, and gradients of activations; none of the base's weights.
    floor = 3 * forward_flops(model, [batch]) / speeds.bfloat16
    adapter = _random_kpm(model, rank)
    seconds: dict[str, float] = {}
    for side in SIDES:
        peak = Peak(device)
        try:
            adapted, extra = _attached(side, model, adapter, rank, small)
        except ModuleNotFoundError as error:
            record.say(**{f"left out: {side}": str(error)})
            continue
        seconds[side] = _seconds_a_step(adapted, batch, extra, device, 2 if small else STEPS)
        record.measured(f"{side}: a step", seconds[side], "s", floor=floor, from_counts="three forward passes' products")
        record.measured(f"{side}: tokens a second", tokens / seconds[side], "tokens/s")
        record.measured(f"{side}: peak of memory", peak.whole, "GB")
        record.measured(f"{side}: of LoRA's step", seconds[side] / seconds["lora"], "ratio", aim=AIMS.get(side, ""))
        model = adapted.unload()
        del adapted, extra


def _random_kpm(model: Any, rank: int) -> AdapterPlan:
    """Return a plan of random A0 and B0 that stands for one in knowledge-preserved mode."""
    drawn = random_plan(model, language_linears(model), rank)
    layers = {name: replace(init, B0=1e-3 * torch.randn(init.B0.shape)) for name, init in drawn.layers.items()}
    return replace(drawn, layers=layers, mode=Mode.KPM)


def _attached(side: str, model: Any, adapter: AdapterPlan, rank: int, small: bool) -> tuple[Any, Callable[[int], Tensor | None] | None]:
    """Return the model with a side's adapter on it, and what is added to the loss of each step."""
    if side.startswith("lora"):
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapter.layers))), None
    if side == "subtract":  # last of ours, as it changes the base's weights
        return attach(model, adapter, protect="start", residual="subtract"), None
    keeper_class, options = _keeper() if side == "keep" else (None, None)
    adapted = attach(model, adapter, protect="start" if side == "start" else "strict")
    if keeper_class is None:
        return adapted, None
    length = 32 if small else KEPT_LENGTH
    kept = [{"input_ids": torch.randint(5, 31000, (1, length), device=model.device)} for _ in range(4)]

    def joined(samples: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([sample["input_ids"] for sample in samples])}

    keeper = keeper_class(adapted, kept, joined, options, batch_size=KEPT, num_steps=16)
    return adapted, keeper.loss


def _keeper() -> tuple[Any, Any]:
    """Return what holds a training to its base, and its options.

    Raises:
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    # Imported here: it needs pydantic, without which the rest can be measured.
    from corda_vlm.training.keep import Keeper, KeepOptions

    return Keeper, KeepOptions(batch_size=KEPT)


def _seconds_a_step(
    adapted: Any, batch: dict[str, Any], extra: Callable[[int], Tensor | None] | None, device: torch.device, steps: int
) -> float:
    """Return the median seconds of some steps after one that warms up."""
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-5)
    adapted.train()

    def step(number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = adapted(**batch).loss
            held = None if extra is None else extra(number)
        (loss if held is None else loss + held).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    return median(seconds_once(partial(step, number), device)[0] for number in range(1, steps + 1))
