"""``corda-vlm``: the commands that prepare, train and export; ``corda_eval.cli`` adds those that measure."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from corda_core.layers import process_rank
from corda_vlm.failures import is_disk_full, is_lost_process
from corda_vlm.training.stopping import stoppable

app = typer.Typer(help="Fine-tune vision-language models without forgetting (CorDA).", no_args_is_help=True, pretty_exceptions_enable=False)

Command = Callable[..., None]
CONFIG = Annotated[Path, typer.Option(help="A recipe: a YAML file such as those in configs/.")]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="Options of the recipe to change, such as training.steps=100.", metavar="[OPTION=VALUE]..."),
]
DOWNLOAD = Annotated[bool, typer.Option("--download", help="Fetch from the hub what is not here: the base, a suite's data.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base; no folder's word counts for it.")]


def command(name: str, after_a_stop: str) -> Callable[[Command], Command]:
    """Return a decorator that makes a function a command, whose errors and stops are reported in a sentence.

    Args:
        name: Of the command.
        after_a_stop: How to continue after a stop.
    """

    def register(function: Command) -> Command:
        @app.command(name)
        @wraps(function)
        def run(**options: Any) -> None:
            with _sentences(name, after_a_stop):
                function(**{option: _at_home(value) for option, value in options.items()})

        return run

    return register


def _at_home(value: Any) -> Any:
    """Return an option's value with the home folder for ``~``, which shells leave in --output=~/runs."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


@app.callback()
def main() -> None:
    """Fine-tune vision-language models without forgetting (CorDA)."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":  # all processes would log the same
        logging.getLogger("corda_vlm").setLevel(logging.INFO)


@command("train", "with --resume it continues from the last whole checkpoint, or from the start if there is none yet")
def train(
    config: CONFIG,
    overrides: OVERRIDES = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last whole checkpoint in the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print layers, ranks, memory, FLOPs and time; reads no weights.")] = False,
) -> None:
    """Prepare an adapter and train it as the recipe says; under `accelerate launch -m corda_vlm.cli train` on several devices."""
    from corda_vlm.training.estimate import describe, estimate
    from corda_vlm.training.recipe import read_recipe
    from corda_vlm.training.run import run_recipe

    recipe = read_recipe(config, overrides or [])
    if dry_run:
        typer.echo(describe(estimate(recipe)))
        return
    summary = run_recipe(recipe, resume=resume)
    if process_rank() == 0:
        first, last = summary.losses[0][1], summary.losses[-1][1]
        typer.echo(f"Trained {summary.losses[-1][0]} steps in {summary.seconds:.0f} s: loss {first:.3f} -> {last:.3f}.")
        for step, loss in summary.evaluation[-1:]:
            typer.echo(f"Loss on held-out samples at step {step}: {loss:.3f}.")
        if summary.kept is not None:
            typer.echo(f"Kept: {summary.kept}.")
        if summary.drift is not None:
            typer.echo(f"The outputs on the context have drifted by {summary.drift:.2%}.")
        if summary.num_broken:
            typer.echo(f"Skipped {summary.num_broken} samples whose images could not be read.")
        if summary.num_long or summary.num_cut:
            typer.echo(f"Of samples that were too long {summary.num_cut} were cut, {summary.num_long} skipped.")
        typer.echo(f"Adapter: {summary.output} (corda-vlm export --adapter {summary.output} --output my-lora makes an ordinary LoRA of it)")


@command("prepare", "the same command starts it anew")
def prepare(config: CONFIG, overrides: OVERRIDES = None) -> None:
    """Do the first half of `train` only: collect, decompose, write the plan; `train --resume` does the rest."""
    from corda_vlm.training.recipe import read_recipe
    from corda_vlm.training.run import prepare_recipe

    recipe = read_recipe(config, overrides or [])
    plan = prepare_recipe(recipe)
    if process_rank() == 0:
        typer.echo(f"{len(plan.layers)} layers, {plan.num_parameters:,} parameters of A and B: {Path(recipe.output) / 'corda.safetensors'}")


@command("collect", "nothing is half written; run it again")
def collect(
    output: Annotated[Path, typer.Option(help="Keep file to write; its name ends in .safetensors.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Options of the recipe to change, such as corda.num_samples=512; with --add keep files.", metavar="[ARGUMENT]..."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe, whose context is collected on its base.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, as model.path.")] = None,
    data: Annotated[str | None, typer.Option(help="What is to be kept, as context: a source of samples, self, keep files.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add keep files up, as if their samples had been collected at once.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Write 16 bits a value instead of 32, which changes next to nothing.")] = False,
) -> None:
    """Write what a base is to keep as a keep file, which stands for a context's samples wherever one is named and holds none of them."""
    from corda_vlm.training.collect import add_files, collect_file, collection_recipe

    if add:
        sentence = add_files([Path(name).expanduser() for name in arguments or []], output, half=half)
    else:
        sentence = collect_file(collection_recipe(config, model, data, arguments or [], output), output, half=half)
    if process_rank() == 0:
        typer.echo(sentence)


@command("export", "nothing is half written; run it again")
def export(
    adapter: Annotated[Path, typer.Option(help="Folder that `train` wrote, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base; by default that of the adapter's recipe.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the base: that which the adapter was made in; by default the recipe's.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much of the change: 0 is the base, 1 the tuned model (WiSE-FT); by default 1.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="As much of the change as forgets no more than this: KL to the base in nats a token, on --on.")
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option(help="For --max-kl: held-out samples of what is to be kept, such as kept.json; self: a language model's own."),
    ] = None,
    compress: Annotated[int | None, typer.Option(min=1, help="Rank of the best approximation of the change, instead of all of it.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a plain model with the change in its weights.")] = False,
    download: DOWNLOAD = False,
    trust_remote_code: TRUST = False,
) -> None:
    """Write a trained adapter as an ordinary LoRA for the untouched base, or as a plain model."""
    from corda_vlm.training.deploy import Budget, deploy

    if (max_kl is None) != (on is None):
        raise ValueError("--max-kl and --on belong together: how much may be forgotten, and samples of what; give both, or neither.")
    sentence = deploy(
        adapter,
        output,
        base=base,
        dtype=dtype,
        alpha=alpha,
        budget=None if max_kl is None or on is None else Budget(max_kl, str(on)),
        compress=compress,
        merge=merge,
        download=download,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(sentence)


@command("show", "nothing is half written; run it again")
def show(
    adapter: Annotated[Path, typer.Option(help="Folder that `train` or `prepare` wrote, or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="Page to write.")] = Path("plan.html"),
) -> None:
    """Show what an adapter was planned with on a page: ranks, compactness, chosen covariances and spectra, layer by layer."""
    from corda_core.store import ATTACHMENT, read_attachment
    from corda_vlm.plan_report import write_plan_report

    write_plan_report(read_attachment(adapter / ATTACHMENT)[0].plan, output)
    typer.echo(f"Plan: {output}")


@contextmanager
def _sentences(name: str, after_a_stop: str) -> Iterator[None]:
    """Turn stops, and errors that users can do something about, into one sentence; errors into exit code 1."""

    def say_stopped(number: signal.Signals) -> None:
        if process_rank() == 0:
            typer.echo(f"\ncorda-vlm {name}: stopped by {number.name}; {after_a_stop}.", err=True)

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
    """Return the message for an error, or None if users can do nothing about it."""
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
