"""Base against tuned models as a page, as Markdown for papers, and as a summary for other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_eval.records import TaskResult, escaped, table
from corda_eval.suite.comparison import Averages, Row
from corda_vlm import report

HEAD = ("task", "metric", "n", "before", "after", "change (95 %)", "retention")


def markdown(rows: Mapping[str, Sequence[Row]], averages: Mapping[str, Averages]) -> str:
    """Return tables of all tuned models by name: tasks down, before and after across, then the averages."""
    lines = []
    for model, its in rows.items():
        lines += [f"### {escaped(model)}", "", *table(HEAD, [_cells(row) for row in its])]
        lines += ["; ".join(sentences(averages[model])), ""]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    retention = "" if row.retention is None else f"{row.retention:.1%}"
    name = f"{row.task} ({row.role})"
    return [name, row.metric, str(row.num_examples), score(row.before, row), score(row.after, row), change(row), retention]


def html(title: str, facts: Mapping[str, str], rows: Mapping[str, Sequence[Row]], averages: Mapping[str, Averages]) -> str:
    """Return a page that loads nothing from anywhere.

    Args:
        title: Its heading.
        facts: What was run, by label: shown at the end.
        rows: By tuned model.
        averages: By tuned model.

    Raises:
        ModuleNotFoundError: If jinja2 is not installed.
    """
    report.require_extra()
    return report.page(
        "comparison.html.j2",
        Path(__file__).parent,
        title=title,
        facts=facts,
        rows=rows,
        sentences={model: sentences(its) for model, its in averages.items()},
        score=score,
        change=change,
        verdict=verdict,
    )


def summary(results: Mapping[str, Sequence[TaskResult]]) -> dict[str, Any]:
    """Return the figures of each model with the keys of lm-eval (``results``) and of CLIP_benchmark (``clip_benchmark``)."""
    return {
        model: {
            "results": {one.task: {_harness_key(key): value for key, value in one.metrics.items()} for one in its},
            "n-samples": {one.task: {"original": one.num_examples, "effective": one.num_examples} for one in its},
            "clip_benchmark": [{"dataset": one.task, "model": model, "metrics": dict(one.metrics)} for one in its],
            "examples_per_second": {one.task: round(one.examples_per_second, 3) for one in its},
        }
        for model, its in results.items()
    }


def score(value: float, row: Row) -> str:
    """Return a score as people write it: percent, or a perplexity as it is."""
    return f"{100 * value:.1f} %" if row.higher_is_better else f"{value:.2f}"


def change(row: Row) -> str:
    """Return after − before with its interval: in points of percent, or in the perplexity's own unit."""
    unit, digits = (100, 1) if row.higher_is_better else (1, 2)
    text = f"{unit * (row.after - row.before):+.{digits}f}"
    if row.interval is not None:
        text += f" ({unit * row.interval[0]:+.{digits}f} … {unit * row.interval[1]:+.{digits}f})"
    return text.replace("-", "−")


def verdict(row: Row) -> str:
    """Return "better", "worse", or "" where the interval holds zero or is not known."""
    if row.interval is None or row.interval[0] <= 0 <= row.interval[1]:
        return ""
    return "worse" if row.drop > 0 else "better"


def sentences(averages: Averages) -> list[str]:
    """Return the averages that there are, in words."""
    named = (
        ("gain on targets", averages.gain, "points"),
        ("mean drop on kept tasks", averages.kept_drop, "points"),
        ("worst drop", averages.worst_drop, "points"),
        ("O-average", averages.o_average, ""),
        ("H-average", averages.h_average, ""),
    )
    return [f"{name} {value:.1f} {unit}".rstrip() for name, value, unit in named if value is not None]


def _harness_key(metric: str) -> str:
    return metric if "," in metric else f"{metric},none"
