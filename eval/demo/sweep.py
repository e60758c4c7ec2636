"""Choose each method's learning rate for the demo, on the validation digits.

    python -m corda_eval.demo.sweep --config configs/demo.yaml --rates 3e-4,1e-3,3e-3

Trains every method at every rate as the demo does and measures the validation digits and questions of easy-VQA that the
demo does not use. The best rate is the smallest whose digits accuracy lies within one standard error of the highest: 200 digits do
not tell 76 from 77 %, and the smaller change is the safer one. Finished runs are kept in the output file and not run again.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from corda_eval.demo.demo import METHODS, TEST_BATCH_SIZE, DemoConfig, adapt, context_plan, lab, mean_drift
from corda_eval.suite.tasks import Role, SuiteTask, run_task
from corda_vlm.training.models import load_base
from corda_vlm.yaml import read_config

TASKS = (
    SuiteTask("digits", role=Role.TARGET, split="validation"),
    SuiteTask("easy_vqa", split="validation", limit=300),
    SuiteTask("perplexity", limit=8),
)
NUM_DIGITS = 200


def sweep(
    config: Annotated[Path, typer.Option(help="The demo's YAML file.")],
    rates: Annotated[str, typer.Option(help="Learning rates, with commas between.")],
    output: Annotated[Path, typer.Option(help="JSON lines, a line for each run.")] = Path("runs/sweep.jsonl"),
    methods: Annotated[str, typer.Option(help="Methods, with commas between.")] = ",".join(METHODS),
) -> None:
    """Run the sweep and print its table."""
    options = read_config(config, DemoConfig)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    finished = {(run["method"], run["learning_rate"]) for run in done if run["config"] == _key(options)}
    model, processor = load_base(lab())
    covariances, plan = context_plan(model, processor, options)
    for rate in map(float, rates.split(",")):
        for method in methods.split(","):
            if (method, rate) in finished:
                continue
            model, processor = load_base(lab())
            adapted, trained = adapt(method, model, processor, plan, options, rate)
            run = {"method": method, "learning_rate": rate, "config": _key(options), "final_loss": trained["losses"][-1][1]}
            run |= {"seconds": trained["train_seconds"], "drift": mean_drift(adapted, covariances)}
            for task in TASKS:
                result = run_task(task, adapted, processor, batch_size=TEST_BATCH_SIZE)
                score = result.metrics[result.headline]
                run[task.title] = score if result.headline == "perplexity" else 100 * score
            done.append(run)
            with output.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps({key: value for key, value in run.items() if key != "config"}), flush=True)
    _report([run for run in done if run["config"] == _key(options)])


def _key(options: DemoConfig) -> list[Any]:
    """Return what a finished run must agree in to count for these options."""
    counts = [options.rank, options.steps, options.batch_size]
    return [*counts, list(options.parts), options.context_questions, options.context_texts, options.seed]


def best_rate(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the smallest rate of those within one standard error of the highest digits accuracy."""
    highest = max(run["digits"] for run in runs)
    error = math.sqrt(highest * (100 - highest) / NUM_DIGITS)
    return min((run for run in runs if run["digits"] >= highest - error), key=lambda run: run["learning_rate"])


def _report(runs: list[dict[str, Any]]) -> None:
    for method in dict.fromkeys(run["method"] for run in runs):
        best = best_rate([run for run in runs if run["method"] == method])
        print(f"{method}: best rate {best['learning_rate']:g} with {best['digits']:.1f} % of the validation digits")


if __name__ == "__main__":
    typer.run(sweep)
