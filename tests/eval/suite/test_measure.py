"""Suites from the command line: base and tuned, done once, resumed, compared."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import tiny_llava
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import corda_vlm
from corda_eval.cli import app
from corda_eval.records import library_versions
from corda_eval.suite import measure as run
from corda_eval.suite import page
from corda_eval.suite.tasks import read_suite
from corda_vlm import outputs
from corda_vlm.training.recipe import ModelConfig

for package in ("lm_eval", "sklearn", "jinja2", "matplotlib", "open_clip"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")


@pytest.fixture
def place(tmp_path: Path, processor: Any) -> Path:
    """A tiny LLaVA, an adapter in training that changed it, the LoRA exported from that, data and a suite."""
    tiny_llava().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    samples = [(Image.new("RGB", (16, 16), color), "what color is this ?") for color in ("red", "green", "blue")]
    adapted = corda_vlm.prepare(tiny_llava(), samples, rank=4, processor=processor, protect="start")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            parameter.data += 0.5 * torch.randn_like(parameter)
    corda_vlm.save(adapted, tmp_path / "tuned")
    corda_vlm.export(adapted, tmp_path / "lora")
    for color in ("red", "green", "blue"):
        (tmp_path / "photos" / color).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), color).save(tmp_path / "photos" / color / f"{number}.png")
    (tmp_path / "text.txt").write_text("what color is the shape in this ? red blue green circle a one two " * 200)
    rows = [{"q": "what color is this ?", "choices": ["red", "blue"], "gold": number % 2} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    tasks = [
        {"task": "digits", "role": "target", "limit": 5},
        {"task": "image_folder", "data": str(tmp_path / "photos")},
        {"task": "perplexity", "data": str(tmp_path / "text.txt"), "limit": 3},
        {"task": str(tmp_path / "own.yaml")},
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks, "batch_size": 2}))
    return tmp_path


def called(place: Path, *adapters: str) -> Any:
    given = [part for name in adapters for part in ("--adapter", str(place / name))]
    common = ["--base", str(place / "base"), "--dtype", "float32", "--suite", str(place / "suite.yaml"), "--output", str(place / "out")]
    return CliRunner().invoke(app, ["eval", *common, *given])


def test_base_and_adapters_are_compared(place: Path) -> None:
    done = called(place, "tuned", "lora")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "tuned: gain on targets" in done.output
    summary = json.loads((place / "out" / "summary.json").read_text())
    rows = {name: {row["task"]: row for row in summary["comparison"][name]["rows"]} for name in ("tuned", "lora")}
    assert list(rows["tuned"]) == ["digits", "image_folder", "perplexity", "own"]
    for task, row in rows["tuned"].items():  # the LoRA is the same function
        assert row["after"] == pytest.approx(rows["lora"][task]["after"], rel=1e-4), task
    assert rows["tuned"]["perplexity"]["before"] != rows["tuned"]["perplexity"]["after"]
    assert rows["tuned"]["image_folder"]["num_examples"] == 9
    assert summary["comparison"]["tuned"]["change"] == pytest.approx(summary["comparison"]["lora"]["change"], rel=1e-4)
    assert summary["models"]["base"]["results"]["own"]["acc,none"] == 0.5
    for name in ("report.html", "report.md"):
        text = (place / "out" / name).read_text()
        assert all(word in text for word in ("digits", "perplexity", "tuned", "lora"))


def test_batches_are_held_against_single_questions(place: Path) -> None:
    common = ["--base", str(place / "base"), "--dtype", "float32", "--suite", str(place / "suite.yaml"), "--output", str(place / "out")]
    done = CliRunner().invoke(app, ["eval", *common, "--adapter", str(place / "tuned"), "--check-batch-invariance", "4"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "digits: 0 of 4 answers change with the batch size." in done.output


def test_what_is_done_is_not_done_again(place: Path, monkeypatch: Any) -> None:
    assert called(place, "tuned").exit_code == 0
    before = (place / "out" / "report.md").read_text()
    asked: list[str] = []
    real = run.run_task
    monkeypatch.setattr(run, "run_task", lambda task, *args, **options: asked.append(task.task) or real(task, *args, **options))
    (place / "out" / "tuned" / "perplexity.json").unlink()
    assert called(place, "tuned").exit_code == 0
    assert asked == ["perplexity"]
    assert (place / "out" / "report.md").read_text() == before


@pytest.mark.parametrize("download", [False, True])
def test_tasks_reach_the_network_only_if_asked(place: Path, download: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = run.run_task
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        run, "run_task", lambda *args, **options: seen.append(huggingface_hub.constants.HF_HUB_OFFLINE) or real(*args, **options)
    )
    run.measure(ModelConfig(str(place / "base"), dtype="float32", download=download), {}, read_suite(place / "suite.yaml"), place / "out")
    assert seen == [not download] * 4


def test_what_belongs_to_another_run_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(place, "tuned").exit_code == 0
    shutil.rmtree(place / "tuned")
    shutil.copytree(place / "lora", place / "tuned")
    done = called(place, "tuned")
    assert done.exit_code == 1
    assert "was made with another adapter" in done.output
    suite = (place / "suite.yaml").read_text()
    (place / "suite.yaml").write_text(suite.replace("limit: 5", "limit: 4"))
    done = called(place, "lora")
    assert "digits.json was made with another task" in done.output
    for option in ("pad_images: true", "system: a circle", "max_new_tokens: 3"):
        (place / "suite.yaml").write_text(f"{suite}\n{option}")
        assert "digits.json was made with another task" in called(place, "lora").output
    (place / "suite.yaml").write_text(suite)
    monkeypatch.setattr(run, "library_versions", lambda: library_versions() | {"torch": "99.0"})
    assert f"digits.json was made with another torch ({library_versions()['torch']}); name another output" in called(place, "lora").output


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("out/base/digits.json", lambda text: text.replace('"accuracy": ', '"accuracy": 1'), "digits.json is damaged"),
        ("out/base/digits.json", lambda text: text[:50], "digits.json is not whole JSON"),
        ("out/tuned/digits.json", lambda text: "[]", "digits.json is not a JSON object"),
        ("lora/adapter_config.json", lambda text: text[:50], "adapter_config.json is not whole JSON"),
        ("lora/adapter_config.json", lambda text: text.replace('"r": ', '"r": 9'), "adapter_config.json is not that which"),
        ("lora/adapter_config.json", lambda text: text.replace('"LORA"', '"ADALORA"'), "adapter_config.json is not that which"),
        ("tuned/corda.safetensors", lambda text: "", "corda.safetensors is damaged"),
    ],
)
def test_damage_is_told_by_its_files_name(file: str, change: Callable[[str], str], sentence: str, place: Path) -> None:
    if file.startswith("out"):
        assert called(place, "tuned").exit_code == 0
    path = place / file
    path.write_text(change(path.read_text(errors="ignore")))
    done = called(place, "lora" if file.startswith("lora") else "tuned")
    assert done.exit_code == 1, done.output
    assert sentence in done.output


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("r", 999, "lora holds no LoRA that fits this base"),
        ("target_modules", ["q_proj"], "do not fit each other: one has"),
        ("target_modules", ["fc1"], "do not fit each other: one has"),
        ("use_dora", True, "do not fit each other: one has"),
        ("peft_type", "IA3", "expected LORA"),
    ],
)
def test_a_foreign_lora_that_does_not_fit_is_a_sentence(key: str, value: Any, sentence: str, place: Path) -> None:
    """PEFT itself drops what has no place, and makes up what is missing."""
    weights = place / "lora" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as others write it, without digests
    config = place / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value, "rank_pattern": {}}))
    done = called(place, "lora")
    assert done.exit_code == 1
    assert sentence in done.output, done.output


def test_two_at_once_do_not_share_an_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LOCK_WAIT", 0.1)
    with outputs.locked(place / "out"):
        done = called(place, "tuned")
    assert done.exit_code == 1
    assert "out is in use by another run" in done.output


def test_the_report_is_written_before_another_run_may_begin(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LOCK_WAIT", 0.1)
    write = page.write_comparison

    def write_while_held(*args: Any, **options: Any) -> Any:
        with pytest.raises(BlockingIOError), outputs.locked(place / "out"):
            pass
        return write(*args, **options)

    monkeypatch.setattr(page, "write_comparison", write_while_held)
    done = called(place, "tuned")
    assert done.exit_code == 0, done.output
    assert (place / "out" / "report.html").exists()


def test_errors_are_sentences(place: Path) -> None:
    for text, message in (
        ("tasks: []", "has no list of tasks"),
        ("tasks: [{task: digits}, {task: digits}]", "names 'digits' twice"),
        ("tasks: [{task: digits, rol: kept}]", "unknown option 'rol'; did you mean 'role'?"),
        ("tasks: [{task: digits, role: main}]", "role is 'main'; expected 'target' or 'kept'"),
        ("tasks: [{task: vqav2}]", "vqav2 has no data; name its folder or file"),
        ("tasks: [{task: vqav2, data: nowhere}]", "nowhere"),
    ):
        (place / "suite.yaml").write_text(text)
        done = called(place, "tuned")
        assert done.exit_code == 1, text
        assert message in done.output, done.output
    assert "does not exist" in called(place, "absent").output


def test_the_shipped_suites_are_read() -> None:
    for path in sorted((Path(__file__).parents[3] / "configs").glob("suite_*.yaml")):
        suite = read_suite(path)
        assert {task.role for task in suite.tasks} == {"target", "kept"}


@pytest.mark.slow
def test_two_processes_share_the_tasks_and_find_the_same(place: Path) -> None:
    assert called(place, "tuned").exit_code == 0
    expected = json.loads((place / "out" / "summary.json").read_text())["comparison"]
    shutil.rmtree(place / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "corda_eval.cli", "eval"]
    command += ["--base", str(place / "base"), "--dtype", "float32", "--suite", str(place / "suite.yaml"), "--output", str(place / "out")]
    done = subprocess.run([*command, "--adapter", str(place / "tuned")], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report:") == 1
    assert done.stdout.count(" a second\n") == 2 * len(yaml.safe_load((place / "suite.yaml").read_text())["tasks"])
    assert json.loads((place / "out" / "summary.json").read_text())["comparison"] == expected
