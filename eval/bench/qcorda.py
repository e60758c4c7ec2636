"""Q-CorDA: what 4 bits cost in W and in W − B0 A0, and how many steps its training takes to QLoRA's final loss.

    python -m corda_eval.bench.qcorda --output eval/results/qcorda.jsonl --plot eval/results/qcorda.png

SmolLM2-135M-Instruct, every linear layer but the output, nf4 with doubly quantised scales, bfloat16 for what is computed, adapters in
float32. All methods on the same layers with the same rank, alpha = rank:
    QLoRA        nf4(W), A Kaiming, B = 0
    CorDA-IPM    nf4(W), IPM in offset form: the start is nf4(W)'s
    Q-CorDA      nf4(W − B0 A0), IPM, A and B train from A0 and B0 (arXiv 2506.13187)
Text: Python's reference manual; the windows that train are IPM's context too, the loss is taken on topics that they do not hold.
Training: one epoch, AdamW without weight decay, gradients clipped to norm 1, 3 % warm-up, cosine. A seed is an order of the windows
and LoRA's A. The first seed runs every rate of a grid, and the next rate on the ladder where a method's best lies at the edge. The
others run what three readings need: all methods at QLoRA's best rate (lowest final held-out loss of the first seed), all at Q-CorDA's
best, and each at its own best; but not what ends above its own start with the first seed. Finished runs are kept in the output file and
not run again.

Steps to loss: the first crossing of QLoRA's final held-out loss of the same seed, by straight lines between the measurements.

Note: the modules stay in training mode when the loss is measured, there being no dropout: in evaluation mode bitsandbytes packs the
weights anew on some CPUs, and no gradient passes them afterwards.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from corda_core import AdapterPlan, attach, collect, plan
from corda_core.linears import quantize_linears_
from corda_eval.bench.quantization import quantization_errors
from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.metrics.curves import steps_to
from corda_eval.records import add_line, read_lines, table
from corda_eval.text.perplexity import held_out_text, text_windows
from corda_vlm.context import progress_bar
from corda_vlm.training.train import attach_lora

BASELINE, CLAIMED = "QLoRA", "Q-CorDA"
STEPS, BATCH, LENGTH = 48, 4, 64
EVERY, HELD_OUT = 6, 16
ERROR_RANKS = (32, 128)
"""For the errors by layer; 128 is the paper's."""
ERRORS = ("base", "residual", "base_on_context", "residual_on_context")

LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID = LADDER[2:5]
NEVER = float("inf")

Run = dict[str, Any]


def bench(
    output: Annotated[Path, typer.Option(help="JSON lines, one a finished run.")] = Path("runs/qcorda.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Where the curves are drawn.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds; the first runs every rate.")] = 3,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 32,
) -> None:
    """Run what is missing, print the tables and draw the curves."""
    lines = read_lines(output)
    study = Study(rank)

    def add(line: Run) -> None:
        lines.append(line)
        add_line(output, line)

    for error_rank in ERROR_RANKS:
        if not any(line.get("errors_at_rank") == error_rank for line in lines):
            add({"errors_at_rank": error_rank, "layers": study.errors(error_rank)})
    if not any("unquantised" in line for line in lines):
        add({"unquantised": study.unquantised()})
    settings = {"rank": rank, "steps": STEPS, "tokens": BATCH * LENGTH}

    def runs() -> list[Run]:
        return [line for line in lines if settings.items() <= line.items()]

    def complete(wanted: Iterable[tuple[str, float]], seed: int) -> None:
        for method, rate in wanted:
            if not _find(runs(), method, rate, seed):
                add({"method": method, "rate": rate, "seed": seed, **settings, **study.run(method, rate, seed)})

    complete([(method, rate) for rate in GRID for method in METHODS], 0)
    while missing := beyond_the_edge(runs()):
        complete(missing, 0)
    wanted = dict.fromkeys((method, rate) for rates in chosen_rates(runs()).values() for method, rate in rates.items())
    complete(wanted, 0)
    repeated = [(method, rate) for method, rate in wanted if not _diverged(_find(runs(), method, rate, 0))]
    for seed in range(1, seeds):
        complete(repeated, seed)
    for line in lines:
        if "errors_at_rank" in line:
            print(f"\nRank {line['errors_at_rank']}\n\n{error_table(line['layers'])}")
    print(f"\nHeld-out loss of the base before it is quantised: {next(line['unquantised'] for line in lines if 'unquantised' in line):.3f}")
    print(f"\n{rate_table(runs())}\n\n{steps_table(runs())}")
    if plot is not None:
        draw(runs(), plot)


class Study:
    """The model, the windows and the plans, made when they are first needed and used by all runs."""

    def __init__(self, rank: int) -> None:
        """Take the rank that the adapters train with."""
        self.rank = rank
        self.plans: dict[int, AdapterPlan] = {}
        self.model: nn.Module | None = None

    def errors(self, rank: int) -> dict[str, dict[str, float]]:
        """Return the quantisation errors layer by layer."""
        adapter = self.plan(rank)
        assert self.model is not None
        by_layer = quantization_errors(self.model, adapter, covariances=self.covariances, progress=progress_bar)
        return {name: {key: float(f"{getattr(error, key):.5g}") for key in ERRORS} for name, error in by_layer.items()}

    def unquantised(self) -> float:
        """Return the held-out loss of the base in bfloat16."""
        self._load()
        assert self.model is not None
        return _held_out_loss(self.model, self.held_out)

    def plan(self, rank: int) -> AdapterPlan:
        """Return IPM's plan of this rank."""
        self._load()
        assert self.model is not None
        if rank not in self.plans:
            self.plans[rank] = plan(self.model, self.covariances, mode="ipm", rank=rank, progress=progress_bar)
        return self.plans[rank]

    def run(self, method: str, rate: float, seed: int) -> Run:
        """Train once; return held-out losses as pairs (step, loss), the training loss of every step, and seconds."""
        adapter = self.plan(self.rank)
        torch.manual_seed(seed)
        adapted = METHODS[method](copy.deepcopy(self.model), adapter)
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
        start = time.perf_counter()
        held_out, training = train(adapted, self.windows[order].split(BATCH), self.held_out, rate, f"{method} {rate:g} seed {seed}")
        return {"held_out": held_out, "training": training, "seconds": round(time.perf_counter() - start, 1)}

    def _load(self) -> None:
        if self.model is not None:
            return
        self.model, names, tokenizer = smollm2_model()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()  # the type the weights were published in; not the buffers: rotations stay float32
        context, held_out = held_out_text()
        self.windows = torch.stack(text_windows(context, tokenizer, LENGTH, STEPS * BATCH))
        self.held_out = torch.stack(text_windows(held_out, tokenizer, LENGTH, HELD_OUT))
        batches = [{"input_ids": batch} for batch in self.windows.split(8)]
        self.covariances = collect(self.model, progress_bar(batches, "context"), names)


def train(model: nn.Module, batches: Sequence[Tensor], held_out: Tensor, rate: float, title: str) -> tuple[list[Any], list[float]]:
    """Train on each batch once; return held-out losses as pairs (step, loss), and the training loss of every step (nats a token)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * len(batches))), len(batches))
    model.train()
    measured: list[Any] = [(0, _held_out_loss(model, held_out))]
    training = []
    for step, batch in enumerate(progress_bar(batches, title), 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        training.append(round(loss.item(), 5))
        if step % EVERY == 0:
            measured.append((step, _held_out_loss(model, held_out)))
    return measured, training


def _held_out_loss(model: nn.Module, windows: Tensor) -> float:
    with torch.no_grad():
        return round(mean(model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in windows.split(8)), 5)


def _qlora(model: nn.Module, adapter: AdapterPlan) -> PeftModel:
    quantize_linears_(model, adapter.layers, "nf4")
    return attach_lora(model, list(adapter.layers), adapter.rank)


METHODS: dict[str, Callable[[Any, AdapterPlan], PeftModel]] = {
    BASELINE: _qlora,
    "CorDA-IPM": lambda model, adapter: attach(model, adapter, residual="offset", quantize="nf4"),
    CLAIMED: lambda model, adapter: attach(model, adapter, residual="subtract", quantize="nf4"),
}


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Return each method's rate with the lowest final held-out loss of the first seed."""
    first = [run for run in runs if run["seed"] == 0]
    return {
        method: min((run for run in first if run["method"] == method), key=lambda run: run["held_out"][-1][1])["rate"] for method in METHODS
    }


def beyond_the_edge(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Return the methods whose best rate has a neighbour on the ladder that has not run, with that rate."""
    missing = []
    for method, rate in best_rates(runs).items():
        place = LADDER.index(rate)
        near = LADDER[max(0, place - 1) : place + 2]
        missing += [(method, neighbour) for neighbour in near if not _find(runs, method, neighbour, 0)]
    return missing


def chosen_rates(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the methods' rates by reading."""
    best = best_rates(runs)
    same = {f"{method}'s best rate": dict.fromkeys(METHODS, best[method]) for method in (BASELINE, CLAIMED)}
    return {**same, "each at its own best rate": best}


def readings(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Return the runs by reading and method, in the order of the seeds."""
    ordered = sorted(runs, key=lambda run: run["seed"])
    return {
        title: {method: [run for run in ordered if (run["method"], run["rate"]) == (method, rate)] for method, rate in rates.items()}
        for title, rates in chosen_rates(runs).items()
    }


def steps_table(runs: Sequence[Run]) -> str:
    """Return steps to QLoRA's final loss, and the losses, as a Markdown table: medians over the seeds, (lowest to highest)."""
    rows = []
    for title, methods in readings(runs).items():
        base = {run["seed"]: run["held_out"] for run in methods[BASELINE]}
        for method, repeats in methods.items():
            targets = [(base[run["seed"]], base[run["seed"]][-1][1]) for run in repeats]
            steps = [steps_to(run["held_out"], target) for run, (_, target) in zip(repeats, targets, strict=True)]
            ratios = [steps_to(curve, target) / own if own else NEVER for own, (curve, target) in zip(steps, targets, strict=True)]
            cells = [
                _spread([run["held_out"][0][1] for run in repeats], 3),
                _spread([run["held_out"][-1][1] for run in repeats], 3),
                _spread([mean(run["training"][-10:]) for run in repeats], 3),
                _spread(steps, 1, {NEVER: "never"}),
                _spread(ratios, 2, {0.0: "never", NEVER: "at once"}) + " ×",
            ]
            rows.append([title, method, f"{repeats[0]['rate']:g}", str(len(repeats)), *cells])
    losses = ["loss at step 0", "final held-out loss", "training, last 10"]
    return "\n".join(table(["reading", "method", "rate", "seeds", *losses, "to QLoRA's final loss", "faster"], rows)[:-1])


def rate_table(runs: Sequence[Run]) -> str:
    """Return the first seed's final held-out losses by method and rate as a Markdown table."""
    rates = sorted({run["rate"] for run in runs})
    rows = []
    for method in METHODS:
        first = [_find(runs, method, rate, 0) for rate in rates]
        rows.append([method, *(f"{run['held_out'][-1][1]:.3f}" if run else "" for run in first)])
    return "\n".join(table(["final held-out loss, seed 0", *(f"{rate:g}" for rate in rates)], rows))


def error_table(layers: dict[str, dict[str, float]]) -> str:
    """Return the errors by kind of layer as a Markdown table: means, and how many layers have the smaller error in the residual."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    rows = []
    for kind in [*kinds, "all"]:
        chosen = [errors for name, errors in layers.items() if kind in ("all", name.rpartition(".")[2])]
        cells = []
        for base, residual in (ERRORS[:2], ERRORS[2:]):
            cells += [f"{mean(errors[key] for errors in chosen):.2%}" for key in (base, residual)]
            cells.append(f"{sum(errors[residual] < errors[base] for errors in chosen)} of {len(chosen)}")
        rows.append([kind, *cells])
    return "\n".join(table(["kind", "nf4(W)", "nf4(W − B0 A0)", "better", "on the context: nf4(W)", "nf4(W − B0 A0)", "better"], rows))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw held-out loss by step, one panel a reading: the median over the seeds, and the range."""
    # Imported here: it belongs to the extra `demo`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (title, methods) in zip(panels, readings(runs).items(), strict=True):
        for number, (method, repeats) in enumerate(methods.items()):
            steps = [step for step, _ in repeats[0]["held_out"]]
            losses = list(zip(*([loss for _, loss in run["held_out"]] for run in repeats), strict=True))
            axes.plot(steps, list(map(median, losses)), color=f"C{number}", label=f"{method}, rate {repeats[0]['rate']:g}")
            axes.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=f"C{number}", alpha=0.2)
        final = median(run["held_out"][-1][1] for run in methods[BASELINE])
        axes.axhline(final, color="grey", linestyle="--", linewidth=1, label="QLoRA's final loss")
        axes.set(xlabel="steps", title=title[0].upper() + title[1:])
        axes.legend(frameon=False)
    shown = [loss for run in runs if not _diverged(run) for _, loss in run["held_out"]]
    panels[0].set(ylabel="held-out loss, nats a token", ylim=(min(shown) - 0.05, max(shown) + 0.3))  # what diverged leaves the plot
    figure.savefig(path, dpi=120)


def _diverged(run: Run | None) -> bool:
    """Tell whether a run ended above its own start."""
    return run is not None and run["held_out"][-1][1] > run["held_out"][0][1]


def _find(runs: Iterable[Run], method: str, rate: float, seed: int) -> Run | None:
    return next((run for run in runs if (run["method"], run["rate"], run["seed"]) == (method, rate, seed)), None)


def _spread(values: Sequence[float], digits: int, words: Mapping[float, str] | None = None) -> str:
    """Return the median and the range, some values in words."""
    shown = [(words or {}).get(value, f"{value:.{digits}f}") for value in (median(values), min(values), max(values))]
    return "{} ({} to {})".format(*shown)


if __name__ == "__main__":
    typer.run(bench)
