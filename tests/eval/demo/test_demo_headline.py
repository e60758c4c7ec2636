"""The picture of the demo, from made-up figures."""

import io

import pytest
from PIL import Image

from corda_eval.demo.demo import METHODS
from corda_eval.demo.headline import headline
from corda_eval.suite.comparison import Row
from corda_vlm.pages import COLORS

TASKS = (("digits", "target", True), ("easy_vqa", "kept", True), ("facts", "kept", True), ("perplexity", "kept", False))
BEFORE = (0.1, 0.95, 0.6, 14.2)


def rows_of(after: tuple[float, ...], intervals: tuple[tuple[float, float] | None, ...]) -> list[Row]:
    metrics = ["accuracy" if higher else "perplexity" for _, _, higher in TASKS]
    return [
        Row(task, role, metric, 100, before, value, interval, higher)
        for (task, role, higher), metric, before, value, interval in zip(TASKS, metrics, BEFORE, after, intervals, strict=True)
    ]


def test_headline_is_a_picture() -> None:
    pytest.importorskip("matplotlib")
    values = ((0.93, 0.72, 0.41, 18.93), (0.92, 0.87, 0.55, 15.61), (0.91, 0.93, 0.59, 14.31))
    intervals = ((0.79, 0.86), (-0.25, -0.2), (-0.27, 0.01), (4.41, 5.06))
    drawn = headline({method.label: rows_of(after, intervals) for method, after in zip(METHODS.values(), values, strict=True)}, "lab")
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 500)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}
    for color in COLORS[:3]:
        assert tuple(bytes.fromhex(color[1:])) in colors


def test_names_that_look_like_formulas_are_drawn_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    assert headline({"<b> $\\frac{$": rows_of((0.93, 0.72, 0.41, 18.93), (None, None, None, None))}, "$x$")
