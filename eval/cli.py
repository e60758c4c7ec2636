"""``corda-vlm``, all of it: the commands of ``corda_vlm.cli``, and those that measure and compare."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from corda_vlm.cli import DOWNLOAD, TRUST, app, command
from corda_vlm.outputs import alone_in, processes
from corda_vlm.training.recipe import ModelConfig, read_recipe, write_recipe
from corda_vlm.yaml import read_config


@command("demo", "the same command starts it anew")
def demo_command(
    output: Annotated[Path, typer.Option(help="Folder for report.html, summary.json, the adapters and what was predicted.")] = Path(
        "demo-report"
    ),
    config: Annotated[Path | None, typer.Option(help="Another YAML file than the shipped configs/demo.yaml.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes to see that everything runs; the scores mean nothing.")] = False,
) -> None:
    """Teach a small LLaVA to read digits with LoRA and with CorDA, and report what each gained and forgot."""
    # Imported here: these belong to the extra `demo` and take seconds.
    from corda_eval.demo.demo import DemoConfig, require_demo_packages, run_demo

    shipped = Path(str(files("corda_vlm.configs"))) / ("demo_quick.yaml" if quick else "demo.yaml")
    require_demo_packages()
    summary = run_demo(read_config(config or shipped, DemoConfig), output, _typed())
    for sentence in summary["verdict"]["sentences"]:
        typer.echo(sentence)
    typer.echo(f"Report: {output / 'report.html'} ({summary['seconds']:.0f} s, {summary['peak_memory_gb']:.1f} GB)")


@command("eval", "the same command resumes with the tasks that are not done")
def eval_command(
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
    from corda_eval.suite.comparison import averages
    from corda_eval.suite.measure import batch_checks, measure
    from corda_eval.suite.page import sentences, write_comparison
    from corda_eval.suite.tasks import read_suite

    names = [folder.resolve().name for folder in adapter]
    if len(set(names)) < len(names) or {"base", ""} & set(names):
        raise ValueError(f"The adapters' folders are called {names}; expected different names, none of them base: they name the rows.")
    model = ModelConfig(base, library=library, weights=weights, dtype=dtype, download=download, trust_remote_code=trust_remote_code)
    if check_batch_invariance:
        for title, check in batch_checks(model, read_suite(suite), check_batch_invariance).items():
            typer.echo(f"{title}: {len(check.differing)} of {check.num_examples} answers change with the batch size.")
    processes()  # joins the others, if there are any
    with alone_in(output):
        measured = measure(model, dict(zip(names, adapter, strict=True)), read_suite(suite), output)
        if measured is None:  # the first process reports
            return
        write_comparison(measured, output, facts={"command": _typed()})
    for name, rows in measured.rows.items():
        typer.echo(f"{name}: {'; '.join(sentences(averages(rows)))}.")
    typer.echo(f"Report: {output / 'report.html'}, report.md, summary.json ({measured.seconds:.0f} s)")


@command("compare", "the same command makes the runs that are missing")
def compare_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Options of the study or the recipe to change, such as seeds=1.", metavar="[OPTION=VALUE]..."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A study: a YAML file such as configs/compare_lab.yaml.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Your own task instead: the recipe of `train` that is to be decided.")] = None,
    rates: Annotated[str | None, typer.Option(help="For --recipe: LoRA's rates, 1e-4,3e-4,1e-3; by default three around its own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="For --recipe: optimiser steps of each run; by default 100.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="For --recipe: of each arm and rate; by default 1.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="For --recipe: what may be forgotten, nats of KL to the base; by default 0.02.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for study.html, study.md, study.json and figures.")] = Path("compare-report"),
    only_report: Annotated[bool, typer.Option("--only-report", help="Run nothing: report on the runs that are finished.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="For --recipe: only print the runs and what they cost; reads no weights.")
    ] = False,
) -> None:
    """Run methods at several rates and seeds on tasks with kept tasks: which forgets less at equal gain? Finished runs are kept."""
    # Imported here: the evaluation's packages are extras, and take seconds.
    from corda_eval.study.grid import StudyConfig, check, complete, finished
    from corda_eval.study.own import OwnTask
    from corda_eval.study.report import write_study

    if (config is None) == (recipe is None):
        raise ValueError("compare takes either --config (a study) or --recipe (your own task); give one of the two.")
    only = {"--rates": rates, "--steps": steps, "--seeds": seeds, "--max-kl": max_kl, "--dry-run": dry_run or None}
    misplaced = [name for name, value in only.items() if value is not None]
    if recipe is None and misplaced:
        raise ValueError(f"{misplaced[0]} is for --recipe; a study's own options are changed as option=value, such as seeds=1.")
    own = None
    if recipe is not None:
        own = OwnTask.of(read_recipe(recipe, overrides or []), output / "runs", steps or 100, _rates(rates), seeds or 1)
        if dry_run:
            typer.echo(own.cost())
            return
        own.write_recipe()
        study = own.study
    else:
        study = read_config(config, StudyConfig, overrides or [])  # type: ignore[arg-type]
        check(study)
    failures = [] if only_report else complete(study, typer.echo)
    for failure in failures:
        typer.echo(f"corda-vlm compare: {failure}", err=True)
    runs = {setting: done for setting in study.settings if (done := finished(study, setting))}
    if not runs:
        raise ValueError(f"{study.results!r} holds no finished run of this study; make some (without --only-report), or name its results.")
    if own is not None:  # before the report, which needs a LoRA that learned
        text, best = own.advice(next(iter(runs.values())), 0.02 if max_kl is None else max_kl)
        typer.echo(text)
        if best is not None:
            write_recipe(best, output / "best.yaml")
            typer.echo(f"Train it: corda-vlm train --config {output / 'best.yaml'}")
    write_study(runs, {"Command": _typed(), "Runs": str(sum(map(len, runs.values()))), "Results": study.results}, output)
    typer.echo(f"Report: {output / 'study.html'}, study.md, study.json")
    if failures:
        raise typer.Exit(1)


def _rates(text: str | None) -> list[float]:
    """Return the rates that were typed, none where none were.

    Raises:
        ValueError: If one is no number above 0.
    """
    rates = []
    for part in text.split(",") if text else []:
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(-1.0)
        if not 0 < rates[-1] < float("inf"):
            raise ValueError(f"--rates has {part!r}; expected numbers above 0 between commas, such as 1e-4,3e-4,1e-3.")
    return rates


def _typed() -> str:
    """Return what was typed, for records."""
    return " ".join(["corda-vlm", *sys.argv[1:]])


if __name__ == "__main__":
    app()
