"""Preparing a CorDA adapter: ours against PEFT's ``preprocess_corda`` + ``get_peft_model``.

    python -m corda_eval.bench.prepare --case smollm2 --mode kpm --output runs/bench.jsonl

Both sides run in fresh processes, in turns; the table gives medians and the median of the pairs' ratios PEFT / ours.
Times: the plain forward pass over the samples; what collecting the covariances costs beyond it; the decomposition, with what puts
the adapter on the model. PEFT gets its samples one by one, as it must. Memory: the peak of resident memory during the preparation,
less what was resident before it (model loaded, one plain forward pass done); beside it the same for the plain forward pass.
"""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import preprocess_corda

from corda_core import attach, collect, plan
from corda_eval.bench.cases import CASES, Case, batched
from corda_eval.bench.process import by_side, fresh_run, in_turns, median_of, median_ratio, reset_peak, status
from corda_eval.records import table

SIDES = ("ours", "peft")
FIGURES = {"forward": "s", "collection": "s", "decomposition": "s", "overhead": "s", "whole": "s", "forward_mb": "MB", "extra_mb": "MB"}
"""Of each run, by name: what it is counted in."""


def bench(
    case: Annotated[str, typer.Option(help=f"One of {', '.join(CASES)}.")] = "smollm2",
    mode: Annotated[str, typer.Option(help="kpm or ipm.")] = "kpm",
    pairs: Annotated[int, typer.Option(help="How often each side runs.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON lines, one a run, are added here.")] = None,
    side: Annotated[str | None, typer.Option(help="Run one side once in this process and print its figures.")] = None,
) -> None:
    """Run the benchmark and print its table."""
    if side is not None:
        print(json.dumps(run_side(side, case, mode)))
        return
    options = ["--case", case, "--mode", mode]
    runs = [
        fresh_run("corda_eval.bench.prepare", [*options, "--side", name], {"case": case, "mode": mode, "side": name, "pair": pair}, output)
        for pair, name in in_turns(SIDES, pairs)
    ]
    print(comparison(runs))


def run_side(side: str, case_name: str, mode: str) -> dict[str, Any]:
    """Prepare once with one side; return seconds and megabytes."""
    case = CASES[case_name]()
    prepare = {"ours": _prepare_ours, "peft": _prepare_peft}[side]
    batches = batched(case) if side == "ours" else case.samples
    with torch.no_grad():
        case.model(**batches[0])
        before = reset_peak()
        start = time.perf_counter()
        for batch in batches:
            case.model(**batch)
        forward = time.perf_counter() - start
    forward_mb = (status("VmHWM") - before) / 1e3
    before = reset_peak()
    start = time.perf_counter()
    collected, details = prepare(case, batches, mode)
    whole = time.perf_counter() - start
    return {
        "forward": forward,
        "collection": collected - forward,
        "decomposition": whole - collected,
        "whole": whole,
        "overhead": whole - forward,
        "forward_mb": forward_mb,
        "extra_mb": (status("VmHWM") - before) / 1e3,
        **details,
    }


def comparison(runs: list[dict[str, Any]]) -> str:
    """Return the medians of both sides and of the pairs' ratios as a Markdown table."""
    corda, peft = by_side(runs, SIDES, "pair").values()
    rows = [
        [key, f"{median_of(peft, key):.1f} {unit}", f"{median_of(corda, key):.1f} {unit}", f"{median_ratio(peft, corda, key):.2f}"]
        for key, unit in FIGURES.items()
    ]
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "peft", "transformers"))
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {packages}"
    return "\n".join([*table(["part", "PEFT", "ours", "PEFT / ours"], rows), machine])


def _prepare_ours(case: Case, batches: list[dict[str, torch.Tensor]], mode: str) -> tuple[float, dict[str, Any]]:
    """Prepare with corda_core; return the seconds that collecting took."""
    start = time.perf_counter()
    batches = [{**batch, **case.options} for batch in batches]
    covariances = collect(case.model, batches, case.names)
    collected = time.perf_counter() - start
    adapter = plan(case.model, covariances, mode=mode, rank=case.rank)
    del covariances
    attach(case.model, adapter)
    return collected, {"fallbacks": len(adapter.provenance["fallbacks"])}


def _prepare_peft(case: Case, samples: list[dict[str, torch.Tensor]], mode: str) -> tuple[float, dict[str, Any]]:
    """Prepare with PEFT; return the seconds that collecting took."""
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        target_modules=list(case.names),
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method=mode),
    )
    collected = 0.0

    def run_model() -> None:
        nonlocal collected
        start = time.perf_counter()
        for sample in samples:
            case.model(**sample)
        collected = time.perf_counter() - start

    preprocess_corda(case.model, config, run_model=run_model)
    get_peft_model(case.model, config)
    return collected, {}


if __name__ == "__main__":
    typer.run(bench)
