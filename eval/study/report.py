"""A study's runs as tables, as figures and as a page."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from corda_core.files import write_whole
from corda_eval.records import code, escaped, table, write_json
from corda_eval.study.frontier import (
    BASE,
    BASELINE,
    NEARLY,
    Run,
    Summary,
    base_of,
    gain_of,
    num_rising,
    pareto,
    points_by_rate,
    steps_at_equal_rates,
    summaries,
    unmatched,
    with_interpolations,
)
from corda_eval.study.headline import TITLE, headline, ratio_text, spread_text
from corda_vlm import report

COLUMNS = (
    "arm",
    "rate",
    "seeds",
    "gain",
    "right",
    "forgetting",
    "against LoRA",
    "at its own gain",
    "steps",
    "change on context",
    "parameters",
    "time",
    "memory",
)


def write_study(runs: Mapping[str, Sequence[Run]], facts: Mapping[str, str], output: Path) -> dict[str, Any]:
    """Write ``study.html``, ``study.md``, ``study.json`` and one figure a setting; return what ``study.json`` holds.

    Args:
        runs: By setting, the base's among them.
        facts: What was run, by label.
        output: The folder.

    Raises:
        ModuleNotFoundError: If matplotlib or jinja2 are not installed.
        ValueError: If no setting has a measurement of the base and a run of LoRA that learned something; those without are left out.
    """
    report.require_extra()
    output.mkdir(parents=True, exist_ok=True)
    ready = {setting: its for setting, its in runs.items() if _can_be_reported(its)}
    if not ready:
        raise ValueError(f"{', '.join(runs)}: no setting has finished runs of the base and of LoRA that learned; run the study first.")
    facts = {**facts, "Versions": _versions(ready)}
    if len(ready) < len(runs):
        facts["Left out"] = f"{', '.join(sorted(runs.keys() - ready.keys()))}: without finished runs of the base and of LoRA that learned"
    runs = ready
    tables: dict[str, dict[str, list[Summary]]] = {}
    steps = {setting: steps_at_equal_rates(its) for setting, its in runs.items()}
    short: dict[str, str] = {}
    never: dict[str, dict[str, float]] = {}
    for setting, its in runs.items():
        base = next(run for run in its if run.arm == BASE)
        tuned, matched = summaries(with_interpolations(its), base)
        never[setting] = unmatched(its, base)
        short[setting] = shortfalls(its, never[setting])
        tables[setting] = {"matched": _ordered(matched), "tuned": _ordered(tuned)}
        write_whole(output / f"{setting}.png", draw(setting, its, base))
    summary: dict[str, Any] = {
        setting: {kind: [dataclasses.asdict(one) for one in its] for kind, its in kinds.items()}
        | {"shortfalls": short[setting]}
        | {"steps_at_equal_rates": {arm: {f"{rate:g}": part for rate, part in rates.items()} for arm, rates in steps[setting].items()}}
        for setting, kinds in tables.items()
    }
    names = meanings(runs)
    heading = headline({setting: kinds["matched"] for setting, kinds in tables.items()}, never)
    stored = _without_infinities({"facts": dict(facts), "settings": summary})
    write_json(output / "study.json", stored)
    write_whole(output / "study.md", (markdown(heading, tables, short, steps) + glossary(names)).encode())
    write_whole(output / "study.html", html(heading, tables, short, steps, names, facts, output).encode())
    return summary


def _can_be_reported(runs: Sequence[Run]) -> bool:
    base = base_of(runs)
    return base is not None and any(gain_of(run, base) > 0 for run in runs if run.arm == BASELINE)


def _versions(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the versions that the runs were made with, each set of them once."""
    noted = [run.result.get("versions") for its in runs.values() for run in its]
    found = dict.fromkeys(", ".join(f"{name} {one}" for name, one in versions.items()) for versions in noted if versions)
    return "; ".join([*found, *(["not noted"] if None in noted else [])])


Steps = Mapping[str, Mapping[str, Mapping[float, float]]]
"""``steps_at_equal_rates`` by setting."""


def shortfalls(runs: Sequence[Run], reached: Mapping[str, float]) -> str:
    """Return a sentence on the arms that ``unmatched`` found, with what they reach, and one on the runs whose loss was not finite."""
    parts = [f"{arm} ({part:.0%})" for arm, part in reached.items()]
    diverged = [f"{run.arm} at {run.rate:g} (seed {run.seed})" for run in runs if run.diverged]
    never = f"These never learn {NEARLY:.0%} of LoRA's best gain (in brackets what they reach): {', '.join(parts)}." if parts else ""
    return f"{never} {'Not finite: ' + ', '.join(diverged) + '.' if diverged else ''}".strip()


def meanings(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, str]]:
    """Return what the names of settings and of arms stand for: the kind or the method, and its options."""
    settings = {setting: its[0].result["spec"]["setting"] for setting, its in runs.items()}
    arms = {run.arm: run.result["spec"]["method"] for its in runs.values() for run in its if run.arm != BASE}
    found = {"Settings": settings, "Arms": dict(sorted(arms.items()))}
    return {title: {name: _options(options) for name, options in entries.items()} for title, entries in found.items()}


def glossary(names: Mapping[str, Mapping[str, str]]) -> str:
    """Return ``meanings`` as Markdown."""
    lines = []
    for title, its in names.items():
        lines += [f"### {title}", "", *(f"- {code(name)}: {escaped(meaning)}" for name, meaning in its.items()), ""]
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    """Return options as people read them, that which says what they belong to first and without its name."""
    kind = options.get("kind", options.get("method"))
    return ", ".join([str(kind), *(f"{key} {json.dumps(value)}" for key, value in options.items() if key not in ("kind", "method"))])


Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


def markdown(heading: Table, tables: Mapping[str, Mapping[str, Sequence[Summary]]], short: Mapping[str, str], steps: Steps) -> str:
    """Return the headline, and of each setting its figure, a table a choice of rates, and one of the steps at equal rates."""
    lines = [f"### {TITLE}", "", *table(*heading)]
    for setting, kinds in tables.items():
        lines += [f"![Gain against forgetting in the setting {escaped(setting)}]({quote(setting)}.png)", ""]
        for kind, its in kinds.items():
            rows = [[*cells(one), _signed(one.kept)] for one in its]
            lines += [f"### {escaped(setting)}: {TITLES[kind]}", "", *table([*COLUMNS, "kept: rise of the loss"], rows)]
        lines += [escaped(short[setting]), ""] if short[setting] else []
        head, rows = step_table(steps[setting])
        if rows:
            lines += [f"### {escaped(setting)}: {STEPS_TITLE}", "", *table(head, rows)]
    return "\n".join(lines)


TITLES = {
    "matched": f"forgetting at matched gain (each arm's smallest rate that learns at least {NEARLY:.0%} of what LoRA does at its best)",
    "tuned": "each arm at its tuned rate",
}


STEPS_TITLE = "part of LoRA's steps after which the validation loss is at LoRA's final one, both at the same rate"


def step_table(steps: Mapping[str, Mapping[float, float]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the steps at equal rates, a column a rate."""
    rates = sorted({rate for its in steps.values() for rate in its})
    return (
        ["arm", *(f"{rate:g}" for rate in rates)],
        [[arm, *(_part(its[rate]) if rate in its else "" for rate in rates)] for arm, its in steps.items()],
    )


def _part(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0%}"


def cells(one: Summary) -> list[str]:
    """Return a row's cells as people read them: means, and (lowest … highest) over the seeds."""
    ratio = "" if one.ratio is None else " " if one.arm == BASELINE else ratio_text(one.ratio)
    accuracy = "" if one.accuracy is None else f"{one.accuracy:.1f} %"
    return [
        one.arm,
        f"{one.rate:g}",
        str(one.num_seeds),
        spread_text(one.gain, 3),
        accuracy,
        spread_text(one.forgetting, 4),
        ratio,
        "" if one.ratio_at_gain is None or one.arm == BASELINE else f"{one.ratio_at_gain:.2f}",
        _part(one.steps_to_baseline),
        f"{one.change_on_context:.2%}",
        f"{one.parameters:,}",
        f"{one.seconds:.0f} s",
        f"{one.memory_gb:.1f} GB",
    ]


def _signed(rises: Mapping[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:+.{digits}f}" for name, value in rises.items())


def html(
    heading: Table,
    tables: Mapping[str, Mapping[str, Sequence[Summary]]],
    short: Mapping[str, str],
    steps: Steps,
    names: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
    folder: Path,
) -> str:
    """Return a page that loads nothing from anywhere; the figures are read from the folder."""
    import base64

    figures = {setting: base64.b64encode((folder / f"{setting}.png").read_bytes()).decode() for setting in tables}
    rows = {
        setting: {
            TITLES[kind]: [
                (cells(one), _signed(one.kept), _signed(one.accuracy_drops, 1), one.arm.partition(",")[0] == one.arm) for one in its
            ]
            for kind, its in kinds.items()
        }
        for setting, kinds in tables.items()
    }
    parts = {setting: step_table(its) for setting, its in steps.items()}
    return report.page(
        "study.html.j2",
        Path(__file__).parent,
        title=TITLE,
        heading=heading,
        tables=rows,
        columns=COLUMNS,
        figures=figures,
        lists={**names, "What was run": facts},
        short=short,
        steps=parts,
        steps_title=STEPS_TITLE,
    )


def draw(setting: str, runs: Sequence[Run], base: Run) -> bytes:
    """Return a figure (PNG): what each arm gained and forgot, a line over its rates, and the frontier of all.

    Points are means over the seeds, bars from the lowest to the highest; LoRA is black, arms of one seed are pale. A line ends where the
    gain is largest; points without one are of higher rates, at which the arm learns less again.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if arm != base.arm]
    figure, axes = pyplot.subplots(figsize=(9, max(5.5, 0.2 * len(arms) + 1)), layout="constrained")  # as high as its legend
    styles = [(f"C{number % 10}", "osD^v<>pX*"[number // 10 % 10 * 3 % 10]) for number in range(len(arms))]
    everything = []
    for arm, (color, marker) in zip(arms, styles, strict=True):
        its = [run for run in runs if run.arm == arm]
        points = points_by_rate(its, base)
        # What all are held against stands out, and what one run alone shows steps back.
        color, strength = ("black", 1.0) if arm == BASELINE else (color, 0.8 if any(run.seed for run in its) else 0.4)
        if not points:
            continue
        everything += [(gain[0], lost[0]) for gain, lost in points]
        end = num_rising(points)
        for some, line, alpha, label in ((points[:end], "-", strength, as_plain(arm)), (points[end:], "", strength / 4, None)):
            gains, losses = [gain for gain, _ in some], [lost for _, lost in some]
            axes.errorbar(
                [mean for mean, _, _ in gains],
                [mean for mean, _, _ in losses],
                xerr=_bars(gains),
                yerr=_bars(losses),
                fmt=f"{line}{marker}",
                color=color,
                markersize=5,
                linewidth=2.0 if arm == BASELINE else 0.8,
                elinewidth=1.2,
                alpha=alpha,
                label=label,
            )
    axes.plot(*zip(*pareto(everything), strict=True), color="black", linewidth=2, alpha=0.25, label="frontier", zorder=0)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(
        xlabel="gain: fall of the loss of what is learned, nats",
        ylabel="forgetting: mean rise of the kept losses, nats",
        title=as_plain(setting),
    )
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.set_ylim(bottom=-0.001)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def as_plain(name: str) -> str:
    """Return a name as matplotlib shows it, for which a dollar begins a formula."""
    return name.replace("$", r"\$")


def _without_infinities(value: Any) -> Any:
    """Return the same with None for infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_infinities(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(one) for one in value]
    return None if value == math.inf else value


def _bars(values: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Return how far below and above the means the lowest and the highest are."""
    return [mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]


def _ordered(found: Mapping[str, Summary]) -> list[Summary]:
    """Return the summaries by rising forgetting."""
    return sorted(found.values(), key=lambda one: one.forgetting[0])
