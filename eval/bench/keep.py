"""What keeping costs: a training step of LoRA alone, and of the same with a context held by its KL to the base at every k-th step.

    python -m corda_eval.bench.keep --output runs/keep.jsonl

SmolLM2-135M-Instruct in float32 under bfloat16 casting, rank 16 on every linear layer but the output, AdamW. All sides run in one process,
a few steps of each in turns and every other round backwards, so that a busy machine is as busy for all; the table gives the median of the
rounds' seconds a step, by the clock and of the processor, and of their ratios to LoRA's. With ``every: k`` a round is k steps.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from corda_eval.bench.process import by_side, in_turns, median_of, median_ratio, recorded
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.records import table
from corda_eval.study.methods.keep import joined
from corda_eval.study.settings.shared import casting
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_vlm.training.keep import Keeper, KeepOptions
from corda_vlm.training.train import attach_lora

EVERY = (1, 2, 4, 8)
SIDES = ("lora", *(f"every {every}" for every in EVERY))
LENGTH, KEPT_LENGTH = 64, 128
"""Tokens of a window that is learned, and of what is kept."""


def bench(
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Windows of 64 tokens a step.")] = 4,
    kept: Annotated[int, typer.Option(help="Windows of 128 tokens of the context at a time.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON lines, one a run, are added here.")] = None,
) -> None:
    """Run the benchmark and print its table."""
    torch.manual_seed(0)
    model, names, tokenizer = smollm2_model()
    learned, other = (
        text_windows(text, tokenizer, length, 64) for text, length in zip(held_out_text(), (LENGTH, KEPT_LENGTH), strict=True)
    )
    adapted = attach_lora(model, names, 16)
    adapted.train()
    samples = [{"input_ids": window[None]} for window in other]
    keepers = {
        every: Keeper(adapted, samples, joined, KeepOptions(every=every, batch_size=kept), batch_size=kept, num_steps=64) for every in EVERY
    }
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-4)
    batches = [torch.stack(learned[start : start + batch_size]) for start in range(0, len(learned) - batch_size + 1, batch_size)]

    def penalties(side: str) -> list[Callable[[], Tensor | None]]:
        """Return what is added to the loss of each step of a round."""
        if side == "lora":
            return [lambda: None] * 2
        every = int(side.removeprefix("every "))
        return [lambda step=step: keepers[every].loss(step) for step in range(max(2, every))]  # type: ignore[misc]

    runs = []
    for turn, side in in_turns(SIDES, rounds + 1):
        seconds, of_processor = seconds_a_step(adapted, optimizer, batches, penalties(side))
        if turn:  # the first warms up
            about = {"side": side, "round": turn, "tokens": batch_size * LENGTH, "kept_tokens": kept * KEPT_LENGTH}
            runs.append(recorded(about | {"seconds": seconds, "cpu_seconds": of_processor, "load": os.getloadavg()[0]}, output))
    print(comparison(runs))


def seconds_a_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor], penalties: Sequence[Callable[[], Tensor | None]]
) -> tuple[float, float]:
    """Train a step for each of the penalties; return the mean of a step's seconds by the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    for step, penalty in enumerate(penalties):
        batch = batches[step % len(batches)]
        with casting():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            held = penalty()
        (loss if held is None else loss + held).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start[0]) / len(penalties), (time.process_time() - start[1]) / len(penalties)


def comparison(runs: Sequence[dict[str, Any]]) -> str:
    """Return medians and ratios to LoRA as a Markdown table."""
    sides = by_side(runs, SIDES)
    rows = []
    for side, own in sides.items():
        figures = [(median_of(own, key), median_ratio(own, sides["lora"], key)) for key in ("seconds", "cpu_seconds")]
        rows.append([side, *(text for seconds, ratio in figures for text in (f"{seconds:.2f}", f"{ratio:.2f}"))])
    load = median([run["load"] for run in runs])
    return "\n".join(
        [
            *table(["side", "s a step", "to LoRA", "of the processor", "to LoRA"], rows),
            f"Load of the machine (median): {load:.1f} on {os.cpu_count()} CPUs.",
        ]
    )


if __name__ == "__main__":
    typer.run(bench)
