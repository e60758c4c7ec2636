"""``corda-vlm``: the command line."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Fine-tune vision-language models without forgetting (CorDA).", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Fine-tune vision-language models without forgetting (CorDA)."""


@app.command()
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
    try:
        require_demo_packages()
        summary = run_demo(read_config(config or shipped, DemoConfig), output, " ".join(["corda-vlm", *sys.argv[1:]]))
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        typer.echo(f"corda-vlm demo: {error}", err=True)
        raise typer.Exit(1) from error
    write_report(summary, output / "report.html")
    draw_headline(summary, output / "headline.png")
    for sentence in summary["verdict"]["sentences"]:
        typer.echo(sentence)
    typer.echo(f"Report: {output / 'report.html'} ({summary['seconds']:.0f} s, {summary['peak_memory_gb']:.1f} GB)")


if __name__ == "__main__":
    app()
