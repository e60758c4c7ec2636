"""Base against tuned models as a page, as Markdown for papers, and as a summary for other programs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_core.files import write_whole
from corda_eval.records import TaskResult, escaped, table
from corda_eval.suite.comparison import Averages, Measured, Row, averages
from corda_vlm.pages import address_of, page, require_extra

HEAD = ("task", "metric", "n", "before", "after", "change (95 %)", "retention")


def write_comparison(
    measured: Measured,
    output: Path,
    *,
    title: str = "What was gained, what was forgotten",
    facts: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
    lead: Sequence[str] = (),
    picture: bytes | None = None,
) -> dict[str, Any]:
    """Write ``report.html``, ``report.md`` and ``summary.json`` and return what the last one holds.

    Args:
        measured: What there is to tell.
        output: Folder.
        title: The page's heading.
        facts: What else was run, by label: shown at the page's end and kept in the summary.
        more: What else the summary holds.
        lead: Sentences that the page starts with.
        picture: A PNG below them.

    Raises:
        ModuleNotFoundError: If jinja2 is not installed.
    """
    facts = {**measured.facts, **(facts or {})}
    means = {model: averages(rows) for model, rows in measured.rows.items()}
    comparison = {
        model: {
            "rows": [dataclasses.asdict(row) | {"drop": row.drop, "retention": row.retention} for row in rows],
            "averages": dataclasses.asdict(means[model]),
            "change": measured.changes.get(model),
        }
        for model, rows in measured.rows.items()
    }
    whole = {"models": summary(measured.results), "comparison": comparison, "facts": facts, "seconds": measured.seconds, **(more or {})}
    write_whole(output / "summary.json", json.dumps(whole, indent=1).encode())
    write_whole(output / "report.md", markdown(measured.rows, means).encode())
    write_whole(output / "report.html", html(title, facts, measured.rows, means, lead, picture).encode())
    return whole


def markdown(rows: Mapping[str, Sequence[Row]], means: Mapping[str, Averages]) -> str:
    """Return tables of all tuned models by name: tasks down, before and after across, then the averages."""
    lines = []
    for model, task_rows in rows.items():
        lines += [f"### {escaped(model)}", "", *table(HEAD, [_cells(row) for row in task_rows])]
        lines += ["; ".join(sentences(means[model])), ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    retention = "" if row.retention is None else f"{row.retention:.1%}"
    name = f"{row.task} ({row.role})"
    return [name, row.metric, str(row.num_examples), score(row.before, row), score(row.after, row), change(row), retention]


def html(
    title: str,
    facts: Mapping[str, str],
    rows: Mapping[str, Sequence[Row]],
    means: Mapping[str, Averages],
    lead: Sequence[str] = (),
    picture: bytes | None = None,
) -> str:
    """Return the page; all but facts and means is as in ``write_comparison``.

    Raises:
        ModuleNotFoundError: If jinja2 is not installed.
    """
    require_extra()
    values = {
        "rows": rows,
        "sentences": {model: sentences(mean) for model, mean in means.items()},
        "lead": lead,
        "picture": picture and address_of(picture, "png"),
        "score": score,
        "change": change,
        "verdict": verdict,
    }
    return page("comparison.html.j2", Path(__file__).parent, title, values, {"What was run": facts})


def summary(results: Mapping[str, Sequence[TaskResult]]) -> dict[str, Any]:
    """Return the figures of each model with the keys of lm-eval (``results``) and of CLIP_benchmark (``clip_benchmark``)."""
    return {
        model: {
            "results": {result.task: {_harness_key(key): value for key, value in result.metrics.items()} for result in of_model},
            "n-samples": {result.task: {"original": result.num_examples, "effective": result.num_examples} for result in of_model},
            "clip_benchmark": [{"dataset": result.task, "model": model, "metrics": dict(result.metrics)} for result in of_model],
            "examples_per_second": {result.task: round(result.examples_per_second, 3) for result in of_model},
        }
        for model, of_model in results.items()
    }


def score(value: float, row: Row) -> str:
    """Return a score as people write it: percent, or a perplexity as it is."""
    return f"{100 * value:.1f} %" if row.higher_is_better else f"{value:.2f}"


def change(row: Row) -> str:
    """Return after − before with its interval."""
    text = signed(row.after - row.before, row)
    return text if row.interval is None else f"{text} ({' … '.join(signed(bound, row) for bound in row.interval)})"


def signed(difference: float, row: Row) -> str:
    """Return a difference of scores: in points of percent, or in the perplexity's own unit."""
    text = f"{100 * difference:+.1f}" if row.higher_is_better else f"{difference:+.2f}"
    return text.replace("-", "−") if float(text) else f"±{text[1:]}"


def verdict(row: Row) -> str:
    """Return "better", "worse", or "" where the interval holds zero or is not known."""
    if row.interval is None or row.interval[0] <= 0 <= row.interval[1]:
        return ""
    return "worse" if row.drop > 0 else "better"


def sentences(means: Averages) -> list[str]:
    """Return the averages that there are, in words."""
    named = (
        ("gain on targets", means.gain, "points"),
        ("mean drop on kept tasks", means.kept_drop, "points"),
        ("worst drop", means.worst_drop, "points"),
        ("O-average", means.o_average, ""),
        ("H-average", means.h_average, ""),
    )
    return [f"{name} {value:.1f} {unit}".rstrip() for name, value, unit in named if value is not None]


def _harness_key(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"
