"""Recipes under two processes (gloo): the samples, losses and adapters of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llava
from recipes import write_recipe
from safetensors.torch import load_file

import corda_core

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "corda_vlm.cli", "train"]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,CLIPEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2 …` sets; that command itself looks for GPUs."""


def finished(path: Path, output: Path, environment: dict[str, str] | None = None, *options: str) -> dict[str, Any]:
    command = COMMAND if environment is not None else [sys.executable, "-m", "corda_vlm.cli", "train"]
    command = [*command, "--config", str(path), f"output={output}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, **(environment or {})})
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads((output / "training.json").read_text())
    assert summary["num_processes"] == (1 if environment is None else 2)
    return summary


@pytest.mark.slow
def test_two_processes_do_what_one_does(processor: Any, tmp_path: Path) -> None:
    """DDP and FSDP2, stopped half way and resumed: preparation, training, held-out loss and files."""
    changes = {"training": {"evaluate_every": 4, "gradient_checkpointing": True}}
    path = write_recipe(tmp_path, processor, evaluation={"source": str(tmp_path / "data.json"), "limit": 7}, **changes)
    alone = finished(path, tmp_path / "one")
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, environment in (("ddp", {}), ("fsdp2", FSDP2)):
        output = tmp_path / name
        two = finished(path, output, environment)
        for key in ("losses", "evaluation"):
            assert [step for step, _ in two[key]] == [step for step, _ in alone[key]]
            assert [loss for _, loss in two[key]] == pytest.approx([loss for _, loss in alone[key]], abs=2e-5), name
        weights = load_file(output / "adapter_model.safetensors")
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            if "vision_tower" in key:  # plain pictures leave its covariances singular, and its smallest directions to rounding
                continue
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-3)
        corda_core.load(tiny_llava(), output)
    shutil.rmtree(output / "checkpoint-8")  # as if it had died before that
    again = finished(path, output, FSDP2, "--resume")
    assert [loss for _, loss in again["losses"]] == pytest.approx([loss for _, loss in two["losses"]], abs=1e-6)


@pytest.mark.slow
def test_two_processes_keep_as_one_does(processor: Any, tmp_path: Path) -> None:
    """DDP and FSDP2: the weight that follows a budget, the losses, and what is taken off in the end; pictures are kept, text is learned."""
    rows = [{"question": "what is one two ?", "answer": "three"}, {"question": "what is in the shape ?", "answer": "a circle"}] * 8
    (tmp_path / "text.json").write_text(json.dumps(rows))
    path = write_recipe(tmp_path, processor, keep={"budget": 0.003, "every": 2, "batch_size": 4}, training={"learning_rate": 2e-2})
    options = (f"data.source={tmp_path / 'text.json'}", "corda.train_fully=[]", "corda.parts=[vision,projector,language]")
    alone = finished(path, tmp_path / "one", None, *options)
    assert alone["kept"]["kl"] <= 0.003
    for name, environment in (("ddp", {}), ("fsdp2", FSDP2)):
        two = finished(path, tmp_path / name, environment, *options)
        assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in alone["losses"]], abs=2e-4), name
        for key in ("kl", "alpha", "weight"):
            assert two["kept"][key] == pytest.approx(alone["kept"][key], rel=0.02), (name, key)
