"""The bound on the drift in Trainers: held after each step, under accumulation, resumed, in two processes, and refused with a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from recipes import write_recipe
from safetensors.torch import load_file
from test_run_distributed import FSDP2, finished
from torch import nn
from transformers import Trainer, TrainingArguments

import corda_vlm
from corda_core import collect, context_drift, select_linears
from corda_core.drift import DriftBound
from corda_vlm import DriftCallback
from corda_vlm.data.samples import Collator
from corda_vlm.training.recipe import read_recipe
from corda_vlm.training.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")

KEPT = [
    {"text": text} for text in ("the shape in this is a circle", "what is one two ?", "assistant is in the circle", "two three is a")
] * 3
LEARNED = [{"question": "what color is the shape ?", "answer": answer} for answer in ("red", "blue", "green", "circle")] * 3
HELD = {"corda": {"protect": "strict", "train_fully": []}, "training": {"max_drift": 0.02, "learning_rate": 0.3}}


def prepared(tokenizer: Any, protect: str = "strict") -> Any:
    torch.manual_seed(0)
    return corda_vlm.prepare(tiny_llama(), KEPT, processor=tokenizer, rank=4, protect=protect)


def fine_tuned(model: nn.Module, tokenizer: Any, **options: Any) -> list[tuple[int, float]]:
    return corda_vlm.fine_tune(model, LEARNED, tokenizer, steps=6, batch_size=4, learning_rate=0.3, seed=0, **options)


def test_fine_tune_holds_what_a_rate_too_high_would_move(tokenizer: Any) -> None:
    free, held = prepared(tokenizer), prepared(tokenizer)
    fine_tuned(free, tokenizer)
    losses = fine_tuned(held, tokenizer, max_drift=0.02)
    assert DriftBound(free, 0.02).drift() > 0.1
    assert DriftBound(held, 0.02).drift() == pytest.approx(0.02, rel=1e-4)
    assert losses[-1][1] < losses[0][1]


def test_an_adapter_whose_a_moves_is_held_with_covariances(tokenizer: Any) -> None:
    model = prepared(tokenizer, "start")
    with pytest.raises(ValueError, match='max_drift needs to know the whole context where A moves as in protect="start"'):
        fine_tuned(model, tokenizer, max_drift=0.02)
    base = tiny_llama()
    covariances = collect(base, [{key: value for key, value in Collator(tokenizer)(KEPT).items()}], select_linears(base))
    torch.manual_seed(0)
    fine_tuned(model, tokenizer, callbacks=[DriftCallback(0.02, covariances)])
    squares = [drift**2 for drift in context_drift(model, covariances).values()]
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(0.02, rel=1e-2)


class Counting(DriftCallback):
    steps = 0

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_optimizer_step(*args, **kwargs)
        self.steps += 1
        assert self.bound is not None
        assert self.bound.drift() <= 0.02 * (1 + 1e-5)


def trained(model: nn.Module, tokenizer: Any, folder: Path, micro_batch: int, accumulated: int) -> tuple[Counting, Trainer]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
    )
    callback = Counting(0.02)
    trainer = Trainer(model, arguments, train_dataset=LEARNED, data_collator=Collator(tokenizer, with_labels=True), callbacks=[callback])
    trainer.train()
    return callback, trainer


def test_micro_batches_make_one_step_and_logs_tell_the_drift(tokenizer: Any, tmp_path: Path) -> None:
    whole, split = prepared(tokenizer), prepared(tokenizer)
    callback, trainer = trained(whole, tokenizer, tmp_path, 4, 1)
    other, _ = trained(split, tokenizer, tmp_path, 2, 2)
    assert (callback.steps, other.steps) == (4, 4)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    assert logs[-1]["drift"] == callback.last == 0.02
    for (name, value), (_, expected) in zip(split.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-4, msg=name)


def test_a_run_that_is_killed_resumes_exactly_and_says_its_drift(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor, **HELD))
    summary = run_recipe(recipe)
    weights = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert summary.drift == json.loads((tmp_path / "output" / "training.json").read_text())["drift"] == 0.02
    assert run_recipe(recipe, resume=True).drift == 0.02  # which has ended
    shutil.rmtree(tmp_path / "output" / "checkpoint-8")
    again = run_recipe(recipe, resume=True)
    assert again.losses == summary.losses
    for key, value in load_file(tmp_path / "output" / "adapter_model.safetensors").items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.slow
def test_two_processes_hold_what_one_holds(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, corda={**HELD["corda"], "parts": ["language"]}, training=HELD["training"])
    alone = finished(path, tmp_path / "one")
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, environment in (("ddp", {}), ("fsdp2", FSDP2)):
        two = finished(path, tmp_path / name, environment)
        assert two["drift"] == pytest.approx(alone["drift"], rel=1e-5)
        assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in alone["losses"]], abs=1e-4), name
        for key, value in load_file(tmp_path / name / "adapter_model.safetensors").items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_drift": -0.02}}, "max_drift"),
        ({"training": {"max_drift": 0}}, "max_drift"),
        ({"corda": {"protect": "start"}, "training": {"max_drift": 0.02}}, "training.max_drift is 0.02, but corda.protect: start moves A"),
        ({"corda": {"protect": None, "mode": "ipm"}, "training": {"max_drift": 0.02}}, "but corda.protect: start moves A"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_recipe(processor: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(write_recipe(tmp_path, processor, **changes))


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="max_drift takes weights back after each step, but DeepSpeed steps on copies"):
        DriftCallback(0.02).on_train_begin(arguments, None, None)  # type: ignore[arg-type]
