"""A training step of a CorDA adapter against PEFT's plain LoRA of the same rank on the same layers.

    python -m corda_eval.bench.step --output runs/step.jsonl

SmolLM2-135M-Instruct in float32, every linear layer but the output, windows of technical English, AdamW. All sides run in fresh
processes, in turns; the table gives medians of a step's time and of the peak of resident memory, and the medians of the rounds' ratios
to LoRA.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from corda_core import attach, collect, plan
from corda_eval.bench.process import by_side, fresh_run, in_turns, median_of, median_ratio, peak_megabytes
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.records import table
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_vlm.training.train import attach_lora

SIDES = ("lora", "offset", "subtract", "strict")


def bench(
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps timed; two more come before them.")] = 10,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    output: Annotated[Path | None, typer.Option(help="JSON lines, one a run, are added here.")] = None,
    side: Annotated[str | None, typer.Option(help="Run one side once in this process and print its figures.")] = None,
) -> None:
    """Run the benchmark and print its table."""
    if side is not None:
        print(json.dumps(run_side(side, steps, rank, batch_size, length)))
        return
    options = [f"--{name}={value}" for name, value in (("steps", steps), ("rank", rank), ("batch-size", batch_size), ("length", length))]
    about = {"rank": rank, "tokens": batch_size * length}
    runs = [
        fresh_run("corda_eval.bench.step", [*options, "--side", name], {"side": name, "round": turn, **about}, output)
        for turn, name in in_turns(SIDES, rounds)
    ]
    print(comparison(runs))


def run_side(side: str, steps: int, rank: int, batch_size: int, length: int) -> dict[str, float]:
    """Train for some steps; return seconds a step (median) and the peak of resident memory in megabytes."""
    torch.manual_seed(0)
    model, names, tokenizer = smollm2_model()
    windows = torch.stack(text_windows(held_out_text()[0], tokenizer, length, batch_size * (steps + 2)))
    batches = windows.split(batch_size)
    if side == "lora":
        adapted = attach_lora(model, names, rank)
    else:
        adapter = plan(model, collect(model, [{"input_ids": windows[:8]}], names), mode="kpm", rank=rank)
        residual = "subtract" if side == "subtract" else "offset"
        adapted = attach(model, adapter, protect="strict" if side == "strict" else "start", residual=residual)
        del adapter
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    adapted.train()
    seconds = []
    with peak_megabytes() as peak:
        for batch in batches:
            start = time.perf_counter()
            adapted(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds[2:]), "peak_mb": peak()}


def comparison(runs: list[dict[str, float]]) -> str:
    """Return medians and ratios to LoRA as a Markdown table."""
    sides = by_side(runs, SIDES)
    rows = []
    for side, runs_of_side in sides.items():
        to_lora = [f"{median_ratio(runs_of_side, sides['lora'], key):.3f}" for key in ("seconds", "peak_mb")]
        seconds, peak = median_of(runs_of_side, "seconds"), median_of(runs_of_side, "peak_mb")
        rows.append([side, f"{seconds:.2f}", to_lora[0], f"{peak:.0f} MB", to_lora[1]])
    return "\n".join(table(["side", "s a step", "to LoRA", "peak memory", "to LoRA"], rows))


if __name__ == "__main__":
    typer.run(bench)
