"""The page and the picture of a run, from a small made-up summary."""

import base64
import copy
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from corda_core import files
from corda_vlm import report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

OPTIONAL = ("verdict", "decomposition", "export", "examples")


def picture(text: str) -> str:
    """A small PNG with `text` on it, in base64."""
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).text((36, 20), text, fill="black", font_size=48)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def method(label: str, scores: list[float], intervals: list[list[float]], speed: float) -> dict[str, Any]:
    """A trained method."""
    tasks = ["digits", "easy_vqa", "facts", "text"]
    return {
        "label": label,
        "learning_rate": 1e-3,
        "trainable_parameters": 4_884_480,
        "stored_parameters": 9_768_960,
        "train_seconds": 184.2,
        "steps": 60,
        "losses": [[step, 2.4 * 0.9 ** (speed * step) + 0.02] for step in range(1, 61, 3)],
        "change": 0.0512 / speed,
        "scores": dict(zip(tasks, scores, strict=True)),
        "intervals": dict(zip(tasks, intervals, strict=True)),
    }


def task(label: str, role: str, n: int, metric: str = "accuracy") -> dict[str, Any]:
    """A task."""
    is_accuracy = metric == "accuracy"
    return {"label": label, "role": role, "metric": metric, "unit": "%" if is_accuracy else "", "n": n, "higher_is_better": is_accuracy}


def spectrum(length: int, decay: float) -> list[float]:
    """Singular values that fall as of a real layer: quickly, slowly, quickly."""
    return [(1 + i / 4) ** -0.5 * 10 ** (-decay * i / length) * (1 - 0.99 * (i / length) ** 12) for i in range(length)]


@pytest.fixture
def summary() -> dict[str, Any]:
    """What a run of the demo finds."""
    layer = {"with_context": spectrum(576, 3.2), "without_context": spectrum(576, 0.4), "chosen": [560, 576]}
    layer |= {"tail_energy_with": 1.23e-6, "tail_energy_without": 0.0041}
    prefix = "model.text_model.layers"
    names = [f"{prefix}.0.self_attn.q_proj", f"{prefix}.14.mlp.up_proj", "model.vision_model.encoder.layers.11.mlp.fc2"]
    answers = {"base": "4", "lora": "7", "kpm_start": "7", "kpm_strict": "7"}
    return {
        "title": "Teaching SmolVLM to read digits without forgetting",
        "seed": 0,
        "commit": "0123abcd",
        "date": "2025-11-22",
        "seconds": 1834.0,
        "command": "corda-vlm demo --seed 0",
        "config": {"rank": 16, "alpha": 16, "batch_size": 8, "targets": "language_model"},
        "versions": {"torch": "2.9.1", "transformers": "5.0.0"},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "threads": 2},
        "peak_memory_gb": 5.31,
        "base": {"name": "SmolVLM-256M-Instruct", "parameters": 256_484_928},
        "tasks": {
            "easy_vqa": task("easy-VQA", "kept", 1000),
            "digits": task("Handwritten digits", "target", 397),
            "facts": task("Facts", "kept", 100),
            "text": task("Technical English", "kept", 4096, "perplexity"),
        },
        "methods": {
            "base": {"label": "Base", "scores": {"digits": 10.1, "easy_vqa": 95.2, "facts": 60.0, "text": 14.2}},
            "lora": method("LoRA", [93.2, 72.2, 41.0, 18.93], [[79.6, 86.1], [-25.8, -20.3], [-27, -11], [4.41, 5.06]], 1.3),
            "kpm_start": method("CorDA KPM (start)", [92.7, 87.8, 55.0, 15.61], [[79.1, 85.9], [-9.4, -5.5], [-11, 1], [1.27, 1.55]], 1.0),
            "kpm_strict": method("CorDA KPM (strict)", [91.4, 93.3, 59.0, 14.31], [[77.8, 84.6], [-3.1, -0.8], [-5, 3], [0.06, 0.16]], 0.7),
        },
        "verdict": {
            "kept_task": "easy_vqa",
            "lora_drop": 23.0,
            "ratios": {"kpm_start": 3.1, "kpm_strict": 12.1},
            "sentences": [
                "At about the same gain on the digits, CorDA forgot 12 times less of easy-VQA than LoRA did.",
                "LoRA lost 23.0 points, CorDA KPM (start) 7.4 and CorDA KPM (strict) 1.9, measured on 1,000 questions.",
            ],
        },
        "decomposition": {
            "rank": 16,
            "mode": "kpm",
            "num_layers": 210,
            "tokens": 40_000,
            "layers": dict.fromkeys(names, layer),
        },
        "export": {"path": "demo/adapter", "rank": 32, "max_logit_difference": 2.1e-6},
        "examples": [
            {"task": "digits", "question": "Which digit is this?", "answer": "7", "image": picture("7"), "predictions": answers},
            {"task": "facts", "question": "The capital of Italy is", "answer": "Rome", "image": None, "predictions": {"base": "rome."}},
        ],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the page goes."""
    return tmp_path / "report.html"


def write(summary: dict[str, Any], path: Path) -> str:
    """The page as text."""
    report.write_report(summary, path)
    return path.read_text(encoding="utf-8")


def test_page_shows_every_method_and_score(summary: dict[str, Any], path: Path) -> None:
    page = write(summary, path)
    assert list(path.parent.iterdir()) == [path]
    for info in summary["methods"].values():
        assert info["label"] in page
        for name, score in info["scores"].items():
            assert f"<b>{report.format_score(score, summary['tasks'][name]['unit'])}</b>" in page
    for text in (*summary["verdict"]["sentences"], "−23.0", "+81.3", "−25.8 to −20.3", "no clear change", "demo/adapter", "✗"):
        assert text in page
    assert page.index("Handwritten digits") < page.index('<th scope="col">easy-VQA')
    assert page.count("data:image/svg+xml") == 4 + 1 + 3


def test_page_loads_nothing(summary: dict[str, Any], path: Path) -> None:
    page = write(summary, path)
    sources = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("missing", [*OPTIONAL, "intervals", "change", "losses", "all"])
def test_missing_sections_are_left_out(summary: dict[str, Any], path: Path, missing: str) -> None:
    for key in OPTIONAL if missing == "all" else (missing,):
        summary.pop(key, None)
    for info in summary["methods"].values():
        for key in ("intervals", "change", "losses") if missing == "all" else (missing,):
            info.pop(key, None)
    page = write(summary, path)
    assert ("95% interval" in page) == (missing not in ("intervals", "all"))
    assert ("Training loss by step" in page) == (missing not in ("losses", "all"))
    heading = {"decomposition": "<h2>What the context", "export": "<h2>Export", "examples": "<h2>Examples", "verdict": 'class="verdict"'}
    for key, text in heading.items():
        assert (text in page) == (missing not in (key, "all"))


def test_exports_may_be_several(summary: dict[str, Any], path: Path) -> None:
    summary["export"] = [summary["export"], summary["export"] | {"path": "demo/other"}]
    page = write(summary, path)
    assert "<code>demo/adapter</code>" in page
    assert "<code>demo/other</code>" in page


def test_ratio_is_shown_unless_nothing_was_lost(summary: dict[str, Any], path: Path) -> None:
    summary["methods"]["kpm_start"]["scores"]["easy_vqa"] = 95.2
    summary["methods"]["kpm_strict"]["scores"].pop("facts")
    page = write(summary, path)
    assert "lost nothing on easy-VQA" in page
    assert "lost 12.1× less than LoRA on easy-VQA" in page


def test_score_that_was_not_measured_is_a_dash(summary: dict[str, Any], path: Path) -> None:
    del summary["methods"]["lora"]["scores"]["text"]
    summary["methods"]["base"]["scores"]["facts"] = None
    summary["methods"]["kpm_start"]["scores"]["text"] = float("inf")
    page = write(summary, path)
    assert "<b>–</b>" in page
    assert "<b>∞</b>" in page
    report.draw_headline(summary, path.with_suffix(".png"))


def test_html_and_formulas_are_text(summary: dict[str, Any], path: Path) -> None:
    evil = '<script>alert("x")</script> $\\frac{$'
    summary["title"] = summary["command"] = summary["methods"]["lora"]["label"] = summary["tasks"]["facts"]["label"] = evil
    summary["config"]["note"] = summary["verdict"]["sentences"][0] = evil
    summary["examples"][0] |= {"answer": evil, "question": evil, "image": '"><script>', "predictions": {"base": evil}}
    page = write(summary, path)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    report.draw_headline(summary, path.with_suffix(".png"))


def test_old_report_survives_a_failure(summary: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("old")
    broken = copy.deepcopy(summary)
    del broken["title"]
    with pytest.raises(Exception, match="title"):
        report.write_report(broken, path)

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(summary, path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_same_summary_gives_the_same_page(summary: dict[str, Any], path: Path) -> None:
    assert write(summary, path) == write(copy.deepcopy(summary), path)


def test_headline_is_a_picture(summary: dict[str, Any], tmp_path: Path) -> None:
    report.draw_headline(summary, tmp_path / "headline.png")
    with Image.open(tmp_path / "headline.png") as image:
        assert image.format == "PNG"
        assert image.size == (1200, 500)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}
    for key in ("lora", "kpm_start", "kpm_strict"):
        assert tuple(bytes.fromhex(report.METHOD_COLORS[key][1:])) in colors


@pytest.mark.parametrize(
    ("change", "interval", "higher_is_better", "verdict"),
    [
        (-2.0, None, True, "worse"),
        (-2.0, None, False, "better"),
        (2.0, (0.5, 3.0), False, "worse"),
        (2.0, (-0.5, 3.0), True, "no clear change"),
        (0.004, None, True, "no clear change"),
        (None, None, True, ""),
    ],
)
def test_verdict(change: float | None, interval: tuple[float, float] | None, higher_is_better: bool, verdict: str) -> None:
    assert report.Cell(1.0, change, interval, higher_is_better).verdict == verdict


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(summary: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed; run: pip install 'corda-vlm\[demo\]'"):
        report.write_report(summary, path)
