"""The example scripts train what they say, in the libraries they name, and write an ordinary LoRA of it."""

import ast
import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, tiny_llama, tiny_llava
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import corda_vlm
from corda_core import lora_layers
from corda_vlm.data.samples import Collator

pytest.importorskip("datasets", reason="the examples read their data with it; it comes with trl")
EXAMPLES = Path(corda_vlm.__file__).parent / "examples"
Finished = Callable[[str], tuple[list[float], Path]]
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "__init__")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
"""What `accelerate launch` starts on several GPUs; on CPUs it starts one process, whatever it is asked for."""


def with_trl(name: str) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl", reason="the example trains with it")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, processor: Any, samples: list[dict[str, Any]]) -> Path:
    """A LLaVA, a Llama, questions to keep and others to learn, with the images that they name."""
    folder = tmp_path_factory.mktemp("examples")
    for model, reader, name in ((tiny_llava(), processor, "llava"), (tiny_llama(), tokenizer, "llama")):
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 3 if weight.ndim == 2 else 1  # as initialised, the layers hardly do anything
        model.save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    for number, sample in enumerate(samples):
        sample["image"].save(folder / f"{number}.png")
    images = [str(folder / f"{number}.png") for number in range(len(samples))]
    kept = [{"image": image, "question": f"is this {word} ?", "answer": word} for image, word in zip(images, WORDS[7:], strict=False)]
    # Answers of different lengths, so that the processes have different numbers of tokens to learn.
    learned = [
        {"image": images[i % 12], "question": samples[i % 12]["question"], "answer": " ".join(["one", "two", "a"][: 1 + i % 3])}
        for i in range(32)
    ]
    for name, rows in (("kept", kept), ("learned", learned)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = [{key: value for key, value in row.items() if key != "image"} for row in rows]
        (folder / f"{name}-text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return folder


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Finished:
    """Run an example in a new process, once for all tests; return the losses that it reports and the folder that it writes."""
    return functools.cache(lambda name: (run(name, workspace, workspace / name), workspace / name))


def arguments(name: str, workspace: Path, output: Path) -> list[str]:
    base, suffix = ("llama", "-text") if name == "trl_language" else ("llava", "")
    return [*(str(workspace / part) for part in (base, f"kept{suffix}.jsonl", f"learned{suffix}.jsonl")), str(output)]


def run(name: str, workspace: Path, output: Path, launcher: tuple[str, ...] = ("-m",)) -> list[float]:
    """Run an example in a new process, and return the losses that it reports."""
    command = [sys.executable, *launcher, f"corda_vlm.examples.{name}", *arguments(name, workspace, output)]
    settings = {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(workspace / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=workspace, env={**os.environ, **settings}, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [ast.literal_eval(line[line.index("{") :].strip()) for line in result.stdout.splitlines() if "'loss':" in line]
    return [float(report["loss"]) for report in reports]


def case(name: str, workspace: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the untouched base of an example, and what it is to learn as one batch."""
    kinds = (AutoModelForCausalLM, AutoTokenizer) if name == "trl_language" else (AutoModelForImageTextToText, AutoProcessor)
    base, _, training, _ = arguments(name, workspace, workspace)
    rows = [json.loads(line) for line in Path(training).read_text().splitlines()]
    model, reader = (kind.from_pretrained(base) for kind in kinds)
    return model.eval(), Collator(reader, with_labels=True)(rows)


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    output = model(**batch)
    return output.logits, output.loss


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short(name: str) -> None:
    assert sum(bool(line.strip()) for line in (EXAMPLES / f"{name}.py").read_text().splitlines()) < 30


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_by_itself_and_learns(name: str, workspace: Path, finished: Finished) -> None:
    with_trl(name)
    losses, adapter = finished(name)
    assert len(losses) >= 5
    assert losses[-1] < losses[0]
    base, batch = case(name, workspace)
    logits, loss = outputs(base, batch)
    tuned_logits, tuned_loss = outputs(PeftModel.from_pretrained(base, adapter).eval(), batch)
    assert (tuned_logits - logits).abs().max() > 0.01
    assert tuned_loss < loss - 0.1


@pytest.mark.parametrize("protect", ["start", "strict", "whitened"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_trains_the_adapter_and_nothing_else(
    name: str, protect: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trl(name)
    starts: dict[str, Tensor] = {}
    prepare: Callable[..., PeftModel] = corda_vlm.prepare

    def prepare_and_note(*positional: Any, **named: Any) -> PeftModel:
        model = prepare(*positional, **{**named, "protect": protect})
        starts.update({key: value.clone() for key, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(corda_vlm, "prepare", prepare_and_note)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workspace / "cache")
    monkeypatch.setattr(sys, "argv", [name, *arguments(name, workspace, tmp_path / "adapter")])
    script = runpy.run_module(f"corda_vlm.examples.{name}", run_name="__main__")
    tuned = script.get("adapted", script["model"]).eval()

    moved = {key for key, value in tuned.state_dict().items() if not torch.equal(value, starts[key])}
    trained = ("lora_B",) if protect == "strict" else ("lora_A", "lora_B")
    layers = lora_layers(tuned)
    assert moved == {f"base_model.model.{layer}.{factor}.default.weight" for layer in layers for factor in trained}
    assert {value.dtype for value in tuned.state_dict().values() if value.is_floating_point()} == {torch.float32}

    base, batch = case(name, workspace)
    with tuned.disable_adapter():
        assert torch.equal(outputs(tuned, batch)[0], outputs(base, batch)[0])
    exported = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(exported, batch)[0], outputs(tuned, batch)[0], rtol=0, atol=1e-5)


def test_trl_learns_from_images_what_the_trainer_learns(finished: Finished) -> None:
    with_trl("trl")
    (expected, first), (losses, second) = finished("transformers_trainer"), finished("trl_vision_language")
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-3)  # reported with four digits
    _compare(first, second)


def test_two_processes_learn_what_one_does(workspace: Path, tmp_path: Path, finished: Finished) -> None:
    expected, first = finished("accelerate_loop")
    losses = run("accelerate_loop", workspace, tmp_path / "two", (*LAUNCH, "-m"))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    expected_changes, changes = _changes(first), _changes(tmp_path / "two")
    assert expected_changes.keys() == changes.keys()
    for key, change in expected_changes.items():  # sums in another order, of whose small gradients AdamW makes steps of full size
        assert float((changes[key] - change).norm() / change.norm()) < 0.02, key


def _compare(first: Path, second: Path) -> None:
    """Check that two adapters change the same weights by the same."""
    expected, changes = _changes(first), _changes(second)
    assert expected.keys() == changes.keys()
    for key, change in expected.items():
        torch.testing.assert_close(changes[key], change, rtol=0, atol=1e-5)


def _changes(folder: Path) -> dict[str, Tensor]:
    weights = load_file(folder / "adapter_model.safetensors")
    return {key: weights[key.replace("lora_A", "lora_B")] @ weights[key] for key in weights if "lora_A" in key}
