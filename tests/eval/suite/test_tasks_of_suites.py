"""Suites: how questions are asked, told once for all tasks or for one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from corda_eval.suite import tasks as suites
from corda_eval.suite.tasks import BENCHMARKS, Suite, SuiteTask, read_suite, run_task
from corda_eval.vqa.answer import Asking


def written(folder: Path, **options: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_a_suite_says_how_its_tasks_ask(tmp_path: Path) -> None:
    own = {"task": "gqa", "max_new_tokens": 16, "system": "", "pad_images": False}
    tasks = ["vqav2", own, {"task": "mmbench", "system": "Be short."}, "arc_easy", "cifar100", "digits"]
    suite = read_suite(written(tmp_path, tasks=tasks, max_new_tokens=64, system="A chat.", pad_images=True))
    asked = {task.task: (task.max_new_tokens, task.system, task.pad_images) for task in suite.tasks}
    assert asked == {
        "vqav2": (64, "A chat.", True),
        "gqa": (16, "", False),
        "mmbench": (64, "Be short.", True),
        "arc_easy": (None, None, None),
        "cifar100": (None, None, None),
        "digits": (64, "A chat.", True),
    }
    assert Suite(suite.tasks, max_new_tokens=64, system="A chat.", pad_images=True) == suite


def test_without_options_each_benchmark_keeps_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Asking] = []
    monkeypatch.setattr(suites, "examples_of", lambda task, benchmark, download: [])
    monkeypatch.setattr(suites, "answer_benchmark", lambda *given, **_: seen.append(given[4]))
    for options in ({}, {"max_new_tokens": 9, "system": "A chat.", "pad_images": True}):
        (task,) = read_suite(written(tmp_path, tasks=["scienceqa"], **options)).tasks
        run_task(task, None, None)  # type: ignore[arg-type]
    assert seen == [Asking(BENCHMARKS["scienceqa"].max_new_tokens), Asking(9, "A chat.", pad_images=True)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tasks": ["gqa"], "batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"tasks": ["gqa"], "max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"tasks": [{"task": "gqa", "max_new_tokens": -1}]}, "max_new_tokens is -1; expected at least 1"),
        ({"tasks": [{"task": "gqa", "pad_images": "yes"}]}, "pad_images is 'yes'; expected true or false"),
        ({"tasks": ["gqa"], "system": 5}, "system is 5; expected a text"),
        (
            {"tasks": [{"task": "arc_easy", "system": ""}]},
            r"arc_easy: system is for benchmarks of questions about images \(.*easy_vqa, .*\); leave",
        ),
        ({"tasks": [{"task": "cifar10", "pad_images": False}]}, "cifar10: pad_images is for benchmarks"),
        ({"tasks": ["arc_easy"], "pad_images": True}, "pad_images is for benchmarks of questions about images .*, and none is named"),
    ],
)
def test_options_that_cannot_be_right(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        read_suite(written(tmp_path, **options))
    assert "\n" not in str(caught.value)


def test_llavas_suite_asks_as_llava_does() -> None:
    suite = read_suite(Path(__file__).parents[3] / "configs" / "suite_vlm.yaml")
    asked = [task for task in suite.tasks if task.task in BENCHMARKS]
    assert {(task.max_new_tokens, task.system, task.pad_images) for task in asked} == {(None, suite.system, True)}
    assert SuiteTask("gqa").pad_images is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "text.txt does not exist"),
        (b"\xff\xfe", "text.txt is no text in UTF-8"),
        (b"red blue " * 200, r"own: .*text.txt: The text gives 1 windows of 256 tokens, not 50; .* Its `limit` says how many"),
    ],
)
def test_a_text_that_cannot_be_measured_is_named(tmp_path: Path, llama: Any, tokenizer: Any, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run_task(SuiteTask("perplexity", data=str(tmp_path / "text.txt"), name="own"), llama, tokenizer)
