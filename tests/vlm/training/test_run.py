"""Recipes run: trained, killed and resumed, what stops a run with a sentence, and what is left then."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_llava
from peft import PeftModel
from recipes import write_open_clip, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, TrainerCallback
from typer.testing import CliRunner

import corda_core
from corda_core.files import read_tensors
from corda_vlm import outputs
from corda_vlm.cli import app
from corda_vlm.data.samples import Collator
from corda_vlm.training import run
from corda_vlm.training.recipe import read_model, read_recipe
from corda_vlm.training.resume import claim, last_whole
from corda_vlm.training.train import parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*reach the output", "ignore:.*larger than min")


def trained(path: Path, *overrides: str, resume: bool = False) -> run.RunSummary:
    return run.run_recipe(read_recipe(path, list(overrides)), resume=resume)


def launch(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "corda_vlm.cli", "train", "--config", str(path), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def adapter_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def test_a_run_learns_and_leaves_an_adapter_that_loads_anywhere(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 30, "learning_rate": 2e-2})
    done = trained(path)
    assert [step for step, _ in done.losses] == list(range(1, 31))
    assert done.losses[-1][1] < 0.9 * done.losses[0][1]
    assert json.loads((done.output / "training.json").read_text())["losses"] == [list(entry) for entry in done.losses]
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    batch = Collator(processor)([{"image": str(tmp_path / "0.png"), "question": "what color is this ?"}])
    with torch.no_grad():
        untouched = base.eval()(**batch).logits
        expected = corda_core.load(base, done.output)(**batch).logits
    assert not torch.equal(untouched, expected)
    for options in ([], ["--merge"]):
        result = CliRunner().invoke(
            app, ["export", "--adapter", str(done.output), "--output", str(tmp_path / f"out{len(options)}"), *options]
        )
        assert result.exit_code == 0, result.output
    lora = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "out0").eval()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out1").eval()
    assert not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(lora(**batch).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=0, atol=1e-5)


def test_plain_lora_is_a_recipe_too_and_resumes_and_keeps(processor: Any, tmp_path: Path) -> None:
    """LoRA held to the base: what the recipe needs of the context is its samples; the folder is one that plain PEFT reads."""
    options = {"mode": "lora", "protect": None, "train_fully": []}
    path = write_recipe(tmp_path, processor, corda=options, keep={"every": 2}, training={"learning_rate": 2e-2})
    whole = trained(path, f"output={tmp_path / 'whole'}")
    assert whole.kept is not None
    trained(path, "training.steps=8")
    shutil.rmtree(tmp_path / "output" / "checkpoint-8")
    for file in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        (tmp_path / "output" / file).unlink()
    again = trained(path, resume=True)
    assert again.losses == whole.losses
    base, batch = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        Collator(processor)([{"question": "what color is this ?"}]),
    )
    with torch.no_grad():
        expected = corda_core.load(base, whole.output).eval()(**batch).logits
        plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), again.output).eval()
        assert torch.equal(plain(**batch).logits, expected)
    with pytest.raises(ValueError, match="max_drift is 0.02, but corda.protect: none moves A"):
        read_recipe(path, ["training.max_drift=0.02"])


@pytest.mark.slow
def test_killed_runs_go_on_as_if_nothing_had_happened(processor: Any, tmp_path: Path) -> None:
    """SIGKILL while preparing, in the middle of writing a checkpoint, and between two; then the same losses and the same weights."""
    options = {"micro_batch_size": 2, "projector_learning_rate": 1e-3, "evaluate_every": 4, "steps": 40, "save_every": 4}
    path = write_recipe(tmp_path, processor, training=options, evaluation={"source": str(tmp_path / "data.json"), "limit": 6})
    whole = trained(path, f"output={tmp_path / 'whole'}")
    output = tmp_path / "output"
    moments = ["recipe.yaml", "checkpoint-8", "checkpoint-16/corda.safetensors", "checkpoint-28/optimizer.pt"]
    for moment in moments:
        process = launch(path, "--resume")
        while not (output / moment).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (output / "training.json").exists()
    done = trained(path, resume=True)
    assert done.losses == whole.losses
    assert done.evaluation == whole.evaluation
    expected = adapter_weights(tmp_path / "whole")
    assert any("multi_modal_projector" in key for key in expected)
    assert all(torch.equal(value, expected[key]) for key, value in adapter_weights(output).items())
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-36", "checkpoint-40"]
    for checkpoint in output.glob("checkpoint-*"):  # of each an adapter can be had
        corda_core.load(tiny_llava(), checkpoint)


def test_a_damaged_checkpoint_is_passed_over(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path)
    for name in ("training.json", "adapter_model.safetensors"):  # as if it had died after the last checkpoint
        (tmp_path / "output" / name).unlink()
    optimizer = tmp_path / "output" / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-500])
    assert trained(path, resume=True).losses == whole.losses


@pytest.mark.parametrize("options", [{"steps": 8}, {"epochs": 1.5, "steps": None}])
def test_resuming_what_has_ended_writes_the_adapter_and_stops(options: dict[str, Any], processor: Any, tmp_path: Path) -> None:
    """Also where the last step is not the last of an epoch, and after a death between the last checkpoint and the adapter."""
    path = write_recipe(tmp_path, processor, training=options, evaluation={"source": str(tmp_path / "data.json"), "limit": 4})
    whole = trained(path)
    expected = adapter_weights(whole.output)
    for left in ([], ["adapter_model.safetensors", "training.json"], ["adapter_config.json"]):
        for name in left:
            (whole.output / name).unlink()
        again = trained(path, resume=True)
        assert again.losses == whole.losses
        assert again.evaluation == whole.evaluation
        assert all(torch.equal(value, expected[key]) for key, value in adapter_weights(whole.output).items())
        assert corda_core.load(tiny_llava(), whole.output)


def test_every_file_of_a_checkpoint_is_verified(processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path)
    newest = whole.output / "checkpoint-8"
    names = [file.name for file in newest.iterdir()]
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "corda.safetensors"} < set(names)
    for name in names:
        content = (newest / name).read_bytes()
        for damaged in (content[: len(content) // 2], bytes([*content[:-1], content[-1] ^ 1])):
            (newest / name).write_bytes(damaged)
            assert last_whole(whole.output) == whole.output / "checkpoint-6", name
        (newest / name).write_bytes(content)
    assert last_whole(whole.output) == newest
    (newest / "trainer_state.json").write_text("")
    assert trained(path, resume=True).losses == whole.losses
    assert f"checkpoint-8 is damaged ({newest / 'trainer_state.json'} is not as it was written.)" in caplog.text
    assert (whole.output / "damaged-checkpoint-8" / "optimizer.pt").exists()  # nothing that somebody may want is removed


def test_without_a_whole_checkpoint_a_run_starts_again(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path)
    for file in whole.output.glob("checkpoint-*/optimizer.pt"):
        file.write_bytes(b"")
    assert trained(path, resume=True).losses == whole.losses


def test_checkpoints_of_the_first_version_are_resumed(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path)
    for file in (whole.output / "corda.safetensors", *whole.output.glob("checkpoint-*/corda.safetensors")):
        tensors, metadata = read_tensors(file)
        header = {key: value for key, value in json.loads(metadata["corda"]).items() if key != "beside"}
        save_file(tensors, file, {"corda": json.dumps({**header, "format": 2})})
    scheduler = whole.output / "checkpoint-8" / "scheduler.pt"
    scheduler.write_bytes(scheduler.read_bytes()[:-200])
    recipe = yaml.safe_load((whole.output / "recipe.yaml").read_text())
    old = {**recipe, "corda": {**recipe["corda"], "solver": "auto", "normalize": None}}
    (whole.output / "recipe.yaml").write_text(yaml.safe_dump(old))
    assert read_model(whole.output / "recipe.yaml").path == recipe["model"]["path"]
    with pytest.warns(UserWarning, match="was written by corda-vlm 0.1.0"):
        assert trained(path, resume=True).losses == whole.losses


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_a_run_is_not_resumed_on_other_samples(section: str, processor: Any, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.json"
    path = write_recipe(tmp_path, processor, training={"steps": 2}, evaluation={"source": str(held_out)})
    rows = json.loads((tmp_path / "data.json").read_text())
    held_out.write_text(json.dumps(rows[:3]))
    whole = trained(path)
    file = tmp_path / "data.json" if section == "data" else held_out
    before = file.read_text()
    for changed in (json.loads(before)[:-1], json.loads(before)[::-1], json.loads(before.replace("red", "blue"))):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{section}: the samples are not those that the run in .* began with"):
            trained(path, resume=True)
    file.write_text(json.dumps(json.loads(before), indent=3))  # the same rows
    assert trained(path, resume=True).losses == whole.losses


def test_one_run_at_a_time_has_an_output(processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(outputs, "LOCK_WAIT", 0.1)
    path = write_recipe(tmp_path, processor)
    with outputs.locked(tmp_path / "output"):
        for command in (["train"], ["train", "--resume"], ["prepare"]):
            result = CliRunner().invoke(app, [command[0], "--config", str(path), *command[1:]])
            assert result.exit_code == 1
            assert "output is in use by another run; wait until that has ended, or name another output." in result.output


@pytest.mark.parametrize("content", ["", "a: [", "- 1"])
def test_a_damaged_recipe_of_an_output_is_told(content: str, processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 2})
    recipe = trained(path).output / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=rf"{recipe} .*name another output, or put that run's recipe there again"):
        trained(path, resume=True)


def test_other_runs_are_not_written_over(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 2})
    trained(path)
    before = adapter_weights(tmp_path / "output")
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        trained(path)
    with pytest.raises(ValueError, match=r"has another training.learning_rate \(0.005, asked for is 0.1\)"):
        trained(path, "training.learning_rate=0.1", resume=True)
    assert all(torch.equal(value, before[key]) for key, value in adapter_weights(tmp_path / "output").items())


def test_prepare_is_the_first_half_of_train(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path, f"output={tmp_path / 'whole'}")
    result = CliRunner().invoke(app, ["prepare", "--config", str(path)])
    assert result.exit_code == 0, result.output
    assert "26 layers" in result.output
    assert trained(path, resume=True).losses == whole.losses


def test_parts_have_their_own_rates_and_everything_that_trains_is_in_one_group(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    trained(path, "training.steps=2", "training.projector_learning_rate=0.0001", "training.vision_learning_rate=0.0002")
    model = corda_core.load(tiny_llava(), tmp_path / "output", is_trainable=True)
    groups = parameter_groups(model, {"projector": 1e-4, "vision": 2e-4}, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            part = "projector" if "projector" in name else "vision" if "vision" in name else "language"
            assert group.get("lr") == {"projector": 1e-4, "vision": 2e-4, "language": None}[part], name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_checkpointing_keeps_the_vision_towers_gradients(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    plain = trained(path, f"output={tmp_path / 'plain'}")
    recomputed = trained(path, "training.gradient_checkpointing=true")
    assert [loss for _, loss in recomputed.losses] == pytest.approx([loss for _, loss in plain.losses], abs=1e-5)
    start, end = (load_file(tmp_path / "output" / name) for name in ("checkpoint-6/adapter_model.safetensors", "adapter_model.safetensors"))
    moved = [key for key in end if "vision_tower" in key and "lora_B.weight" in key and not torch.equal(end[key], start[key])]
    assert len(moved) == 12


def test_bf16_trains_in_float32(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, model={"dtype": "bfloat16"}, training={"bf16": True, "steps": 20, "learning_rate": 1e-2})
    done = trained(path)
    assert done.losses[-1][1] < 0.9 * done.losses[0][1]
    assert {value.dtype for value in adapter_weights(done.output).values()} == {torch.float32}
    corda_core.load(tiny_llava().bfloat16(), done.output)


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_recipe(tmp_path, processor)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(torch.nan)

    make = run.trainer_for
    with monkeypatch.context() as patch:
        patch.setattr(run, "trainer_for", lambda *args, callbacks, **options: make(*args, callbacks=[*callbacks, Spoil()], **options))
        with pytest.raises(
            FloatingPointError, match=r"(loss|grad_norm) is nan at step 6, learning rate .* the last whole checkpoint is .*checkpoint-4"
        ):
            trained(path)
    assert trained(path, resume=True).losses == trained(path, f"output={tmp_path / 'whole'}").losses


def test_a_full_disk_stops_the_run_with_a_sentence_and_loses_nothing(processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_recipe(tmp_path, processor)
    save = torch.save

    def full(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if "checkpoint-6" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 90816 vs 90704")  # what it says then
        save(value, file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        result = CliRunner().invoke(app, ["train", "--config", str(path)])
    assert result.exit_code == 1
    assert "is full at step 6; the last whole checkpoint is" in result.output
    assert "checkpoint-4: make room and run again with --resume" in result.output
    assert trained(path, resume=True).losses == trained(path, f"output={tmp_path / 'whole'}").losses


def test_broken_images_stop_the_run_or_are_skipped_and_counted(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 6})
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:30])
    result = CliRunner().invoke(app, ["train", "--config", str(path)])
    assert result.exit_code == 1
    assert "row 9" in result.output
    assert "on_broken: skip" in result.output
    done = trained(path, f"output={tmp_path / 'skip'}", "data.on_broken=skip")
    assert done.num_broken == 1
    assert trained(path, f"output={tmp_path / 'workers'}", "data.on_broken=skip", "training.workers=1").losses == done.losses


def test_long_samples_stop_the_run_or_are_skipped_or_cut_and_counted(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 6})
    rows = json.loads((tmp_path / "data.json").read_text())
    short, long = (Collator(processor)([{**row, "image": str(tmp_path / row["image"])}])["input_ids"].shape[1] for row in rows[1::-1])
    assert short < long
    result = CliRunner().invoke(app, ["train", "--config", str(path), f"training.max_length={long - 1}"])
    assert result.exit_code == 1
    expected = f"12 of 24 samples of {tmp_path / 'data.json'} are longer than {long - 1} tokens, training.max_length; the first is row 0"
    assert expected in " ".join(result.output.split())
    assert not (tmp_path / "output" / "corda.safetensors").exists()
    limit = f"training.max_length={long - 1}"
    result = CliRunner().invoke(app, ["train", "--config", str(path), limit, "training.on_long=cut", f"output={tmp_path / 'cut'}"])
    assert result.exit_code == 0, result.output
    assert "Of samples that were too long 12 were cut, 0 skipped." in " ".join(result.output.split())
    done = trained(path, limit, "training.on_long=skip", f"output={tmp_path / 'skip'}")
    assert (done.num_long, done.num_cut) == (12, 0)
    assert trained(path, f"training.max_length={long}").num_long == 0
    record = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert (record["num_long"], record["num_cut"]) == (0, 12)
    assert [tuple(loss) for loss in record["losses"]] != done.losses


def test_a_processor_of_another_model_is_refused(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"image_token_id": 7}))
    result = CliRunner().invoke(app, ["train", "--config", str(path)])
    assert result.exit_code == 1
    assert "puts token 4 where an image stands, but the model expects 7" in result.output


def test_errors_are_sentences(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    for overrides, message in (
        (["training.stepps=3"], "unknown option 'stepps'; did you mean 'steps'?"),
        (["training.steps"], "not of the form option=value"),
        (["context=null"], "there is no context: name samples"),
        (["training.batch_size=5", "training.micro_batch_size=2"], "expected a multiple of their product"),
        (["training.save_every=3", "training.log_every=2"], "no multiple of log_every"),
        (["training.keep_checkpoints=1"], "expected at least 2"),
        (["model.path=no/such-model"], "set model.download to true"),
        (["data.source=nothing.json"], "nothing.json"),
        (["corda.train_fully=[language]"], "train_fully names 'model.language_model', which holds the planned layer"),
        (["corda.train_fully=[head]"], "expected some of ['vision', 'projector', 'language']"),
        (["training.log_to=paper"], "training.log_to is 'paper'"),
    ):
        result = CliRunner().invoke(app, ["train", "--config", str(path), *overrides, f"output={tmp_path / message[:8]}"])
        assert result.exit_code == 1, overrides
        assert message in result.output, result.output


def test_losses_go_to_tensorboard(processor: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = write_recipe(tmp_path, processor, training={"log_to": "tensorboard", "steps": 3})
    done = trained(path)
    folders = {file.parent for file in done.output.rglob("events.out*")}
    events = accumulator.EventAccumulator(str(folders.pop()))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([loss for _, loss in done.losses])


def test_open_clip_runs_from_a_folder_and_exports_a_checkpoint_that_it_reads(processor: Any, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    path = write_recipe(tmp_path, processor)
    folder = tmp_path / "clip"
    base = write_open_clip(folder)
    rows = [{"image": f"{number}.png", "text": f"a picture of {['red', 'green', 'blue'][number % 3]}"} for number in range(24)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    overrides = [f"{part}.source={tmp_path / 'pairs.json'}" for part in ("data", "context")]
    overrides += [f"model.path=local-dir:{folder}", "model.library=open_clip", "corda.parts=null", "corda.train_fully=[]"]
    overrides += ["training.batch_size=6", "training.save_every=4", "keep.every=2", "keep.budget=0.01"]
    with pytest.raises(ValueError, match="training.max_length is for language models"):
        trained(path, *overrides, "training.max_length=9", f"output={tmp_path / 'refused'}")
    whole = trained(path, *overrides, f"output={tmp_path / 'whole'}")
    assert whole.losses[-1][1] < whole.losses[0][1]
    assert whole.kept is not None
    assert 0 < whole.kept.kl <= 0.01
    result = CliRunner().invoke(app, ["prepare", "--config", str(path), *overrides])
    assert result.exit_code == 0, result.output
    assert trained(path, *overrides, resume=True).losses == whole.losses  # the attention is split again before the plan is attached
    command = ["export", "--adapter", str(tmp_path / "output"), "--output", str(tmp_path / "plain"), "--merge"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    tuned = open_clip.create_model(f"local-dir:{folder}", pretrained=None)
    state = load_file(tmp_path / "plain" / "open_clip_model.safetensors")
    assert state.keys() == tuned.state_dict().keys()
    tuned.load_state_dict(state)
    assert not torch.equal(
        tuned.visual.transformer.resblocks[0].attn.in_proj_weight, base.visual.transformer.resblocks[0].attn.in_proj_weight
    )


def test_the_last_loss_is_looked_at_too(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 4, "log_every": 10, "save_every": 10})
    result = CliRunner().invoke(app, ["train", "--config", str(path)])
    assert result.exit_code == 0, result.output
    assert "Trained 4 steps" in result.output


def test_folders_of_others_are_left_alone(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    (tmp_path / "output" / "checkpoint-500").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds checkpoint-500, which no run of a recipe left there"):
            trained(path, resume=resume)
    assert (tmp_path / "output" / "checkpoint-500").exists()


def test_a_start_that_failed_does_not_block_its_output(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor, training={"steps": 2})
    with pytest.raises(ValueError, match="is no folder here"):
        trained(path, "model.path=/no/such")
    trained(path)


def test_what_does_not_change_losses_may_change_on_resuming(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    whole = trained(path, f"output={tmp_path / 'whole'}")
    assert CliRunner().invoke(app, ["prepare", "--config", str(path)]).exit_code == 0
    done = trained(path, "training.micro_batch_size=2", "data.on_broken=skip", "training.keep_checkpoints=3", resume=True)
    assert [loss for _, loss in done.losses] == pytest.approx([loss for _, loss in whole.losses], abs=1e-5)


def test_any_source_may_skip_what_is_broken_on_resuming(processor: Any, tmp_path: Path) -> None:
    source = str(tmp_path / "data.json")
    path, output = write_recipe(tmp_path, processor, evaluation={"source": source}, keep={"samples": {"source": source}}), tmp_path / "run"
    claim(read_recipe(path), output, resume=False)
    (output / "corda.safetensors").touch()
    skipping = [f"{name}.on_broken=skip" for name in ("data", "context", "evaluation", "keep.samples")]
    claim(read_recipe(path, skipping), output, resume=True)
    with pytest.raises(ValueError, match=r"has another keep\.samples\.limit"):
        claim(read_recipe(path, ["keep.samples.limit=3"]), output, resume=True)


def test_what_cannot_be_meant_is_refused_before_anything_is_collected(processor: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, processor)
    for overrides, message in (
        (["model.dtype=bfloat16"], "train_fully trains weights of bfloat16"),
        (["corda.train_fully=[projektor]"], "train_fully names 'projektor'"),
        (["training.learning_rate=fast"], "learning_rate is 'fast'; expected a number"),
        (["training.steps=2.5"], "steps is 2.5; expected a whole number or null"),
        (["corda.train_fully=[]", "corda.quantize=nf4"], "to be quantised it needs a multiple of 64"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trained(path, *overrides)
        assert not (tmp_path / "output" / "corda.safetensors").exists()


def test_numbers_as_people_write_them(processor: Any, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, processor), ["training.learning_rate=5e-4", "training.epochs=2", "corda.max_memory=8GB"])
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.corda.max_memory) == (5e-4, 2.0, "8GB")
