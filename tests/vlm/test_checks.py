"""What is refused, in one sentence, before anything is computed; and what is taken off a model that is wrapped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama, tiny_llava
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

import corda_vlm
from corda_core import lora_layers
from corda_vlm.checks import checked_base
from corda_vlm.prepare import plan_contexts

CONFIG = corda_vlm.CordaConfig(rank=2)
TEXTS = [(None, "a red circle in this shape is blue"), (None, "what color is the shape ?")] * 4
ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "prepare": lambda model, tokenizer: corda_vlm.prepare(model, TEXTS, rank=2, processor=tokenizer),
    "collect_context": lambda model, tokenizer: corda_vlm.collect_context(model, TEXTS, CONFIG, tokenizer),
    "plan_contexts": lambda model, tokenizer: plan_contexts(model, [TEXTS], CONFIG, tokenizer),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*is_causal", "ignore:.*lru_cache")


class Wrapper(nn.Module):
    """Stands for a wrapper of another library."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def prepared_before() -> nn.Module:
    model = tiny_llama()
    adapted = corda_vlm.prepare(model, [{"input_ids": torch.randint(5, 20, (4, 9))}], rank=2)
    assert adapted.get_base_model() is model
    return model


def injected() -> nn.Module:
    """Return a model with adapters and no PeftModel around it, as transformers' ``add_adapter`` leaves it."""
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_llama())


def without_values(name: str) -> nn.Module:
    model = tiny_llama()
    model.get_submodule(name).to("meta")
    return model


def offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(tiny_llama(), torch.device("cpu"))


BROKEN = {
    "prepared before": (prepared_before, r"carries an adapter already \(at model\.layers\.0\..*load the base again"),
    "adapters injected": (injected, r"carries an adapter already \(at model\.layers\.0\.self_attn\.q_proj\)"),
    "an adapted layer on meta": (lambda: without_values("model.layers.1.mlp"), r"model\.layers\.1\.mlp.* holds no values here"),
    "another layer on meta": (lambda: without_values("model.embed_tokens"), r"model\.embed_tokens\.weight holds no values here"),
    "offloaded": (offloaded, r"holds no values here \(device meta\).*no device_map that offloads"),
    "unknown wrapper": (lambda: Wrapper(tiny_llama()), "Wrapper is wrapped around a LlamaForCausalLM in a way that is not known"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", BROKEN)
def test_a_base_that_is_not_ready_is_refused_everywhere(case: str, entry: str, tokenizer: Any) -> None:
    make, sentence = BROKEN[case]
    with pytest.raises(ValueError, match=sentence):
        ENTRIES[entry](make(), tokenizer)


def test_no_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="model is a str; expected a model of torch"):
        ENTRIES["prepare"]("my-model", tokenizer)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))])
def test_known_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module], tokenizer: Any) -> None:
    plain = ENTRIES["collect_context"](tiny_llama(), tokenizer)
    for name, covariance in ENTRIES["collect_context"](wrap(tiny_llama()), tokenizer).items():
        assert torch.equal(covariance.matrix, plain[name].matrix)
    adapted = ENTRIES["prepare"](wrap(tiny_llama()), tokenizer)
    assert isinstance(adapted.get_base_model(), LlamaForCausalLM)
    assert set(lora_layers(adapted)) == set(plain)


def test_resized_embeddings_are_told_of_before_the_training(tmp_path: Path, tokenizer: Any) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    model.resize_token_embeddings(29, mean_resizing=False)
    with pytest.warns(UserWarning, match=r"embeddings have 29 rows, those of .* 22: .* save this base with save_pretrained"):
        ENTRIES["prepare"](model, tokenizer)


def test_a_processor_with_another_image_token_is_refused(processor: Any, samples: list[Any]) -> None:
    model = tiny_llava()
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="LlavaProcessor puts token 4 where an image stands, but the model expects 7"):
        corda_vlm.prepare(model, samples, rank=2, processor=processor)


@pytest.mark.parametrize("how", [lambda model: setattr(model, "model", torch.compile(model.model)), lambda model: model.lm_head.compile()])
def test_models_with_compiled_parts_are_refused(how: Callable[[Any], Any], llama: Any) -> None:
    how(llama)
    with pytest.raises(ValueError, match="is compiled, and would be compiled anew"):
        checked_base(llama)
