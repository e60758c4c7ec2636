"""The command line: what it does not take from folders, and one sentence for whatever is wrong."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_llama
from typer.testing import CliRunner

import corda_vlm
from corda_eval.cli import app
from corda_vlm.training import deploy
from corda_vlm.training.recipe import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*larger than min")

PLANTED = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class PlantedConfig(LlamaConfig):
    model_type = "planted"
class PlantedModel(LlamaForCausalLM):
    config_class = PlantedConfig
"""


@pytest.fixture
def adapter(tmp_path: Path, tokenizer: Any) -> Path:
    """A trained adapter of a language model, and a base whose folder brings code along that leaves a marker."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = tmp_path / "adapter"
    corda_vlm.save(corda_vlm.prepare(tiny_llama(), [(None, "a red circle in this shape is blue")] * 8, rank=4, processor=tokenizer), folder)
    planted = shutil.copytree(base, tmp_path / "planted")
    config = json.loads((planted / "config.json").read_text())
    config |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"}}
    config["auto_map"]["AutoModel"] = "planted.PlantedModel"
    (planted / "config.json").write_text(json.dumps(config))
    (planted / "planted.py").write_text(PLANTED.format(marker=str(tmp_path / "marker")))
    named = {"path": str(base), "dtype": "float32", "trust_remote_code": True, "download": True}
    write_recipe_of(folder, named)
    return folder


def write_recipe_of(folder: Path, model: dict[str, Any]) -> None:
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": model, "data": {"source": "d"}, "context": {"source": "c"}, "output": str(folder)})
    )


def called(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_adapter_s_folder_has_no_say_in_trust_and_network(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModelConfig] = []
    real = deploy.load_base
    monkeypatch.setattr(deploy, "load_base", lambda config: seen.append(config) or real(config))
    assert called("export", "--adapter", adapter, "--output", tmp_path / "lora").exit_code == 0
    assert called("export", "--adapter", adapter, "--output", tmp_path / "lora", "--trust-remote-code").exit_code == 0
    write_recipe_of(adapter, {"path": str(tmp_path / "base"), "attention": "somebody/kernel", "dtype": "float32"})
    assert called("export", "--adapter", adapter, "--output", tmp_path / "lora").exit_code == 0
    assert [(config.trust_remote_code, config.download, config.attention) for config in seen] == [
        (False, False, None),
        (True, False, None),
        (False, False, None),
    ]


def test_code_in_a_base_that_an_adapter_s_folder_names_does_not_run(adapter: Path, tmp_path: Path) -> None:
    write_recipe_of(adapter, {"path": str(tmp_path / "planted"), "dtype": "float32", "trust_remote_code": True, "download": True})
    done = called("export", "--adapter", adapter, "--output", tmp_path / "lora")
    assert done.exit_code == 1
    assert "could not be read" in done.output
    assert not (tmp_path / "marker").exists()
    done = called("export", "--adapter", adapter, "--output", tmp_path / "lora", "--trust-remote-code")
    assert (tmp_path / "marker").exists()  # so the first half of this test can fail


def test_code_in_a_base_runs_in_eval_only_if_asked(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text("what color is the shape in this ? red blue green circle a one two " * 200)
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump({"tasks": [{"task": "perplexity", "data": str(tmp_path / "text.txt"), "limit": 2}]})
    )
    command = [
        "eval",
        "--base",
        tmp_path / "planted",
        "--adapter",
        adapter,
        "--suite",
        tmp_path / "suite.yaml",
        "--output",
        tmp_path / "out",
    ]
    command += ["--dtype", "float32"]
    assert called(*command).exit_code == 1
    assert not (tmp_path / "marker").exists()
    called(*command, "--trust-remote-code")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "asks to import the package 'planted'"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "kind 'PROMPT_TUNING'; expected LORA"),
        ({"peft_type": "XLORA", "adapters": {"0": "somebody/adapter"}}, "kind 'XLORA'; expected LORA"),
    ],
)
def test_a_lora_s_config_imports_nothing(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called("export", "--adapter", adapter, "--output", tmp_path / "lora").exit_code == 0
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted.py").write_text(PLANTED.format(marker=str(tmp_path / "marker")))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=sentence):
        corda_vlm.adapted.load_lora(tiny_llama(), tmp_path / "lora")
    assert "planted" not in sys.modules
    assert not (tmp_path / "marker").exists()


def test_options_that_are_wrong_get_a_sentence(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "suite.yaml").write_text("tasks: [digits]")
    export = ["export", "--adapter", adapter, "--output", tmp_path / "lora"]
    evaluate = ["eval", "--base", tmp_path / "base", "--adapter", adapter, "--output", tmp_path / "out", "--suite"]
    for arguments, sentence in (
        ([*export, "--alpha", "nan"], "--alpha"),
        ([*export, "--alpha", "1.5"], "--alpha"),
        ([*export, "--compress", "-1"], "--compress"),
        ([*export, "--dtype", "bf16"], "dtype is 'bf16'; expected one of"),
        (["export", "--adapter", tmp_path / "binary", "--output", tmp_path / "lora"], "binary"),
        (["export", "--adapter", tmp_path / "nowhere", "--output", tmp_path / "lora"], "has no recipe.yaml"),
        ([*evaluate, tmp_path], "is a folder"),
        ([*evaluate, tmp_path / "binary"], "is no text in UTF-8"),
        ([*evaluate, tmp_path / "nowhere.yaml"], "does not exist"),
        ([*evaluate, tmp_path / "binary", "--check-batch-invariance", "-1"], "--check-batch-invariance"),
        ([*evaluate, tmp_path / "binary", "--library", "keras"], "library is 'keras'; expected one of"),
        ([*evaluate[:4], "/", *evaluate[5:], tmp_path / "binary"], "different names"),
        ([*evaluate[:6], tmp_path / "binary", *evaluate[7:], tmp_path / "suite.yaml"], "binary: "),
        (["train", "--config", "x" * 5000], "xxx: File name too long; correct the path"),
        (["train", "--config", tmp_path], "is a folder"),
        (["train", "--config", tmp_path / "binary"], "is no text in UTF-8"),
        (["prepare", "--config", adapter / "recipe.yaml", "seed=-1"], "seed is -1; expected at least 0"),
        (["train", "--config", adapter / "recipe.yaml", "corda.targets=("], "targets is '(', which is no regular expression"),
        (["compare", "--config", adapter / "recipe.yaml"], "unknown option"),
        (["demo", "--config", tmp_path], "is a folder"),
    ):
        done = called(*arguments)
        assert done.exit_code in (1, 2), (arguments, done.output)
        assert isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert sentence in re.sub(r"[\s│]+", " ", done.output), (arguments, done.output)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("config.json", b'{"model_type": "llama", "num_hidden_layers": []}'),
        ("tokenizer.json", b'{"version": 1}'),
        ("tokenizer_config.json", b'{"unk_token": true}'),
    ],
)
def test_a_damaged_base_gets_a_sentence(adapter: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "base" / name).write_bytes(content)
    done = called("export", "--adapter", adapter, "--output", tmp_path / "lora")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"model.path {tmp_path / 'base'} could not be read" in done.output


def test_the_home_folder_is_one_everywhere(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_recipe_of(adapter, {"path": "~/base", "dtype": "float32"})
    done = called("export", "--adapter=~/adapter", "--output=~/lora")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert ModelConfig("~/base").path == str(tmp_path / "base")


def test_weights_that_are_pickled_run_no_code(tmp_path: Path, adapter: Path) -> None:
    class Plant:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "marker",)

    base = tmp_path / "base"
    (base / "model.safetensors").unlink()
    torch.save({"weights": Plant()}, base / "pytorch_model.bin")
    assert called("export", "--adapter", adapter, "--output", tmp_path / "lora", "--trust-remote-code").exit_code == 1
    assert not (tmp_path / "marker").exists()
