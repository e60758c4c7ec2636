"""Bases that bitsandbytes quantised: dequantised for the decomposition only; other packed weights are refused."""

from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from corda_core import attach, change_factors, collect, export, lora_layers, plan, select_linears, weight_matrix
from corda_core.modules import weight_shape

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BATCH = {"input_ids": torch.randint(5, 20, (6, 16), generator=torch.Generator().manual_seed(0))}


def plain_llama() -> Any:
    """A Llama whose rows have whole blocks of 64, as real ones do: bitsandbytes' CPU kernels are wrong for others."""
    torch.manual_seed(0)
    config = llama_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    return LlamaForCausalLM(config).eval()


def quantized(kind: str) -> Any:
    """The same with quantised linear layers, in float32 otherwise."""
    model = plain_llama()
    for name in select_linears(model):
        layer = model.get_submodule(name)
        m, n = layer.weight.shape
        if kind == "int8":
            packed = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
            packed.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            packed = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=torch.float32, quant_type=kind)
            packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed)
    return model.to("cpu").eval()


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_adapters_on_a_quantised_base(kind: str, tmp_path: Any) -> None:
    model = quantized(kind)
    names = select_linears(model)
    plain = plain_llama()
    for name in names:
        W, original = weight_matrix(model, name), plain.get_submodule(name).weight
        assert W.shape == original.shape == weight_shape(model, name)
        assert 0 < float((W.float() - original).norm() / original.norm()) < (0.02 if kind == "int8" else 0.15)
    model.train()  # there is no dropout; in evaluation mode bitsandbytes packs weights on CPUs for inference
    with torch.no_grad():
        expected = model(**BATCH).logits
    packed = {name: model.get_submodule(name).weight.data.clone() for name in names}
    made = plan(model, collect(model, [BATCH], names), mode="kpm", rank=4)
    W, init = weight_matrix(model, names[0]).float(), made.layers[names[0]]
    torch.testing.assert_close(init.B0 @ init.A0, init.B0 @ torch.linalg.lstsq(init.B0, W).solution, rtol=1e-3, atol=1e-4)
    adapted = attach(model, made)
    with torch.no_grad():
        assert torch.equal(adapted(**BATCH).logits, expected)
    adapted(**BATCH).logits.square().sum().backward()
    for name, layer in lora_layers(adapted).items():
        assert torch.equal(layer.get_base_layer().weight.data, packed[name])
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0
        assert not change_factors(layer)[1][:, :4].any()
    export(adapted, tmp_path)
    with pytest.raises(ValueError, match="q_proj is quantised already"):
        attach(quantized(kind), made, residual="subtract")


def test_weights_packed_for_inference_are_refused() -> None:
    model = quantized("nf4")
    with torch.no_grad():
        model(**BATCH)
    name = select_linears(model)[0]
    if not getattr(model.get_submodule(name).weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs weights")
    with pytest.raises(ValueError, match="q_proj: bitsandbytes has packed this weight anew .* load the model again"):
        weight_matrix(model, name)


def test_unknown_packed_weights_are_refused_by_name() -> None:
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj holds a packed weight .*float8.* quantised by bitsandbytes"):
        weight_matrix(model, "model.layers.0.mlp.up_proj")

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)

    with pytest.raises(ValueError, match=r"packed weights .*0 \(Packed\)"):
        select_linears(nn.Sequential(Packed()))


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:MatMul8bitLt", "ignore:.*device_map")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_quantised(bits: int, tmp_path: Any) -> None:
    """As QLoRA users load it; PEFT then has its own layers for it."""
    plain_llama().save_pretrained(tmp_path / "base")
    options = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        if bits == 4
        else {"load_in_8bit": True}
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    names = select_linears(model)
    made = plan(model, collect(model, [BATCH], names), mode="kpm", rank=4)
    model.train()
    with torch.no_grad():
        expected = model(**BATCH).logits
    adapted = attach(model, made)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**BATCH).logits, expected, rtol=0, atol=0)
    adapted(**BATCH).logits.square().sum().backward()
    layers = lora_layers(adapted)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    for name, layer in layers.items():
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0, name
