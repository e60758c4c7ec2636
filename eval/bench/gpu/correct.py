"""Whether a device computes what the CPU does: the start, energies, a step, exporting, 4 bits, compiling, kinds of attention.

Each check takes a device and raises AssertionError, or returns what it saw; ``pytest -m gpu`` runs the same ones.
"""

import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from corda_core import AdapterPlan, attach, collect, decompose, export, lora_layers, plan
from corda_core.covariance import Covariance
from corda_core.linears import quantize_linears_
from corda_eval.bench.gpu.measure import Record, heavy_tailed, seconds_once
from corda_eval.bench.gpu.shapes import language_linears, llava_7b

KINDS = ("llava", "clip", "llama")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANK = 8
CPU = torch.device("cpu")


def run(record: Record) -> None:
    """Run all checks; one that fails is written down with its traceback and the next begins."""
    failed = []
    for name, check in CHECKS.items():
        try:
            seconds, seen = seconds_once(partial(check, record.device), record.device)
            record.say(**{name: {"seconds": seconds, "seen": seen}})
        except ModuleNotFoundError as error:
            record.say(**{name: {"left out": str(error)}})
        except Exception as error:
            failed.append(name)
            record.say(**{name: {"failed": f"{type(error).__name__}: {error}"[:1500], "traceback": traceback.format_exc()[-2500:]}})
    record.measured("checks that failed", len(failed), "checks", aim="0")
    record.say(failed=failed)


def tiny(kind: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Return a small random model of a kind, the same on all devices."""
    torch.manual_seed(0)
    if kind == "llava":
        model: Any = llava_7b(CPU, small=True, dtype=torch.float32)
    elif kind == "clip":
        tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        text = tower | {"vocab_size": 100, "max_position_embeddings": 16} | ends
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=64))
    else:
        config = LlamaConfig(
            hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=200
        )
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model.to(device, dtype).eval()


def tiny_batches(kind: str, model: Any, count: int = 24) -> list[dict[str, Any]]:
    """Return batches of four samples for such a model, the same on all devices."""
    generator = torch.Generator().manual_seed(1)
    batches: list[dict[str, Any]] = []
    for _ in range(count):
        if kind == "llava":
            ids = torch.randint(5, 31999, (4, 40), generator=generator)
            ids[:, 1:17] = model.config.image_token_id
            images = torch.randn(4, 3, 56, 56, generator=generator)
        else:
            ids = torch.randint(5, 100, (4, 16), generator=generator)
            ids[:, -1] = 1
            images = torch.randn(4, 3, 32, 32, generator=generator)
        batch: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
        batches.append(batch if kind == "llama" else batch | {"pixel_values": images.to(model.device, model.dtype)})
    return batches


def layers_of(kind: str, model: Any) -> tuple[str, ...]:
    """Return the layers that are adapted."""
    if kind == "llava":
        return language_linears(model)
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
    towers = ("text_model.", "model.layers.")
    return tuple(name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends and any(part in name for part in towers))


def outputs(kind: str, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return what a model makes of a batch."""
    with torch.no_grad():
        result = model(**batch)
    values: Tensor = result.text_embeds if kind == "clip" else result.logits
    return values


def planned(kind: str, model: Any, mode: str = "kpm") -> tuple[AdapterPlan, dict[str, Covariance]]:
    """Return a plan for a model, and the covariances it was made from."""
    covariances = collect(model, tiny_batches(kind, model), layers_of(kind, model))
    return plan(model, covariances, mode=mode, rank=RANK), covariances


def check_start(device: torch.device) -> Any:
    """Outputs at the start are bit for bit the base's, of three kinds in three precisions and in every form."""
    seen = []
    for kind in KINDS:
        for dtype in DTYPES:
            model = tiny(kind, device, dtype)
            batch = tiny_batches(kind, model, 1)[0]
            base, (made, _) = outputs(kind, model, batch), planned(kind, model)
            assert base.isfinite().all(), f"{kind} in {dtype}: the base's own outputs are not finite"
            for protect in ("start", "strict"):
                adapted = attach(model, made, protect=protect)
                assert torch.equal(outputs(kind, adapted, batch), base), f"{kind} in {dtype}, {protect}: outputs at the start differ"
                model = adapted.unload()
            seen.append(f"{kind} {dtype}")
    return seen


def check_energies(device: torch.device) -> Any:
    """Of each layer the context energy of what was chosen is within 1e-4 of the best, in float64 on the CPU."""
    worst = {}
    for kind in KINDS:
        for mode in ("kpm", "ipm"):
            model = tiny(kind, device, torch.float32)
            made, covariances = planned(kind, model, mode)
            ratios = [
                _energy_ratio(model.get_submodule(name).weight, covariances[name], init.B0, mode) for name, init in made.layers.items()
            ]
            worst[f"{kind} {mode}"] = max(abs(ratio - 1) for ratio in ratios)
    assert max(worst.values()) <= 1e-4, f"the energies are off by {worst}"
    return worst


def check_iterations(device: torch.device) -> Any:
    """The iterations for few components reach 0.999 to 1.001 of the best energies without falling back, of wide and tall layers."""
    seen, generator = {}, torch.Generator().manual_seed(0)
    for m, n in ((768, 512), (512, 512), (512, 768)):
        weight = heavy_tailed((m, n), generator, torch.bfloat16) / n**0.5
        rows = heavy_tailed((4 * n, n), generator)
        covariance = Covariance.of(rows.T @ rows / len(rows), len(rows))
        there = Covariance.of(covariance.matrix.to(device), len(rows))
        for mode in ("kpm", "ipm"):
            chosen = decompose(weight.to(device), there, 16, mode, solver="partial")
            seen[f"{m}x{n} {mode}"] = _energy_ratio(weight, covariance, chosen.basis, mode)
            assert not chosen.fell_back, f"{m} × {n}, {mode}: fell back to the exact solver"
    assert all(0.999 <= ratio <= 1.001 for ratio in seen.values()), f"the energies are off: {seen}"
    return seen


def _energy_ratio(weight: Tensor, covariance: Covariance, B0: Tensor, mode: str) -> float:
    """Return ``‖U_Sᵀ W C‖_F`` of the columns of B0 over that of the best r, C damped."""
    W, C = weight.detach().double().cpu(), covariance.matrix.double().cpu()
    P = W @ (C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64))
    sigma = torch.linalg.svdvals(P)
    best = (sigma[-B0.shape[1] :] if mode == "kpm" else sigma[: B0.shape[1]]).norm()
    return float((torch.linalg.qr(B0.double().cpu()).Q.T @ P).norm() / best)


def check_covariances(device: torch.device) -> Any:
    """Covariances are the CPU's to 1e-4 of ``√(C_ii C_jj)`` in float32: the model's own rounding is in them."""
    worst = {}
    for kind in KINDS:
        on_cpu, on_device = (planned(kind, tiny(kind, place, torch.float32))[1] for place in (CPU, device))
        errors = []
        for name, covariance in on_cpu.items():
            expected, seen = covariance.matrix, on_device[name].matrix.cpu()
            lengths = expected.diagonal().clamp(min=1e-30).sqrt()
            errors.append(float(((seen - expected).abs() / lengths.outer(lengths)).max()))
        worst[kind] = max(errors)
    assert max(worst.values()) <= 1e-4, f"the covariances are off by {worst}"
    return worst


def check_prepare(device: torch.device) -> Any:
    """``corda_vlm.prepare`` on a LLaVA, all parts, in every precision: outputs at the start are bit for bit the base's."""
    # Imported here: it needs pydantic, without which the other checks can be made.
    from corda_vlm import prepare

    counts = {}
    for dtype in DTYPES:
        model = tiny("llava", device, dtype)
        batches = tiny_batches("llava", model)
        base = outputs("llava", model, batches[0])
        adapted = prepare(model, batches, rank=RANK, parts=("vision", "projector", "language"))
        assert torch.equal(outputs("llava", adapted, batches[0]), base), f"in {dtype} outputs at the start differ"
        counts[str(dtype)] = len(lora_layers(adapted))
    return counts


def check_step(device: torch.device) -> Any:
    """Five steps of AdamW lower the loss of one batch in every precision, and B moves in each layer."""
    seen = {}
    for dtype in DTYPES:
        for protect in ("start", "strict"):
            model = tiny("llama", device, dtype)
            adapted = attach(model, planned("llama", model)[0], protect=protect).train()
            losses = trained(adapted, tiny_batches("llama", model, 1)[0], dtype)
            assert losses[-1] < losses[0], f"{protect} in {dtype}: the loss went from {losses[0]} to {losses[-1]}"
            seen[f"{protect} {dtype}"] = [losses[0], losses[-1]]
    return seen


def trained(adapted: Any, batch: Mapping[str, Any], dtype: torch.dtype, steps: int = 5) -> list[float]:
    """Train on one batch; return the losses."""
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast(adapted.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = adapted(**batch).logits
        ids: Any = batch["input_ids"]
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def check_export(device: torch.device) -> Any:
    """An exported LoRA on the untouched base gives the trained model's outputs."""
    from peft import PeftModel

    model = tiny("llama", device, torch.float32)
    batch = tiny_batches("llama", model, 1)[0]
    adapted = attach(model, planned("llama", model)[0]).train()
    trained(adapted, batch, torch.float32)
    expected = outputs("llama", adapted.eval(), batch)
    with tempfile.TemporaryDirectory() as folder:
        export(adapted, Path(folder) / "lora")
        again = PeftModel.from_pretrained(tiny("llama", device, torch.float32), str(Path(folder) / "lora")).eval()
        error = float((outputs("llama", again, batch) - expected).abs().max() / expected.abs().max())
    assert error <= 1e-4, f"the exported LoRA's outputs are off by {error}"
    return error


def check_nf4(device: torch.device) -> Any:
    """On a base in 4 bits outputs at the start are bit for bit the base's, and it trains."""
    model = tiny("llama", device, torch.bfloat16)
    quantize_linears_(model, layers_of("llama", model))
    batch = tiny_batches("llama", model, 1)[0]
    made, _ = planned("llama", model)
    base = outputs("llama", model.train(), batch)
    adapted = attach(model, made, protect="strict").train()
    assert torch.equal(outputs("llama", adapted, batch), base), "outputs at the start differ on a base in 4 bits"
    losses = trained(adapted, batch, torch.bfloat16)
    assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
    return losses


def check_compiled(device: torch.device) -> Any:
    """A compiled adapted model gives what it gives uncompiled."""
    model = tiny("llama", device, torch.float32)
    batch = tiny_batches("llama", model, 1)[0]
    adapted = attach(model, planned("llama", model)[0]).eval()
    expected = outputs("llama", adapted, batch)
    error = float((outputs("llama", torch.compile(adapted), batch) - expected).abs().max() / expected.abs().max())
    assert error <= 1e-4, f"compiled, outputs are off by {error}"
    return error


def check_attention(device: torch.device) -> Any:
    """Kinds of attention give nearly the same covariances; flash attention where it is installed."""
    reference: dict[str, Covariance] = {}
    seen: dict[str, Any] = {}
    for attention in ("eager", "sdpa", "flash_attention_2"):
        try:
            covariances = planned("llama", tiny("llama", device, torch.bfloat16, attention))[1]
        except Exception as error:
            if attention != "flash_attention_2":
                raise
            seen[attention] = f"left out: {error}"[:200]  # not installed, in one of many ways
            continue
        reference = reference or covariances
        seen[attention] = max(
            float((C.matrix - reference[name].matrix).norm() / reference[name].matrix.norm()) for name, C in covariances.items()
        )
        assert seen[attention] <= 2e-2, f"with {attention} covariances are off by {seen[attention]}"
    return seen


CHECKS: dict[str, Callable[[torch.device], Any]] = {
    "start": check_start,
    "energies": check_energies,
    "iterations": check_iterations,
    "covariances": check_covariances,
    "prepare": check_prepare,
    "step": check_step,
    "export": check_export,
    "nf4": check_nf4,
    "compiled": check_compiled,
    "attention": check_attention,
}
