"""As much of a change as a budget allows: measured as it is exported, from Python and from the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_llama, tiny_llava
from peft import LoraConfig, PeftModel
from torch import nn
from typer.testing import CliRunner

import corda_vlm
from corda_core.lora import trained_tensors
from corda_vlm.cli import app
from corda_vlm.data.samples import Collator
from corda_vlm.outputs import processes
from corda_vlm.training.budget import TOLERANCE
from corda_vlm.training.divergence import context_kl
from corda_vlm.training.within import alpha_within, at_alpha

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*larger than min", "ignore:.*reach the output")
KEPT = [{"text": text} for text in ("a red circle", "what is the shape in this ?", "two green one blue is a color")] * 4


def sharp_llama() -> Any:
    """Return a random Llama that is sure of some words."""
    model = tiny_llama()
    model.lm_head.weight.data *= 20
    return model


def tuned(model: nn.Module, processor: Any, *, size: float = 0.4, **options: Any) -> Any:
    """Return the model with an adapter that has learned noise."""
    adapted = corda_vlm.prepare(model, KEPT, processor=processor, rank=4, **options)
    with torch.no_grad():
        for value, _ in trained_tensors(adapted):
            value += size * torch.randn_like(value)
    return adapted.eval()


@pytest.mark.parametrize("protect", ["strict", "start", "whitened"])
def test_what_is_measured_is_what_is_exported(protect: str, processor: Any, samples: Any, tmp_path: Path) -> None:
    adapted = tuned(tiny_llava(), processor, size=0.1, protect=protect, train_fully=["projector"])
    batch = Collator(processor)([samples[0], samples[1]])
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with torch.no_grad():
        whole = adapted(**batch).logits
        with at_alpha(adapted, 0.37):
            measured = adapted(**batch).logits
        with at_alpha(adapted, 0.0):
            base = adapted(**batch).logits
        corda_vlm.export(adapted, tmp_path / "part", alpha=0.37)
        exported = PeftModel.from_pretrained(tiny_llava(), tmp_path / "part").eval()(**batch).logits
        assert torch.equal(base, tiny_llava()(**batch).logits)
        assert torch.equal(adapted(**batch).logits, whole)
    torch.testing.assert_close(measured, exported, rtol=0, atol=1e-5)
    assert not torch.allclose(measured, whole, atol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())


def test_an_error_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    adapted = tuned(sharp_llama(), tokenizer)
    batch = Collator(tokenizer)(KEPT)
    with torch.no_grad():
        whole = adapted(**batch).logits
    with pytest.raises(ValueError, match="no text"):
        alpha_within(adapted, [*KEPT, {"text": ""}], 0.02, processor=tokenizer)
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, whole)


@pytest.mark.parametrize("budget", [0.001, 0.05])
def test_the_budget_is_used(budget: float, tokenizer: Any) -> None:
    adapted = tuned(sharp_llama(), tokenizer)
    batches = [Collator(tokenizer)(KEPT[:3]), Collator(tokenizer)(KEPT[3:])]
    assert context_kl(adapted, batches) > 2 * budget
    alpha, kl = alpha_within(adapted, KEPT, budget, processor=tokenizer)
    assert 0 < alpha < 1
    assert (1 - TOLERANCE) * budget <= kl <= budget
    with at_alpha(adapted, alpha):
        assert context_kl(adapted, batches) == pytest.approx(kl, rel=1e-3)  # whatever the batches
    assert alpha_within(adapted, KEPT, 0, processor=tokenizer) == (0.0, 0.0)
    assert alpha_within(adapted, KEPT, 100.0, processor=tokenizer)[0] == 1


def test_two_towers_and_ready_batches() -> None:
    from families import build

    model, batch = build("clip")
    adapted = corda_vlm.prepare(model, [batch], rank=4)
    with torch.no_grad():
        for value, _ in trained_tensors(adapted):
            value += 0.5 * torch.randn_like(value)
    budget = context_kl(adapted, [batch]) / 3
    alpha, kl = alpha_within(adapted, [batch], budget)
    assert 0 < alpha < 1
    assert (1 - TOLERANCE) * budget <= kl <= budget


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A base, an adapter that has forgotten, and samples of what is to be kept."""
    sharp_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    corda_vlm.save(tuned(sharp_llama(), tokenizer), tmp_path / "adapter")
    recipe = {"model": {"path": str(tmp_path / "base"), "dtype": "float32"}, "data": {"source": "d"}, "context": "c", "output": "o"}
    (tmp_path / "adapter" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "kept.json").write_text(json.dumps(KEPT))
    (tmp_path / "none.json").write_text("[]")
    return tmp_path


def exported(folder: Path, *options: object) -> Any:
    command = ["export", "--adapter", folder / "adapter", "--output", folder / "out", *options]
    return CliRunner().invoke(app, [str(argument) for argument in command])


@pytest.mark.parametrize("on", ["kept.json", "self"])
def test_a_folder_is_exported_within_a_budget(on: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = exported(folder, "--max-kl", 0.02, "--on", on)
    assert done.exit_code == 0, done.output
    told = re.search(r"It holds (\S+) of the change \(alpha\): KL to the base (\S+) nats a token, on (\d+) samples", done.output)
    assert told is not None, done.output
    alpha, kl, count = float(told[1]), float(told[2]), int(told[3])
    assert 0 < alpha < 1
    assert (1 - TOLERANCE) * 0.02 <= kl <= 0.02
    assert count == (12 if on == "kept.json" else 64)
    if on == "kept.json":
        lora = PeftModel.from_pretrained(sharp_llama(), folder / "out").eval()
        assert context_kl(lora, [Collator(tokenizer)(KEPT)]) == pytest.approx(kl, rel=1e-2)


def test_a_budget_of_nothing_gives_the_base(folder: Path, tokenizer: Any) -> None:
    done = exported(folder, "--max-kl", 0, "--on", folder / "kept.json", "--merge")
    assert done.exit_code == 0, done.output
    assert "It holds 0 of the change" in done.output
    plain, base = type(sharp_llama()).from_pretrained(folder / "out"), sharp_llama()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in plain.state_dict().items())


def test_what_cannot_be_meant_gets_a_sentence(folder: Path) -> None:
    kept, budget = folder / "kept.json", ("--max-kl", 0.02)
    for options, sentence in (
        ((*budget, "--on", kept, "--alpha", 0.5), "--max-kl and --alpha were both given"),
        ((*budget, "--on", kept, "--compress", 2), "--max-kl and --compress were both given"),
        (budget, "--max-kl and --on belong together"),
        (("--on", kept), "--max-kl and --on belong together"),
        (("--max-kl", -0.1, "--on", kept), "--max-kl is -0.1; expected nats"),
        (("--max-kl", "nan", "--on", kept), "--max-kl is nan; expected nats"),
        ((*budget, "--on", folder / "none.json"), "none.json holds no rows"),
        ((*budget, "--on", folder / "nowhere.json"), "there is no such file"),
    ):
        done = exported(folder, *options)
        assert done.exit_code == 1, (options, done.output)
        assert sentence in done.output, (options, done.output)
        assert not (folder / "out").exists()


def test_without_samples_or_a_base_nothing_is_measured(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no samples to measure what is forgotten on"):
        alpha_within(tuned(sharp_llama(), tokenizer), [], 0.02, processor=tokenizer)
    with pytest.raises(ValueError, match="max_kl is -1; expected nats"):
        alpha_within(tuned(sharp_llama(), tokenizer), KEPT, -1, processor=tokenizer)
    subtracted = tuned(sharp_llama(), tokenizer, protect="start", residual="subtract")
    with pytest.raises(ValueError, match="cannot be run without it"):
        alpha_within(subtracted, KEPT, 0.02, processor=tokenizer)


def test_another_adapter_than_the_active_is_refused(tokenizer: Any) -> None:
    adapted = tuned(sharp_llama(), tokenizer)
    with pytest.raises(
        ValueError, match=r"active adapters are \['default'\], but 'second' is to be measured, alone; call model\.set_adapter"
    ):
        alpha_within(adapted, KEPT, 0.02, processor=tokenizer, adapter_name="second")
    adapted.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert 0 < alpha_within(adapted, KEPT, 0.02, processor=tokenizer)[0] < 1
    adapted.set_adapter("second")
    with pytest.raises(ValueError, match=r"active adapters are \['second'\], but 'default' is"):
        alpha_within(adapted, KEPT, 0.02, processor=tokenizer)
    adapted.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\], but 'default' is"):
        alpha_within(adapted, KEPT, 0.02, processor=tokenizer)
    with adapted.disable_adapter(), pytest.raises(ValueError, match=r"active adapters are \[\], but 'default' is"):
        alpha_within(adapted, KEPT, 0.02, processor=tokenizer)


def test_a_budget_is_measured_where_the_machine_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []

    def moved(model: nn.Module, device: Any) -> nn.Module:
        devices.append(device)
        return model

    monkeypatch.setattr(type(sharp_llama()), "to", moved)
    done = exported(folder, "--max-kl", 0.02, "--on", folder / "kept.json")
    assert done.exit_code == 0, done.output
    assert devices == [processes().device]
    assert exported(folder, "--alpha", 0.5).exit_code == 0
    assert len(devices) == 1
