"""MiLoRA, LoRA-Null, SC-LoRA and OPLoRA against their definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from tiny_study import TALL, WIDE, outputs, tiny_task
from torch import Tensor

from corda_core import lora_layers
from corda_core.linears import base_of, weight_matrix
from corda_eval.study.methods import METHODS
from corda_eval.study.methods.lora_null import LoraNull, null_factors
from corda_eval.study.methods.milora import Milora
from corda_eval.study.methods.oplora import Oplora, leading_directions
from corda_eval.study.methods.sc_lora import ScLora
from corda_eval.study.task import TARGET, Adapted, Task
from corda_eval.study.train import train
from corda_vlm.yaml import from_mapping

RANK = 3
ALL = [Milora(RANK), LoraNull(RANK), LoraNull(RANK, "v2"), ScLora(RANK, beta=0.5), Oplora(RANK, preserved=2)]


def weights(task: Task) -> dict[str, Tensor]:
    return {name: weight_matrix(task.model, name).clone() for name in task.layers}


def starts(adapted: Adapted) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer as they are."""
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in lora_layers(adapted.model).items()
    }


def changes(adapted: Adapted, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ΔW of each layer, read off what it computes."""
    result = {}
    for name, W in before.items():
        layer, eye = base_of(adapted.model).get_submodule(name), torch.eye(W.shape[1], dtype=W.dtype)
        with torch.no_grad():
            result[name] = (layer(eye) - layer(torch.zeros_like(eye))).T - W
    return result


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_unchanged_at_the_start_and_learns(method: Any, tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    batch = task.batches[0]
    before = outputs(task.model, batch)
    task.covariances(TARGET)  # on the bare model
    adapted = method.adapt(task)
    torch.testing.assert_close(outputs(adapted.model, batch), before, rtol=0, atol=0)
    assert {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad and "lora_" not in name} == set()
    trained = train(adapted, task, 1e-2)
    assert not trained.diverged
    assert trained.validation_losses[-1][1] < trained.validation_losses[0][1]


@pytest.mark.parametrize("kind", ["milora", "lora_null", "sc_lora", "oplora", "lalora"])
def test_ranks_are_clipped(kind: str, tmp_path: Path) -> None:
    options = {"sc_lora": {"beta": 0.5}, "oplora": {"preserved": 2}, "lalora": {"strength": 1}}.get(kind, {})
    task = tiny_task(tmp_path)
    with pytest.warns(UserWarning, match="clipped") if kind == "milora" else pytest.MonkeyPatch.context():
        adapted = from_mapping({"rank": 9, **options}, METHODS[kind], kind).adapt(task)
    assert {name: layer.r["default"] for name, layer in lora_layers(adapted.model).items()} == {WIDE: 8, TALL: 8}
    assert {layer.scaling["default"] for layer in lora_layers(adapted.model).values()} == {1}
    with pytest.raises(ValueError, match="rank"):
        from_mapping({"rank": 0, **options}, METHODS[kind], kind).adapt(tiny_task(tmp_path))


def test_milora_takes_the_smallest_components(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    before = weights(task)
    for name, (A, B) in starts(Milora(RANK).adapt(task)).items():
        U, sigma, Vt = torch.linalg.svd(before[name], full_matrices=False)
        torch.testing.assert_close(B @ A, U[:, -RANK:] * sigma[-RANK:] @ Vt[-RANK:], rtol=0, atol=1e-6)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-6)  # √Σ on both sides
        torch.testing.assert_close((B.T @ B).diagonal(), sigma[-RANK:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("context", [(), ("second",)])
def test_lora_null_starts_in_the_null_space(tmp_path: Path, context: tuple[str, ...]) -> None:
    task = tiny_task(tmp_path)
    before, covariances = weights(task), task.covariances(*(context or ("first", "second")))
    for name, (A, B) in starts(LoraNull(RANK, context=context).adapt(task)).items():
        W, C = before[name], covariances[name].matrix.double()
        values, vectors = torch.linalg.eigh(C)
        Q = vectors[:, :RANK]
        torch.testing.assert_close(B @ A, W @ Q @ Q.T, rtol=0, atol=1e-6)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-6)
        rows = torch.linalg.qr(A.T).Q.T
        energy = (rows @ C @ rows.T).trace()
        torch.testing.assert_close(energy, values[:RANK].sum(), rtol=1e-4, atol=0)
        for _ in range(20):
            other = torch.linalg.qr(torch.randn_like(A).T).Q.T
            assert energy < (other @ C @ other.T).trace()


def test_lora_null_v2_stays_in_the_null_space(tmp_path: Path) -> None:
    kept: dict[str, list[float]] = {}
    for version in ("v1", "v2"):
        task = tiny_task(tmp_path)
        before, covariances = weights(task), task.covariances("first", "second")
        adapted = LoraNull(RANK, version).adapt(task)
        parameters = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
        assert parameters == RANK * (8 + 10 + (12 + 8 if version == "v1" else 0))
        train(adapted, task, 3e-2)
        for name, change in changes(adapted, before).items():
            Q = torch.linalg.eigh(covariances[name].matrix.double()).eigenvectors[:, :RANK]
            kept.setdefault(version, []).append(float((change - change @ Q @ Q.T).norm() / change.norm()))
    assert max(kept["v2"]) < 1e-5 < 1e-2 < min(kept["v1"])


def test_lora_null_of_a_weight_that_gives_nothing_there() -> None:
    Q = torch.eye(6, dtype=torch.float64)[:, :3]
    W = torch.randn(5, 6, dtype=torch.float64) * torch.tensor([1, 1, 0, 1, 1, 1])
    A, B = null_factors(W, Q)
    torch.testing.assert_close(B.double() @ A.double(), W @ Q @ Q.T, rtol=0, atol=1e-6)
    assert torch.isfinite(A).all()
    assert (B.norm(dim=0) > 0.1).all()


@pytest.mark.parametrize("beta", [0, 0.5, 0.9])
def test_sc_lora_takes_the_best_subspace(tmp_path: Path, beta: float) -> None:
    task = tiny_task(tmp_path)
    before, learned, kept = weights(task), task.covariances(TARGET), task.covariances("first", "second")
    for name, (A, B) in starts(ScLora(RANK, beta=beta).adapt(task)).items():
        W = before[name]
        torch.testing.assert_close(B.T @ B, torch.eye(RANK, dtype=B.dtype), rtol=0, atol=1e-6)
        torch.testing.assert_close(A, B.T @ W, rtol=0, atol=1e-6)
        reward = W @ ((1 - beta) * learned[name].matrix.double() - beta * kept[name].matrix.double()) @ W.T
        values = torch.linalg.eigvalsh(reward)
        best = (B.T @ reward @ B).trace()
        torch.testing.assert_close(best, values[-RANK:].sum(), rtol=1e-4, atol=1e-6)
        for _ in range(20):
            Q = torch.linalg.qr(torch.randn_like(B)).Q
            assert best > (Q.T @ reward @ Q).trace()


def test_sc_lora_sees_the_outputs(tmp_path: Path) -> None:
    """``W C Wᵀ`` is the second moment of what the layer gives, its bias aside."""
    task = tiny_task(tmp_path)
    W, C = weight_matrix(task.model, WIDE), task.covariances("first")[WIDE].matrix.double()
    given = torch.cat([batch["x"] for batch in task.contexts["first"]]) @ W.T
    torch.testing.assert_close(W @ C @ W.T, given.T @ given / len(given), rtol=1e-5, atol=1e-7)


def test_oplora_leaves_the_largest_triples(tmp_path: Path) -> None:
    count = 2
    task = tiny_task(tmp_path)
    before = weights(task)
    adapted = Oplora(RANK, preserved=count).adapt(task)
    train(adapted, task, 3e-2)
    for name, change in changes(adapted, before).items():
        U, sigma, Vt = torch.linalg.svd(before[name], full_matrices=False)
        assert change.norm() > 1e-2
        assert torch.linalg.matrix_rank(change, rtol=1e-8) <= RANK
        assert (U[:, :count].T @ change).norm() < 1e-12
        assert (change @ Vt[:count].T).norm() < 1e-12
        torch.testing.assert_close((before[name] + change) @ Vt[:count].T, U[:, :count] * sigma[:count])


def test_oplora_projects_in_full_precision_under_casting(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    layer = lora_layers(Oplora(RANK, preserved=2).adapt(task).model)[WIDE].lora_A["default"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight.detach()
    torch.testing.assert_close(inside, layer.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_leading_directions(shape: tuple[int, int]) -> None:
    W = torch.randn(*shape, dtype=torch.float64)
    U, V = leading_directions(W, 3)
    exact_U, _, exact_Vt = torch.linalg.svd(W)
    torch.testing.assert_close(U @ U.T, exact_U[:, :3] @ exact_U[:, :3].T)
    torch.testing.assert_close(V @ V.T, exact_Vt[:3].T @ exact_Vt[:3])


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    for count in (0, 8):
        with pytest.raises(ValueError, match=r"wide: preserved is \d, but W is \(8, 12\): expected 1 to 7"):
            Oplora(RANK, preserved=count).adapt(tiny_task(tmp_path))
    with pytest.raises(ValueError, match="beta is 1.5"):
        ScLora(RANK, beta=1.5).adapt(tiny_task(tmp_path))
    with pytest.raises(ValueError, match="'v3'"):
        LoraNull(RANK, "v3").adapt(tiny_task(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="elsewhere"):
        LoraNull(RANK, context=("elsewhere",)).adapt(tiny_task(tmp_path))


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_on_a_language_model(method: Any, tmp_path: Path) -> None:
    """Layers of the same ending and shared inputs: the ranks and the layers are the task's."""
    model = tiny_llama().requires_grad_(False)
    ids = [torch.randint(4, 20, (4, 32)) for _ in range(4)]
    layers = tuple(name for name, _ in model.named_modules() if name.endswith(("q_proj", "k_proj", "down_proj")))
    task = tiny_task(
        tmp_path,
        model=model,
        layers=layers,
        contexts={"first": [{"input_ids": row} for row in ids], TARGET: [{"input_ids": row} for row in ids]},
    )
    before = outputs(model, {"input_ids": ids[0]}).logits
    adapted = method.adapt(task)
    assert set(lora_layers(adapted.model)) == set(layers)
    torch.testing.assert_close(outputs(adapted.model, {"input_ids": ids[0]}).logits, before, rtol=0, atol=0)
