"""PEFT's methods in the study: what trains, where they start, what a training changes, and what each method promises."""

import builtins
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama, tiny_llava
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from corda_core import select_linears
from corda_core.linears import base_of, weight_matrix
from corda_core.lora import lora_layers
from corda_eval.study.change import effective_weight, interpolated, linear_copies
from corda_eval.study.methods import METHODS
from corda_eval.study.methods.dora import Dora
from corda_eval.study.methods.eva import Eva, valid_tokens
from corda_eval.study.methods.full import Full
from corda_eval.study.methods.kasa import Kasa, kasa_penalty
from corda_eval.study.methods.lora_ga import LoraGa
from corda_eval.study.methods.mica import Mica
from corda_eval.study.methods.osf import Osf
from corda_eval.study.methods.pissa import Pissa
from corda_eval.study.methods.qlora import Qlora
from corda_eval.study.task import TARGET, Adapted, Method, Task
from corda_eval.study.train import train
from corda_vlm.attention import split_attention

RANK = 3
PLAIN: list[Method] = [Dora(RANK), Pissa(RANK), Mica(RANK), Osf(RANK), LoraGa(RANK), LoraGa(RANK, form="peft"), Full()]
"""Those that start as the base and train all layers."""
ALL: list[Method] = [*PLAIN, Eva(RANK), Kasa(RANK)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(model: nn.Module, layers: tuple[str, ...], batches: list[dict[str, Tensor]], loss: Any = None) -> Task:
    """A task of which the methods use model, layers, loss, batches and the context of what is learned."""

    def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model(**batch).loss

    return Task(
        model=model.requires_grad_(False),
        layers=layers,
        loss=loss or own_loss,
        batches=batches,
        contexts={TARGET: batches},
        validate=lambda model: 0.0,
        measure=lambda model: {},
        cache=Path("cache"),
        seed=0,
    )


def words(rows: int, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, 21, (rows, length))
    return {"input_ids": ids, "labels": ids}


def llama_task() -> Task:
    model = tiny_llama()
    return make(model, select_linears(model), [words(4) for _ in range(3)])


def llava_task() -> Task:
    """All towers, but the block of vision that no output depends on."""
    model = tiny_llava()
    ids = torch.randint(5, 21, (3, 4, 16))
    ids[:, :, :4] = 4
    batches = [{"input_ids": row, "labels": row, "pixel_values": torch.randn(4, 3, 16, 16)} for row in ids]
    return make(model, select_linears(model, exclude=r".*vision.*layers\.2\..*"), batches)


def open_clip_task(tower: str = ".*") -> Task:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "mlp_ratio": 2.0},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2},
    ).eval()
    assert split_attention(model) == 4

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        image, text, scale = model(**batch)
        return F.cross_entropy(scale * image @ text.T, torch.arange(len(image)))

    batches = [{"image": torch.randn(6, 3, 16, 16), "text": torch.randint(1, 64, (6, 8))} for _ in range(3)]
    return make(model, select_linears(model, tower), batches, loss)


TASKS = {"llama": llama_task, "llava": llava_task, "open_clip": open_clip_task}
each_task = pytest.mark.parametrize("make_task", TASKS.values(), ids=TASKS)


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**batch)
    return torch.cat([part.flatten() for part in result[:2]]) if isinstance(result, tuple) else result.logits


def trainable(adapted: Adapted) -> int:
    return sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)


def shapes(task: Task) -> list[tuple[int, int]]:
    return [tuple(weight_matrix(task.model, name).shape) for name in task.layers]


@each_task
@pytest.mark.parametrize("method", [*PLAIN, Eva(RANK)], ids=repr)
def test_start_is_the_base(make_task: Any, method: Method) -> None:
    task = make_task()
    before = outputs(task.model, task.batches[0])
    after = outputs(method.adapt(task).model.eval(), task.batches[0])
    if isinstance(method, (Mica, Eva, Full)):
        assert torch.equal(after, before)
    else:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5)


@each_task
@pytest.mark.parametrize("method", ALL, ids=repr)
def test_training_changes_the_layers_and_nothing_else(make_task: Any, method: Method) -> None:
    task = make_task()
    originals = linear_copies(task.model, task.layers)
    inside = {f"{name}.weight" for name in task.layers}
    others = {key: value.clone() for key, value in task.model.state_dict().items() if key not in inside}
    adapted = method.adapt(task)
    starts = {name: effective_weight(adapted.model, name, original.in_features) for name, original in originals.items()}
    assert not train(adapted, task, 1e-2).diverged
    for key, value in base_of(adapted.model).state_dict().items():
        plain = key.replace(".base_layer", "")
        if plain in others:
            assert torch.equal(value, others[plain]), key
    moved = [
        name
        for name, original in originals.items()
        if not torch.equal(effective_weight(adapted.model, name, original.in_features), starts[name])
    ]
    assert len(moved) >= (len(task.layers) // 2 if isinstance(method, Eva) else len(task.layers)), set(task.layers) - set(moved)
    with interpolated(adapted.model, originals, 0.5):
        halfway = {name: effective_weight(adapted.model, name, original.in_features) for name, original in originals.items()}
    for name, original in originals.items():
        whole = effective_weight(adapted.model, name, original.in_features)
        torch.testing.assert_close(halfway[name], (original.weight + whole) / 2, rtol=1e-3, atol=1e-5)
    if not isinstance(method, Full):  # what is read off the layers is what PEFT merges
        ends = {name: effective_weight(adapted.model.eval(), name, original.in_features) for name, original in originals.items()}
        merged: Any = adapted.model.merge_and_unload()  # type: ignore[operator]
        for name, end in ends.items():
            torch.testing.assert_close(end, merged.get_submodule(name).weight, rtol=1e-3, atol=1e-5)


def test_parameters_that_train() -> None:
    sizes = shapes(llama_task())
    expected = {
        Dora(RANK): sum(RANK * (m + n) + m for m, n in sizes),
        Pissa(RANK): sum(RANK * (m + n) for m, n in sizes),
        LoraGa(RANK): sum(RANK * (m + n) for m, n in sizes),
        Mica(RANK): sum(RANK * n for _, n in sizes),
        Osf(RANK): sum(RANK * (m + n + 1) for m, n in sizes),
        Kasa(RANK): sum(RANK * (m + n + 1) for m, n in sizes),
        Eva(RANK, rho=1.0): sum(RANK * (m + n) for m, n in sizes),
        Full(): sum(m * n for m, n in sizes),
    }
    assert {method: trainable(method.adapt(llama_task())) for method in expected} == expected


def test_table_names_each_method() -> None:
    assert {"dora", "eva", "full", "kasa", "lora_ga", "mica", "osf", "pissa", "qlora"} <= METHODS.keys()


@pytest.mark.parametrize("method", [*PLAIN, Eva(2), Kasa(2)], ids=repr)
def test_one_tower_whose_names_end_the_other_s_stays_alone(method: Method) -> None:
    """open_clip's "transformer.…" is an ending of "visual.transformer.…", and PEFT matches endings."""
    task = open_clip_task(r"(?!visual).*")
    vision = {key: value.clone() for key, value in task.model.state_dict().items() if key.startswith("visual")}
    assert not any(name.startswith("visual") for name in task.layers)
    adapted = method.adapt(task)
    train(adapted, task, 1e-2)
    state = base_of(adapted.model).state_dict()
    assert {key: value.shape for key, value in state.items() if key.startswith("visual")} == {k: v.shape for k, v in vision.items()}
    assert all(torch.equal(state[key], value) for key, value in vision.items())


def test_pissa_takes_the_top_components() -> None:
    task = llama_task()
    name = task.layers[4]
    U, S, Vh = torch.linalg.svd(weight_matrix(task.model, name).double())
    layer = lora_layers(Pissa(RANK).adapt(task).model)[name]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close((B @ A).double(), (U[:, :RANK] * S[:RANK]) @ Vh[:RANK], rtol=1e-4, atol=1e-6)
    assert torch.linalg.svdvals(layer.get_base_layer().weight)[0] == pytest.approx(S[RANK].item(), rel=1e-4)


def test_mica_trains_a_beside_the_bottom_of_w() -> None:
    task = llama_task()
    name = task.layers[4]
    U = torch.linalg.svd(weight_matrix(task.model, name).double())[0][:, : min(shapes(task)[4])][:, -RANK:]
    layer = lora_layers(Mica(RANK).adapt(task).model)[name]
    B = layer.lora_B["default"].weight
    torch.testing.assert_close((B @ B.T).double(), U @ U.T, rtol=1e-4, atol=1e-5)
    assert not B.requires_grad
    assert layer.lora_A["default"].weight.requires_grad


def test_eva_finds_the_main_directions_of_the_inputs() -> None:
    task = llama_task()
    torch.manual_seed(1)
    mix = torch.diag(torch.tensor([9.0, 6, 4, 2.5] + [0.1] * 28))  # clear directions: those of the embedding
    task.model.get_input_embeddings().weight.data.copy_(torch.randn(22, 32) @ mix)
    name = "model.layers.0.self_attn.q_proj"
    task.model.model.layers[0].input_layernorm = nn.Identity()
    inputs = torch.cat([task.model.get_input_embeddings()(batch["input_ids"]).flatten(0, 1) for batch in task.batches]).double()
    directions = torch.linalg.svd(inputs - inputs.mean(0))[2][:RANK]
    A = lora_layers(Eva(RANK, rho=1.0).adapt(task).model)[name].lora_A["default"].weight.double()
    assert torch.linalg.svdvals(A @ directions.T).min() > 0.99  # PEFT stops there


def test_eva_spends_the_budget_of_ranks_where_inputs_vary_in_more_directions() -> None:
    task = llama_task()
    scaling = {}
    ranks = dict.fromkeys(task.layers, 0)
    for name, layer in lora_layers(Eva(RANK, rho=2.0).adapt(task).model).items():
        ranks[name], scaling[name] = layer.r["default"], layer.scaling["default"]
    assert sum(ranks.values()) == RANK * len(task.layers)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 2 * RANK
    assert set(scaling.values()) == {1.0}


def test_eva_goes_over_the_context_once_for_all_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Eva(RANK).adapt(replace(llama_task(), cache=tmp_path)).model
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr("corda_eval.study.methods.eva.directions", None)
    again = Eva(RANK).adapt(replace(llama_task(), cache=tmp_path)).model
    assert {key: value.shape for key, value in first.state_dict().items()} == {
        key: value.shape for key, value in again.state_dict().items()
    }
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    other = replace(llama_task(), cache=tmp_path, contexts={TARGET: [words(4)]})
    with pytest.raises(TypeError):
        Eva(RANK).adapt(other)


def test_eva_leaves_out_padding() -> None:
    x, mask = torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(valid_tokens((x,), {"attention_mask": mask}, ""), torch.stack([x[0, 0], x[0, 1], x[1, 2]]))
    assert valid_tokens((x,), {"attention_mask": mask[:, :2]}, "").shape == (6, 5)  # a mask of something else


def test_eva_ends_where_batches_are_too_small() -> None:
    task = llama_task()
    task = make(task.model, task.layers, [words(1, 4)])
    with pytest.raises(ValueError, match="did not settle within 20 passes over 1 batches"):
        Eva(RANK).adapt(task)


def test_lora_ga_is_the_paper_s() -> None:
    """Against the mean gradient of the loss, in float64."""
    task = llama_task()
    dense = copy.deepcopy(task.model).double()
    name = task.layers[5]
    dense.get_submodule(name).weight.requires_grad_(True)
    for batch in task.batches[:2]:
        dense(**batch).loss.backward()
    U, _, Vh = torch.linalg.svd(dense.get_submodule(name).weight.grad / 2)
    length = shapes(task)[5][0] ** 0.25 / 2
    layer = lora_layers(LoraGa(RANK, gradient_batches=2, gamma=4).adapt(task).model)[name]
    A, B = layer.lora_A["default"].weight.double() / length, layer.lora_B["default"].weight.double() / length
    torch.testing.assert_close(A.T @ A, Vh[:RANK].T @ Vh[:RANK], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(B @ B.T, U[:, RANK : 2 * RANK] @ U[:, RANK : 2 * RANK].T, rtol=1e-3, atol=1e-3)


def test_lora_ga_leaves_no_trace_and_starts_layers_without_gradient_as_lora() -> None:
    task = llava_task()
    dead = next(name for name in select_linears(task.model) if name.endswith("layers.2.mlp.fc1"))
    task = make(task.model, (*task.layers, dead), list(task.batches))
    before = outputs(task.model, task.batches[0])
    adapted = LoraGa(RANK).adapt(task)
    torch.testing.assert_close(outputs(adapted.model, task.batches[0]), before, rtol=1e-4, atol=2e-5)
    assert not lora_layers(adapted.model)[dead].lora_B["default"].weight.any()
    assert not [key for module in adapted.model.modules() for key in vars(module) if "loraga" in key]
    assert all(p.grad is None for p in adapted.model.parameters())


def test_osf_keeps_all_but_the_rank_and_projects_gradients() -> None:
    task = llama_task()
    name = task.layers[6]  # wider than tall
    m, n = shapes(task)[6]
    U, S, Vh = torch.linalg.svd(weight_matrix(task.model, name).double(), full_matrices=False)
    kept = min(m, n) - RANK
    adapted = Osf(RANK).adapt(task)
    task.loss(adapted.model, task.batches[0]).backward()
    parts = base_of(adapted.model).get_submodule(name).osf_svd_params["default"]
    torch.testing.assert_close(parts["S_low"].double(), S[kept:], rtol=1e-4, atol=1e-6)
    for gradient, high in ((parts["U_low"].grad, U[:, :kept]), (parts["V_low"].grad.T, Vh[:kept].T)):
        assert (high.T @ gradient.double()).norm() < 1e-5 * gradient.norm()


def test_kasa_does_not_start_as_the_base() -> None:
    task = llama_task()
    before = outputs(task.model, task.batches[0])
    weights = {name: weight_matrix(task.model, name).clone().double() for name in task.layers}
    adapted = Kasa(RANK).adapt(task)
    assert (outputs(adapted.model, task.batches[0]) - before).norm() > 1e-3 * before.norm()
    for name, W in weights.items():
        S = torch.linalg.svdvals(W)
        lost = W - effective_weight(adapted.model, name, W.shape[1])
        torch.testing.assert_close(torch.linalg.svdvals(lost)[:RANK], S[-RANK:], rtol=1e-3, atol=1e-6)
        assert torch.linalg.matrix_rank(lost, rtol=1e-3) == RANK
    assert {layer.scaling["default"] for layer in lora_layers(adapted.model).values()} == {2.0}


@pytest.mark.parametrize("outer", [False, True])
def test_kasa_penalty_is_the_formula(outer: bool) -> None:
    task = llama_task()
    adapted = Kasa(RANK, beta=0.3, gamma=0.7).adapt(task)
    layers = lora_layers(adapted.model).values()
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    penalties = []
    for layer in layers:
        A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        grams = (B @ B.T, A.T @ A) if outer else (B.T @ B, A @ A.T)
        distance = sum((gram - torch.eye(len(gram))).norm() for gram in grams)
        penalties.append(0.3 * layer.lora_diag["default"].double().square().sum() + 0.7 * distance)
    dense = torch.stack(penalties)
    assert isinstance(adapted.model, PeftModel)
    assert adapted.penalty is not None
    result = kasa_penalty(adapted.model, outer=outer)()
    assert outer or result.item() == adapted.penalty().item()
    assert result.item() == pytest.approx(dense.mean().item(), rel=1e-5)
    result.backward()
    assert all(layer.lora_diag["default"].grad.any() for layer in layers)


def quantizable() -> Task:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM(config).eval()
    return make(model, select_linears(model), [words(4) for _ in range(3)])


def test_qlora_trains_lora_on_nf4_also_after_it_was_measured() -> None:
    pytest.importorskip("bitsandbytes")
    task = quantizable()
    originals = linear_copies(task.model, task.layers)
    adapted = Qlora(RANK).adapt(task)
    assert trainable(adapted) == sum(RANK * (m + n) for m, n in shapes(task))
    outputs(adapted.model.eval(), task.batches[0])  # here some CPUs would pack the weights
    starts = {}
    for name, original in originals.items():
        starts[name] = effective_weight(adapted.model, name, 64)
        assert 0.02 < (starts[name] - original.weight).norm() / original.weight.norm() < 0.15  # nf4's error on normal weights is 9 %
        torch.testing.assert_close(starts[name], weight_matrix(base_of(adapted.model), name), rtol=1e-4, atol=1e-5)
    assert not train(adapted, task, 1e-2).diverged
    adapted.model.eval()
    for name, layer in lora_layers(adapted.model).items():
        change = effective_weight(adapted.model, name, 64) - starts[name]
        torch.testing.assert_close(change, layer.get_delta_weight("default"), rtol=1e-3, atol=1e-5)
        assert change.any()


def test_qlora_says_what_brings_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'corda-vlm\[quantized\]'"):
        Qlora(RANK).adapt(llama_task())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Kasa(16), r"model.layers.0.self_attn.k_proj has no more than 16 components"),
        (Osf(16), r"model.layers.0.self_attn.k_proj has no more than 16 directions"),
        (LoraGa(9), r"model.layers.0.self_attn.k_proj has fewer than 18 directions"),
        (LoraGa(RANK, form="mine"), "form is 'mine'"),  # type: ignore[arg-type]
        (Eva(9), r"model.layers.0.self_attn.k_proj has no 18 directions"),
        (Eva(RANK, rho=0.5), "rho"),
    ],
    ids=repr,
)
def test_wrong_options_are_named(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.adapt(llama_task())


@pytest.mark.parametrize("method", [Pissa(RANK), LoraGa(RANK), Kasa(RANK), Full()], ids=repr)
def test_shared_weights_are_refused_where_the_base_is_written(method: Method) -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="lm_head, whose weight another module uses"):
        method.adapt(make(model, ("lm_head",), [words(4)]))
