"""``corda-vlm``: the command line."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from corda_core.distributed import is_lost_process, process_rank
from corda_core.files import is_disk_full
from corda_vlm.stopping import stoppable

app = typer.Typer(help="Fine-tune vision-language models without forgetting (CorDA).", no_args_is_help=True, pretty_exceptions_enable=False)


Command = Callable[..., None]


def command(name: str, going_on: str) -> Callable[[Command], Command]:
    """Return what makes a function a command, whose errors and stops are sentences; ``going_on`` says what to do after a stop."""

    def register(function: Command) -> Command:
        @app.command(name)
        @wraps(function)
        def run(**options: Any) -> None:
            with _sentences(name, going_on):
                function(**{option: _at_home(value) for option, value in options.items()})

        return run

    return register


def _at_home(value: Any) -> Any:
    """Return an option's value with the home folder for ``~``, which shells leave in --output=~/runs."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return value.expanduser() if isinstance(value, Path) else value


@app.callback()
def main() -> None:
    """Fine-tune vision-language models without forgetting (CorDA)."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # what several processes have to say is the same
        logging.getLogger("corda_vlm").setLevel(logging.INFO)


@command("demo", "the same command starts it anew")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.html, summary.json, predictions.jsonl and the adapters.")] = Path(
        "demo-report"
    ),
    config: Annotated[Path | None, typer.Option(help="Another YAML file than the shipped configs/demo.yaml.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes to see that everything runs; the scores mean nothing.")] = False,
) -> None:
    """Teach a small LLaVA to read digits with LoRA and with CorDA, and report what each gained and forgot."""
    # Imported here: these belong to the extra `demo` and take seconds.
    from corda_eval.demo import DemoConfig, require_demo_packages, run_demo
    from corda_vlm.config import read_config
    from corda_vlm.report import draw_headline, write_report

    shipped = Path(str(files("corda_vlm.configs"))) / ("demo_quick.yaml" if quick else "demo.yaml")
    require_demo_packages()
    summary = run_demo(read_config(config or shipped, DemoConfig), output, _typed())
    write_report(summary, output / "report.html")
    draw_headline(summary, output / "headline.png")
    for sentence in summary["verdict"]["sentences"]:
        typer.echo(sentence)
    typer.echo(f"Report: {output / 'report.html'} ({summary['seconds']:.0f} s, {summary['peak_memory_gb']:.1f} GB)")


CONFIG = Annotated[Path, typer.Option(help="A recipe: a YAML file such as those in configs/.")]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="Options of the recipe to change: training.steps=100 model.path=my-model", metavar="[OPTION=VALUE]..."),
]


DOWNLOAD = Annotated[bool, typer.Option("--download", help="Fetch from the hub what is not here: the base, a suite's data.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base; no folder's word counts for it.")]


@command("train", "with --resume it goes on from the last whole checkpoint, or from the start if there is none yet")
def train(
    config: CONFIG,
    overrides: OVERRIDES = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell layers, ranks, memory, FLOPs and time; reads no weights.")] = False,
) -> None:
    """Prepare an adapter and train it as the recipe says; under `accelerate launch -m corda_vlm.cli train` on several devices."""
    from corda_vlm.estimate import describe, estimate
    from corda_vlm.recipe import read_recipe
    from corda_vlm.run import train as run

    recipe = read_recipe(config, overrides or [])
    if dry_run:
        typer.echo(describe(estimate(recipe)))
        return
    trained = run(recipe, resume=resume)
    if process_rank() == 0:
        first, last = trained.losses[0][1], trained.losses[-1][1]
        typer.echo(f"Trained {trained.losses[-1][0]} steps in {trained.seconds:.0f} s: loss {first:.3f} -> {last:.3f}.")
        for step, loss in trained.evaluation[-1:]:
            typer.echo(f"Loss on held-out samples at step {step}: {loss:.3f}.")
        if trained.num_broken:
            typer.echo(f"Skipped {trained.num_broken} samples whose images could not be read.")
        typer.echo(f"Adapter: {trained.output} (corda-vlm export --adapter {trained.output} --output my-lora makes an ordinary LoRA of it)")


@command("prepare", "the same command starts it anew")
def prepare(config: CONFIG, overrides: OVERRIDES = None) -> None:
    """Do the first half of `train` only: collect, decompose, write the plan; `train --resume` goes on from there."""
    from corda_vlm.recipe import read_recipe
    from corda_vlm.run import prepare as run

    recipe = read_recipe(config, overrides or [])
    plan = run(recipe)
    if process_rank() == 0:
        typer.echo(f"{len(plan.layers)} layers, {plan.num_parameters:,} parameters of A and B: {Path(recipe.output) / 'corda.safetensors'}")


@command("export", "nothing is half written; run it again")
def export(
    adapter: Annotated[Path, typer.Option(help="Folder that `train` wrote, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base; by default that of the adapter's recipe.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the base: that which the adapter was made in; by default the recipe's.")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="How much of the change: 0 is the base, 1 the tuned model (WiSE-FT).")] = 1.0,
    compress: Annotated[int | None, typer.Option(min=1, help="Rank of the best approximation of the change, instead of all of it.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a plain model with the change in its weights.")] = False,
    download: DOWNLOAD = False,
    trust_remote_code: TRUST = False,
) -> None:
    """Write a trained adapter as an ordinary LoRA for the untouched base, or as a plain model."""
    from corda_vlm.deploy import deploy

    said = deploy(
        adapter,
        output,
        base=base,
        dtype=dtype,
        alpha=alpha,
        compress=compress,
        merge=merge,
        download=download,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(said)


@command("eval", "the same command goes on with what is not done yet")
def evaluate(
    base: Annotated[str, typer.Option(help="Folder or hub id of the untouched base; for open_clip see --library.")],
    adapter: Annotated[list[Path], typer.Option(help="Folder of `train`, or of an ordinary LoRA; may be given several times.")],
    suite: Annotated[Path, typer.Option(help="YAML file with a list of tasks, such as configs/suite_lab.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder for results, predictions and report; tasks done there are not run again.")],
    dtype: Annotated[str, typer.Option(help="Precision of the base: that which the adapter was made in.")] = "bfloat16",
    library: Annotated[str, typer.Option(help="transformers or open_clip.")] = "transformers",
    weights: Annotated[str | None, typer.Option(help="For open_clip: file or tag of the weights.")] = None,
    check_batch_invariance: Annotated[
        int,
        typer.Option(
            min=0, help="First ask the base this many questions of each benchmark one by one too, and tell how many answers differ."
        ),
    ] = 0,
    download: DOWNLOAD = False,
    trust_remote_code: TRUST = False,
) -> None:
    """Measure base and adapters on a suite of tasks: what was gained, what was forgotten, how sure that is."""
    # Imported here: the evaluation's packages are extras, and take seconds.
    from corda_eval.run import batch_checks
    from corda_eval.run import evaluate as run
    from corda_eval.suite import read_suite
    from corda_vlm.recipe import ModelConfig

    names = [folder.resolve().name for folder in adapter]
    if len(set(names)) < len(names) or {"base", ""} & set(names):
        raise ValueError(f"The adapters' folders are called {names}; expected different names, none of them base: they name the rows.")
    model = ModelConfig(base, library=library, weights=weights, dtype=dtype, download=download, trust_remote_code=trust_remote_code)
    if check_batch_invariance:
        for title, check in batch_checks(model, read_suite(suite), check_batch_invariance).items():
            typer.echo(f"{title}: {len(check.differing)} of {check.num_examples} answers change with the batch size.")
    found = run(model, dict(zip(names, adapter, strict=True)), read_suite(suite), output, _typed())
    for name, its in found.get("sentences", {}).items():
        typer.echo(f"{name}: {'; '.join(its)}.")
    if found:
        typer.echo(f"Report: {output / 'report.html'}, report.md, summary.json ({found['seconds']:.0f} s)")


@command("compare", "the same command makes the runs that are missing")
def compare(
    config: Annotated[Path, typer.Option(help="A study: a YAML file such as configs/compare_lab.yaml.")],
    overrides: OVERRIDES = None,
    output: Annotated[Path, typer.Option(help="Folder for study.html, study.md, study.json and figures.")] = Path("compare-report"),
    only_report: Annotated[bool, typer.Option("--only-report", help="Run nothing: report on the runs that are finished.")] = False,
) -> None:
    """Run methods at several rates and seeds on tasks with kept tasks: which forgets less at equal gain? Finished runs are kept."""
    # Imported here: the evaluation's packages are extras, and take seconds.
    from corda_eval.study.grid import StudyConfig, check, complete, finished
    from corda_eval.study.report import write_study
    from corda_vlm.config import read_config

    study = read_config(config, StudyConfig, overrides or [])
    check(study)
    failures = [] if only_report else complete(study, typer.echo)
    for failure in failures:
        typer.echo(f"corda-vlm compare: {failure}", err=True)
    runs = {setting: its for setting in study.settings if (its := finished(study, setting))}
    if not runs:
        raise ValueError(f"{study.results} holds no finished run of this study; make some (without --only-report), or name its results.")
    write_study(runs, {"Command": _typed(), "Runs": str(sum(map(len, runs.values()))), "Results": study.results}, output)
    typer.echo(f"Report: {output / 'study.html'}, study.md, study.json")
    if failures:
        raise typer.Exit(1)


def _typed() -> str:
    """Return what was typed, for records."""
    return " ".join(["corda-vlm", *sys.argv[1:]])


@contextmanager
def _sentences(name: str, going_on: str) -> Iterator[None]:
    """Turn stops, and errors that users can do something about, into one sentence; errors into exit code 1."""

    def say_stopped(number: signal.Signals) -> None:
        if process_rank() == 0:
            typer.echo(f"\ncorda-vlm {name}: stopped by {number.name}; {going_on}.", err=True)

    try:
        with stoppable(say_stopped):
            yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        typer.echo(f"corda-vlm {name}: {sentence}", err=True)
        raise typer.Exit(1) from error


def _sentence(error: Exception) -> str | None:
    """Return what to tell of an error, or None if users can do nothing about it."""
    if isinstance(error, OSError) and error.errno == ENOSPC:
        return error.strerror
    if is_disk_full(error):
        return f"The disk is full ({error}): make room and run again; what was whole before still is."
    if is_lost_process(error):
        return f"Process {process_rank()} lost another one of this run, which ended before it; see what that one said, and run again."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:  # the system's, not ours
        return f"{error.filename}: {error.strerror}; correct the path, or what is there."
    return str(error) if isinstance(error, (ModuleNotFoundError, OSError, ValueError, FloatingPointError)) else None


if __name__ == "__main__":
    app()
