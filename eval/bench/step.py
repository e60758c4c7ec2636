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
from corda_eval.bench.memory import peak_megabytes
from corda_eval.bench.process import fresh_run
from corda_eval.lab.smollm2 import smollm2_model
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
    runs = []
    for turn in range(rounds):
        for one in SIDES if turn % 2 == 0 else reversed(SIDES):
            about = {"side": one, "round": turn, "rank": rank, "tokens": batch_size * length}
            runs.append(fresh_run("corda_eval.bench.step", [*options, "--side", one], about, output))
    print(table(runs))


def run_side(side: str, steps: int, rank: int, batch_size: int, length: int) -> dict[str, float]:
    """Train for some steps; return seconds a step (median) and the peak of resident memory in megabytes."""
    torch.manual_seed(0)
    model, names, tokenizer = smollm2_model()
    windows = torch.stack(text_windows(held_out_text()[0], tokenizer, length, batch_size * (steps + 2)))
    batches = windows.split(batch_size)
    if side == "lora":
        adapted = attach_lora(model, names, rank)
    else:
        made = plan(model, collect(model, [{"input_ids": windows[:8]}], names), mode="kpm", rank=rank)
        residual = "subtract" if side == "subtract" else "offset"
        adapted = attach(model, made, protect="strict" if side == "strict" else "start", residual=residual)  # type: ignore[arg-type]
        del made
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


def table(runs: list[dict[str, float]]) -> str:
    """Return medians and ratios to LoRA as a Markdown table."""
    by_side = {side: sorted((run for run in runs if run["side"] == side), key=lambda run: run["round"]) for side in SIDES}
    lines = ["| | s a step | to LoRA | peak memory | to LoRA |", "|---|---|---|---|---|"]
    for side, its in by_side.items():
        ratios = [median(run[key] / base[key] for run, base in zip(its, by_side["lora"], strict=True)) for key in ("seconds", "peak_mb")]
        seconds, peak = (median(run[key] for run in its) for key in ("seconds", "peak_mb"))
        lines.append(f"| {side} | {seconds:.2f} | {ratios[0]:.3f} | {peak:.0f} MB | {ratios[1]:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(bench)
