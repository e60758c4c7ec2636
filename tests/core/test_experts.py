"""Fused experts: covariances of the tokens routed to each, adapters of PEFT's on parameters, files, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from corda_core import (
    AdapterPlan,
    Covariance,
    attach,
    collect,
    context_drift,
    export,
    load,
    lora_layers,
    merge,
    plan,
    save,
    select_linears,
    weight_change,
)
from corda_core.drift import DriftBound
from corda_core.linears import expert_of, weight_matrix, weight_shape, write_weight_
from corda_core.lora import peft_layers, shrink_, squared_change, trained_tensors
from corda_core.plan import random_plan

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
IDS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[:3, 8:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*saw .* tokens but has")
TARGETS = r".*\.(self_attn|experts)\..*"


def tiny(kind: str = "Qwen3Moe", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "router" in name or ".gate." in name:  # so that tokens spread over the experts
            nn.init.normal_(parameter)
    return model


def collected(model: nn.Module, batches: Any = (BATCH,), targets: Any = TARGETS, **options: Any) -> dict[str, Covariance]:
    return collect(model, list(batches), select_linears(model, targets), **options)


def planned(model: nn.Module, targets: Any = TARGETS, rank: int = RANK) -> AdapterPlan:
    return plan(model, collected(model, targets=targets), mode="kpm", rank=rank)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**BATCH, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def by_hand(kind: str, model: nn.Module, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``Σ w x xᵀ`` and ``Σ w`` of each expert's matrices in float64, from what the router chose."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(path: str, module: Any, args: tuple[Tensor, ...]) -> None:
        tokens, chosen = args[0].double(), args[1]
        flat = weights.reshape(-1).double()
        for token in range(len(tokens)):
            for index in chosen[token].tolist():
                x, W = tokens[token], module.gate_up_proj[index].double()
                if kind == "GptOss":
                    y = x @ W + module.gate_up_proj_bias[index].double()
                    gate, up = y[::2].clamp(max=module.limit), y[1::2].clamp(-module.limit, module.limit)
                    hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
                else:
                    gate, up = (W @ x).chunk(2)
                    hidden = module.act_fn(gate) * up
                for key, vector in (("gate_up_proj", x), ("down_proj", hidden)):
                    name = f"{path}.{key}[{index}]"
                    total, weight = seen.get(name, (0.0, 0.0))
                    seen[name] = total + flat[token] * vector.outer(vector), weight + flat[token]  # type: ignore[operator]

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: look(name, module, args))
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter)
    ]
    with torch.no_grad():
        model(**BATCH)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_covariances_are_of_the_tokens_routed_to_each_expert(kind: str) -> None:
    model = tiny(kind)
    weights = MASK * (1 + IDS % 3)
    for given, options in ((MASK, {}), (weights, {"token_weights": lambda name, batch: weights})):
        covariances = collected(model, targets=["experts.gate_up_proj", "experts.down_proj"], **options)
        reference = by_hand(kind, model, given)
        assert covariances.keys() == {name for name, (_, weight) in reference.items() if weight > 0}
        for name, covariance in covariances.items():
            total, weight = reference[name]
            torch.testing.assert_close(covariance.matrix.double(), total / weight, rtol=1e-5, atol=1e-6 * float(total.abs().max() / weight))
            assert covariance.weight == pytest.approx(float(weight))


def test_neither_batch_size_nor_padding_nor_implementation_changes_them() -> None:
    model = tiny()
    whole = collected(model)
    alone = [{"input_ids": row[keep.bool()][None], "attention_mask": keep[keep.bool()][None]} for row, keep in zip(IDS, MASK, strict=True)]
    for implementation, batches in (("eager", [BATCH]), ("batched_mm", [BATCH]), ("grouped_mm", alone)):
        model.set_experts_implementation(implementation)
        other = collected(model, batches)
        assert other.keys() == whole.keys()
        for name, covariance in whole.items():
            assert other[name].num_tokens == covariance.num_tokens, name
            torch.testing.assert_close(other[name].matrix, covariance.matrix, rtol=1e-4, atol=1e-6)


def test_with_an_active_adapter_inputs_are_those_of_its_model() -> None:
    adapted = trained(attach(model := tiny(), planned(model), protect="strict"))
    names = sorted(lora_layers(adapted))
    with_adapter = collect(adapted.get_base_model(), [BATCH], names)
    with adapted.disable_adapter():
        without = collect(adapted.get_base_model(), [BATCH], names)
    merged = collect(merge(adapted), [BATCH], names)
    base = collect(tiny(), [BATCH], names)
    assert with_adapter.keys() == merged.keys()
    for name, covariance in merged.items():
        torch.testing.assert_close(with_adapter[name].matrix, covariance.matrix, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(without[name].matrix, base[name].matrix, rtol=1e-4, atol=1e-6)
    down = "model.layers.0.mlp.experts.down_proj[0]"
    assert float((merged[down].matrix - base[down].matrix).norm()) > 1e-2 * float(base[down].matrix.norm())


def test_names_select_experts_only_where_they_say_so() -> None:
    model = tiny("DeepseekV3")
    dense, shared = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"
    assert not any(map(expert_of, select_linears(model)))
    assert not any(map(expert_of, select_linears(model, ["down_proj", "up_proj"])))
    assert not any(map(expert_of, select_linears(model, r".*\.mlp\..+")))
    stack = [f"model.layers.1.mlp.experts.down_proj[{index}]" for index in range(4)]
    assert select_linears(model, ["experts.down_proj"]) == tuple(stack)
    names = select_linears(model, r".*(mlp|experts)\..*down_proj", exclude=["shared_experts.down_proj"])
    assert names == (dense, *stack)
    assert shared in select_linears(model, r".*(mlp|experts)\..*down_proj", exclude=["experts.down_proj"])
    assert any(map(expert_of, select_linears(model, [re.compile(TARGETS)])))
    for exclude in (r".*\.layers\.1\.mlp\..*", ["gate_up_proj", "down_proj"], [re.compile(r".*\.mlp\..*")]):  # need not say it
        assert not any(map(expert_of, select_linears(model, [re.compile(TARGETS)], exclude=exclude)))
    with pytest.raises(ValueError, match="'experts.up' matches no linear layer; closest: up_proj"):
        select_linears(model, ["experts.up"])
    assert weight_shape(model, stack[1]) == (32, 24)
    assert torch.equal(weight_matrix(model, stack[1]), model.model.layers[1].mlp.experts.down_proj[1])
    gpt = tiny("GptOss")
    name = "model.layers.0.mlp.experts.gate_up_proj[2]"
    assert torch.equal(weight_matrix(gpt, name), gpt.model.layers[0].mlp.experts.gate_up_proj[2].T)
    write_weight_(gpt, name, torch.ones(48, 32))
    assert (gpt.model.layers[0].mlp.experts.gate_up_proj.flatten(1).min(1).values == 1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_and_a_step_trains_each_expert_reached(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    before = logits(model)
    adapter_plan = planned(model)
    model.set_experts_implementation("eager" if kind == "Olmoe" else "grouped_mm")
    before = logits(model)
    adapted = attach(model, adapter_plan, protect="strict")
    assert torch.equal(logits(adapted), before)
    adapted(**BATCH, labels=IDS).loss.backward()
    frozen = [name for name, parameter in adapted.named_parameters() if "lora_A" in name and parameter.requires_grad]
    assert not frozen
    grads = {stack: layer.lora_B["default"].weight.grad for stack, (_, layer) in peft_layers(adapted).items()}
    for name in adapter_plan.layers:
        expert = expert_of(name)
        if expert is not None:
            grad = grads[expert.stack].unflatten(1, (-1, 4))[..., expert.index]  # type: ignore[union-attr]
            assert grad.abs().sum() > 0, name
    assert not torch.equal(logits(trained(adapted)), before)


def test_what_may_change_is_what_the_context_uses_least() -> None:
    model = tiny("GptOss")
    covariances = collected(model)
    adapter_plan = plan(model, covariances, mode="kpm", rank=RANK)
    for name, init in adapter_plan.layers.items():
        W, C = weight_matrix(model, name).double(), covariances[name].matrix.double()
        damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        sigma = torch.linalg.svdvals(W @ damped)
        basis, _ = torch.linalg.qr(init.B0.double())
        assert float((basis.T @ W @ damped).square().sum()) == pytest.approx(float(sigma[-RANK:].square().sum()), rel=1e-3), name
    adapted = trained(attach(model, adapter_plan, protect="strict"))
    for name, layer in lora_layers(adapted).items():
        if name in adapter_plan.layers:
            assert torch.equal(layer.lora_A["default"].weight, adapter_plan.layers[name].A0), name


def test_experts_that_no_token_reached_stay_as_they_are(tmp_path: Path) -> None:
    few = {"input_ids": IDS[:1], "attention_mask": torch.tensor([[1] + [0] * 11])}
    model = tiny()
    reference = {name for name, (_, weight) in by_hand("Qwen3Moe", model, MASK).items() if weight > 0}
    assert len(reference) == 16
    with pytest.warns(
        UserWarning, match=r"8 of 16 matrices of experts saw no token of the samples, such as model\.layers\.\d.*\]: they stay"
    ):
        covariances = collected(model, [few])
    with pytest.warns(UserWarning, match="saw 1 tokens"):
        adapter_plan = plan(model, covariances, mode="kpm", rank=RANK)
    missed = sorted(reference - adapter_plan.layers.keys())
    assert len(missed) == 8
    adapted = trained(attach(model, adapter_plan, protect="strict"))
    for name in missed:
        layer = lora_layers(adapted)[name]
        assert not layer.lora_A["default"].weight.any()
        assert not layer.lora_B["default"].weight.any()
    assert context_drift(adapted, covariances).keys() == adapter_plan.layers.keys()
    assert DriftBound(adapted, 0.1).drifts().keys() == DriftBound(adapted, 0.1, covariances).drifts().keys() == adapter_plan.layers.keys()
    save(adapted, tmp_path / "saved")
    assert torch.equal(logits(load(tiny(), tmp_path / "saved")), logits(adapted))
    weights = {name: weight_matrix(tiny(), name) for name in missed}
    merged = merge(adapted)
    assert all(torch.equal(weight_matrix(merged, name), weight) for name, weight in weights.items())


def test_its_change_is_measured_and_taken_back_like_that_of_other_layers() -> None:
    model = tiny("GptOss")
    covariances = collected(model)
    adapted = trained(attach(model, plan(model, covariances, mode="kpm", rank=RANK), protect="strict", alpha=2 * RANK))
    before, base = logits(adapted), tiny("GptOss")
    stacks = {stack: layer.get_delta_weight("default") for stack, (_, layer) in peft_layers(adapted).items()}
    drift, sizes = context_drift(adapted, covariances), weight_change(adapted)
    bound = DriftBound(adapted, 1e-3)
    for name, value in bound.drifts().items():
        expert = expert_of(name)
        change = stacks[name] if expert is None else stacks[expert.stack][expert.index].T
        W, C = weight_matrix(base, name), covariances[name].matrix
        expected = ((change @ C) * change).sum().sqrt() / ((W @ C) * W).sum().sqrt()
        assert drift[name] == pytest.approx(float(expected), rel=1e-2, abs=1e-5) == pytest.approx(value, rel=1e-2, abs=1e-5), name
        assert sizes[name] == pytest.approx(float(change.norm() / W.norm()), rel=1e-4), name
    assert squared_change(adapted) == pytest.approx(sum(float(change.square().sum()) for change in stacks.values()), rel=1e-4)
    assert bound.hold_() == 1e-3
    assert bound.drift() == pytest.approx(1e-3, rel=1e-3)
    assert {id(tensor) for tensor, _ in trained_tensors(adapted)} == {id(p) for p in adapted.parameters() if p.requires_grad}
    shrink_(adapted, 0.0)
    assert torch.equal(logits(adapted), logits(base))
    assert not torch.equal(before, logits(base))


FILES = """
import pathlib, sys, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
if sys.argv[2] == "corda":
    import corda_core
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    reference = load_file(folder / "reference.safetensors")
    batch = {key: reference[key] for key in ("input_ids", "attention_mask")}
    base = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    if sys.argv[2] == "corda":
        models = [corda_core.load(base(), folder / "saved")]
    else:
        models = [PeftModel.from_pretrained(base(), folder / "exported").eval(), PeftModel.from_pretrained(base(), folder / "saved").eval()]
        models.append(transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval())
        assert "corda_core" not in sys.modules
    with torch.no_grad():
        print(*((model(**batch).logits - reference["logits"]).abs().max().item() for model in models))
"""


def test_files_are_read_in_new_processes(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        model = tiny(kind)
        model.save_pretrained(folder / "base")
        adapted = trained(attach(model, planned(model), protect="strict", alpha=2 * RANK))
        save(adapted, folder / "saved")
        assert export(adapted, folder / "exported").rank == RANK
        save_file(BATCH | {"logits": logits(adapted)}, folder / "reference.safetensors")
        merge(adapted).save_pretrained(folder / "merged")
    for reader in ("corda", "peft"):
        done = subprocess.run([sys.executable, "-c", FILES, str(tmp_path), reader], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = [[float(value) for value in row.split()] for row in done.stdout.splitlines()]
        assert len(rows) == len(KINDS)
        assert all(row[0] < 1e-6 and max(row) < 1e-5 for row in rows), rows
        assert reader == "peft" or rows == [[0.0]] * len(KINDS)


def test_exports_of_a_part_and_compressed_ones(tmp_path: Path) -> None:
    adapted = trained(attach(model := tiny(), planned(model), protect="strict"))
    export(adapted, tmp_path / "half", alpha=0.5)
    exported = export(adapted, tmp_path / "small", compress=2)
    assert exported.rank == 2
    assert 0 < exported.mean_lost < 1
    half = logits(PeftModel.from_pretrained(tiny(), tmp_path / "half").eval())
    merged = merge(load(tiny(), save(adapted, tmp_path / "saved")), alpha=0.5)
    torch.testing.assert_close(half, logits(merged), rtol=1e-4, atol=1e-5)
    again = PeftModel.from_pretrained(tiny(), tmp_path / "half")
    assert weight_change(again) == pytest.approx({name: size / 2 for name, size in weight_change(adapted).items()}, rel=1e-3, abs=1e-7)
    assert PeftModel.from_pretrained(tiny(), tmp_path / "small").merge_and_unload() is not None


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["experts.gate_up_proj"]])
def test_one_parameter_of_a_module_alone(targets: list[str], tmp_path: Path) -> None:
    model = tiny()
    adapted = trained(attach(model, planned(model, targets), protect="strict"))
    save(adapted, tmp_path / "saved")
    export(adapted, tmp_path / "exported")
    assert torch.equal(logits(load(tiny(), tmp_path / "saved")), logits(adapted))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(), tmp_path / "exported").eval()), logits(adapted), rtol=0, atol=1e-6)


def test_a_plain_lora_to_compare_with(tmp_path: Path) -> None:
    model = tiny()
    adapted = attach(model, random_plan(model, select_linears(model, TARGETS), RANK), protect="none")
    assert torch.equal(logits(adapted), logits(tiny()))
    trained(adapted)
    export(adapted, tmp_path / "exported")
    assert all(layer.lora_A["default"].weight.requires_grad for _, layer in peft_layers(adapted).values())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(), tmp_path / "exported").eval()), logits(adapted), rtol=0, atol=1e-6)


def test_own_ranks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    model = tiny()
    covariances = collected(model)
    ranks = {name: 1 + place % 5 for place, name in enumerate(covariances)}
    adapted = attach(model, plan(model, covariances, mode="kpm", rank=RANK, ranks=ranks), protect="strict")
    assert torch.equal(logits(adapted), logits(tiny()))
    trained(adapted)
    for name, layer in lora_layers(adapted).items():
        assert not layer.lora_A["default"].weight[ranks[name] :].any()
        assert not layer.lora_B["default"].weight[:, ranks[name] :].any()
    assert torch.equal(logits(load(tiny(), save(adapted, tmp_path / "saved"))), logits(adapted))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = tiny()
    adapter_plan = planned(model)
    for options in ({"protect": "start"}, {"protect": "start", "residual": "subtract"}, {"protect": "strict", "quantize": "nf4"}):
        with pytest.raises(ValueError, match=r"gate_up_proj\[0\] is a fused expert, whose adapter PEFT cannot hold"):
            attach(model, adapter_plan, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens reach experts without their samples"):
        collected(model, normalize="sample-max")
    with pytest.raises(ValueError, match=r"its input has tokens of shape \(72,\) but the mask has \(6, 11\)"):
        collected(model, targets=["experts.down_proj"], token_weights=lambda name, batch: MASK[:, 1:])
    with pytest.raises(ValueError, match=r"down_proj\[4\] is no expert of this model's \(Qwen3MoeExperts\)"):
        weight_matrix(model, "model.layers.0.mlp.experts.down_proj[4]")
    model.model.layers[0].mlp.experts.down_proj.data[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj\[1\]: the weight holds values that are not finite"):
        plan(model, collected(tiny()), mode="kpm", rank=RANK)
    with pytest.raises(ValueError, match="made for base weights"):
        attach(model, adapter_plan, protect="strict")
    other = tiny("DeepseekV3")
    with pytest.raises(ValueError, match="made for another model: this one has no layer"):
        attach(other, planned(tiny("Mixtral")), protect="strict")
    tied = tiny()
    tied.model.layers[1].mlp.experts.down_proj = tied.model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match="down_proj is a parameter of another module too"):
        attach(tied, planned(tied), protect="strict")
    adapted = attach(tiny(), adapter_plan, protect="strict")
    save(adapted, tmp_path)
    again = load(tiny(), tmp_path)
    again.get_base_model().model.layers[0].mlp.experts.base_layer.base_layer.down_proj.data[0] += 1
    with pytest.raises(ValueError, match=r"experts\.down_proj has other values since"):
        save(again, tmp_path / "again")
