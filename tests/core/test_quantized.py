"""Bases that bitsandbytes quantised: dequantised for the decomposition only; other packed weights are refused."""

from typing import Any

import pytest
import torch
from conftest import llama_config, tiny_llama
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from corda_core import attach, change_factors, collect, export, load, lora_layers, merge, plan, save, select_linears
from corda_core.bases import base_digest
from corda_core.linears import is_quantized, weight_matrix, weight_shape
from corda_eval.bench.quantization import quantization_errors

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
    adapter_plan = plan(model, collect(model, [BATCH], names), mode="kpm", rank=4)
    W, init = weight_matrix(model, names[0]).float(), adapter_plan.layers[names[0]]
    torch.testing.assert_close(init.B0 @ init.A0, init.B0 @ torch.linalg.lstsq(init.B0, W).solution, rtol=1e-3, atol=1e-4)
    adapted = attach(model, adapter_plan)
    with torch.no_grad():
        assert torch.equal(adapted(**BATCH).logits, expected)
    adapted(**BATCH).logits.square().sum().backward()
    for name, layer in lora_layers(adapted).items():
        assert torch.equal(layer.get_base_layer().weight.data, packed[name])
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0
        assert not change_factors(layer)[1][:, :4].any()
    export(adapted, tmp_path)
    with pytest.raises(ValueError, match="q_proj is quantised already"):
        attach(quantized(kind), adapter_plan, residual="subtract")


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
    adapter_plan = plan(model, collect(model, [BATCH], names), mode="kpm", rank=4)
    model.train()
    with torch.no_grad():
        expected = model(**BATCH).logits
    adapted = attach(model, adapter_plan)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**BATCH).logits, expected, rtol=0, atol=0)
    adapted(**BATCH).logits.square().sum().backward()
    layers = lora_layers(adapted)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    for name, layer in layers.items():
        assert float(layer.lora_B["default"].weight.grad.abs().max()) > 0, name


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
@pytest.mark.parametrize(("residual", "kind"), [("offset", "nf4"), ("subtract", "nf4"), ("subtract", "fp4")])
def test_attaching_to_weights_quantised_on_the_way(residual: str, kind: str, tmp_path: Any) -> None:
    """QLoRA's way from an unquantised base, and Q-CorDA: what is held in 4 bits is W, or W − B0 A0."""
    model = plain_llama()
    names = select_linears(model)
    adapter_plan = plan(model, collect(model, [BATCH], names), mode="ipm", rank=8)
    expected = {}
    for name, init in adapter_plan.layers.items():
        weight = weight_matrix(model, name) - (init.B0 @ init.A0 if residual == "subtract" else 0)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        expected[name] = bnb.functional.dequantize_4bit(packed, state)
    adapted = attach(model, adapter_plan, residual=residual, quantize=kind).train()
    layers = lora_layers(adapted)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear4bit"}
    for name, layer in layers.items():
        assert torch.equal(weight_matrix(adapted.get_base_model(), name), expected[name])
        A, B = change_factors(layer)
        assert not (B @ A).abs().max() > 1e-6
    dense = plain_llama()
    for name, init in adapter_plan.layers.items():
        dense.get_submodule(name).weight.data = expected[name] + (init.B0 @ init.A0 if residual == "subtract" else 0)
    torch.testing.assert_close(adapted(**BATCH).logits, dense(**BATCH).logits, rtol=1e-4, atol=1e-5)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        tuned = adapted(**BATCH).logits
    loaded = load(plain_llama(), save(adapted, tmp_path / "saved")).train()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, tuned, rtol=0, atol=0)
    lora = PeftModel.from_pretrained(plain_llama(), export(adapted, tmp_path / "lora").folder)
    for name, layer in lora_layers(lora).items():
        A, B = change_factors(layer)
        ours_A, ours_B = change_factors(layers[name])
        torch.testing.assert_close(B @ A, ours_B @ ours_A, rtol=0, atol=1e-6)
    plain = merge(adapted)
    assert not any(is_quantized(module) for module in plain.modules() if hasattr(module, "weight"))
    assert plain.state_dict().keys() == plain_llama().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(**BATCH).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_errors_of_base_and_residual_are_the_dense_ones() -> None:
    model = plain_llama()
    for name in select_linears(model):  # outliers, which the largest components carry
        model.get_submodule(name).weight.data += (
            0.3 * torch.randn(model.get_submodule(name).weight.shape[0], 1) @ torch.randn(1, model.get_submodule(name).weight.shape[1])
        )
    covariances = collect(model, [BATCH], select_linears(model))
    adapter_plan = plan(model, covariances, mode="ipm", rank=4)
    digest = base_digest(model, adapter_plan.layers)
    errors = quantization_errors(model, adapter_plan, covariances=covariances)
    assert base_digest(model, adapter_plan.layers) == digest
    for name, layer_errors in errors.items():
        W, init = weight_matrix(model, name), adapter_plan.layers[name]
        values, vectors = torch.linalg.eigh(covariances[name].matrix.double())
        root = vectors * values.clamp(min=0).sqrt()
        for X, plain, on_context in (
            (W, layer_errors.base, layer_errors.base_on_context),
            (W - init.B0 @ init.A0, layer_errors.residual, layer_errors.residual_on_context),
        ):
            packed, state = bnb.functional.quantize_4bit(X.contiguous(), quant_type="nf4", compress_statistics=True)
            error = (X - bnb.functional.dequantize_4bit(packed, state)).double()
            assert plain == pytest.approx(float(error.norm() / W.double().norm()), rel=1e-4)
            assert on_context == pytest.approx(float((error @ root).norm() / (W.double() @ root).norm()), rel=1e-3)
    assert all(error.residual < error.base for error in errors.values())  # without the outliers there is less to round


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
def test_what_cannot_be_quantised_is_refused_before_anything_changes() -> None:
    model = tiny_llama()  # 24 inputs
    adapter_plan = plan(model, collect(model, [{"input_ids": torch.randint(2, 20, (4, 9))}], select_linears(model)), mode="kpm", rank=2)
    before = base_digest(model, adapter_plan.layers)
    with pytest.raises(ValueError, match="to be quantised it needs a multiple of 64"):
        attach(model, adapter_plan, residual="subtract", quantize="nf4")
    assert base_digest(model, adapter_plan.layers) == before
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        attach(model, adapter_plan, quantize="int3")
    packed = quantized("nf4")
    with pytest.raises(ValueError, match="is quantised already"):
        attach(packed, plan(packed, collect(packed, [BATCH], select_linears(packed)), mode="kpm", rank=2), quantize="nf4")


@pytest.mark.filterwarnings("ignore:.*saw .* tokens")
@pytest.mark.parametrize("protect", ["start", "strict", "whitened"])
def test_what_trains_may_be_kept_in_bfloat16(protect: Any) -> None:
    """As TRL does on quantised bases, leaving what is frozen in float32."""
    model = plain_llama()
    adapter_plan = plan(model, collect(model, [BATCH], select_linears(model)), mode="kpm", rank=4, whiten=True)
    adapted = attach(model, adapter_plan, protect=protect, quantize="nf4").train()
    with torch.no_grad():
        expected = adapted(**BATCH).logits
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    result = adapted(**BATCH)
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=0)
    result.logits.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_quantised_layers_that_have_a_bias(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    x = torch.randn(96, 64, dtype=dtype)
    adapter_plan = plan(model, collect(model, [{"input": x}], ["0", "1"]), mode="kpm", rank=4)
    adapted = attach(model, adapter_plan, protect="strict", quantize="nf4")
    for layer in lora_layers(adapted).values():
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    with torch.no_grad():
        expected = adapted(x)
        merged = merge(adapted)
        assert {module.weight.dtype for module in merged} == {module.bias.dtype for module in merged} == {dtype}
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.filterwarnings("ignore:.*saw .* tokens", "ignore:.*tie_word_embeddings")
def test_a_tied_output_layer_that_was_quantised_is_its_own_when_merged(tmp_path: Any) -> None:
    model = plain_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    adapter_plan = plan(model, collect(model, [BATCH], ["lm_head"]), mode="kpm", rank=4)
    adapted = attach(model, adapter_plan, protect="strict", quantize="nf4")
    lora_layers(adapted)["lm_head"].lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        expected = adapted.train()(**BATCH).logits
        plain = merge(adapted)
        plain.save_pretrained(tmp_path)
        torch.testing.assert_close(plain(**BATCH).logits, expected, rtol=1e-4, atol=1e-4)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**BATCH).logits, expected, rtol=1e-4, atol=1e-4)
