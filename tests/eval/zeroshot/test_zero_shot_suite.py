"""Suites: retrieval, and a vision tower measured in the model that it came from."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import tiny_llava
from test_transplant import llava_of
from two_towers import coloured, hugging_clip
from typer.testing import CliRunner

import corda_vlm
from corda_eval.cli import app
from corda_eval.suite import tasks as suite
from corda_eval.suite.tasks import SuiteTask, run_task
from corda_eval.zeroshot.classify import classify_images
from corda_eval.zeroshot.folders import image_folder
from corda_eval.zeroshot.transplant import transplanted
from corda_vlm.training.recipe import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:rank .* is larger", "ignore:.*does not reach the output")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A CLIP, an ordinary LoRA of it, captioned and classified images."""
    model, pairs = hugging_clip()
    model.save_pretrained(tmp_path / "clip")
    pairs.processor.save_pretrained(tmp_path / "clip")  # type: ignore[attr-defined]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    for number in range(6):
        (tmp_path / "photos" / f"kind {number % 3}").mkdir(parents=True, exist_ok=True)
        coloured(number).save(tmp_path / "photos" / f"kind {number % 3}" / f"{number}.png")
    rows = [{"image": f"kind {number % 3}/{number}.png", "caption": [f"picture {number}", f"no {number}"]} for number in range(6)]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path


def retrieval(place: Path, **options: Any) -> SuiteTask:
    return SuiteTask("retrieval", data=str(place / "captions.json"), images=str(place / "photos"), **options)


def test_retrieval_before_and_after(place: Path) -> None:
    tasks = [
        {"task": "image_folder", "role": "target", "data": str(place / "photos")},
        {"task": "retrieval", "name": "tiny_captions", "data": str(place / "captions.json"), "images": str(place / "photos"), "limit": 5},
    ]
    (place / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks, "batch_size": 4}))
    options = ["--dtype", "float32", "--suite", str(place / "suite.yaml"), "--output", str(place / "out")]
    done = CliRunner().invoke(app, ["eval", "--base", str(place / "clip"), "--adapter", str(place / "lora"), *options])
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((place / "out" / "summary.json").read_text())
    (row,) = [row for row in result["comparison"]["lora"]["rows"] if row["task"] == "tiny_captions"]
    assert (row["metric"], row["num_examples"]) == ("image_retrieval_recall@1", 10)
    assert row["interval"] is not None
    assert result["models"]["lora"]["results"]["tiny_captions"]["text_retrieval_recall@5,none"] == 1


def test_images_are_looked_for_beside_the_captions(place: Path) -> None:
    model, pairs = hugging_clip()
    task = SuiteTask("retrieval", data=str(place / "captions.json"))
    with pytest.raises(FileNotFoundError, match=r"There is no .*kind 0/0.png, as for 6 of captions.json's 6 images"):
        run_task(task, model, pairs.processor)  # type: ignore[attr-defined]
    (place / "captions.json").rename(place / "photos" / "captions.json")
    result = run_task(SuiteTask("retrieval", data=str(place / "photos" / "captions.json")), model, pairs.processor)  # type: ignore[attr-defined]
    assert result.num_examples == 12


def test_a_tuned_tower_is_measured_in_its_original(place: Path, processor: Any) -> None:
    original, pairs = hugging_clip()
    llava = llava_of(original)
    ids = torch.tensor([[2, *[5] * 4, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pairs.read([coloured(1)])}
    adapted = corda_vlm.prepare(llava, [batch], rank=2, parts=["vision"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter)
    untouched = run_task(retrieval(place), original, pairs.processor)  # type: ignore[attr-defined]
    asked = retrieval(place, tower_in=str(place / "clip"))
    tuned = run_task(asked, adapted, processor)
    assert tuned.records == run_task(retrieval(place), transplanted(original, adapted), pairs.processor).records  # type: ignore[attr-defined]
    assert tuned.records != untouched.records
    with adapted.disable_adapter():
        assert run_task(asked, adapted, processor).records == untouched.records
    classified = run_task(SuiteTask("image_folder", data=str(place / "photos"), tower_in=str(place / "clip")), adapted, processor)
    expected = classify_images(transplanted(original, adapted), image_folder(place / "photos"), pairs)
    assert classified.records == expected.records


def test_tasks_that_do_not_fit_are_sentences(place: Path, processor: Any) -> None:
    with pytest.raises(ValueError, match="retrieval: LlavaForConditionalGeneration has no text tower .* name in tower_in"):
        run_task(retrieval(place), tiny_llava(), processor)
    with pytest.raises(ValueError, match="The vision tower lacks .* give the original that the tower came from"):
        run_task(retrieval(place, tower_in=str(place / "clip")), tiny_llava(), processor)
    with pytest.raises(ValueError, match="model.path .*nowhere is no folder here and not in the cache of the hub"):
        run_task(retrieval(place, tower_in="nowhere"), tiny_llava(), processor)
    with pytest.raises(ValueError, match="digits: tower_in is 'x', but this is no task for two towers"):
        SuiteTask("digits", tower_in="x")
    with pytest.raises(ValueError, match="cifar10: images is 'x', which retrieval alone reads"):
        SuiteTask("cifar10", images="x")


def test_the_originals_precision_is_the_models(place: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelConfig] = []
    real = suite.load_base
    monkeypatch.setattr(suite, "load_base", lambda config: asked.append(config) or real(config))
    llava = llava_of(hugging_clip()[0]).bfloat16()
    run_task(retrieval(place, tower_in=str(place / "clip")), llava, processor)
    assert (asked[0].dtype, asked[0].download) == ("bfloat16", False)
