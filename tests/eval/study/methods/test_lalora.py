"""LaLoRA's curvatures against dense Fisher matrices, and what its penalty does to a training."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import tiny_llama
from tiny_study import TALL, WIDE, outputs, squared_error, tiny_task
from torch import Tensor, nn

from corda_core import Covariance, change_factors, lora_layers
from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.lalora import Curvature, Kronecker, Lalora, adapter_weights, diagonal_fisher, kronecker_fisher
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.settings.shared import text_loss
from corda_eval.study.task import Batch, Task
from corda_eval.study.train import train

RANK = 2
Form = Literal["diagonal", "kfac", "tridiagonal"]
FORMS: list[Form] = ["diagonal", "kfac", "tridiagonal"]


def corda_model(task: Task) -> nn.Module:
    """Return the model from CorDA's start, where A and B both have gradients, with a scaling that must not be forgotten."""
    model = Corda(RANK).adapt(task).model
    for layer in lora_layers(model).values():
        layer.scaling["default"] = 2.0
    return model


def dense_fisher(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the mean over samples of ∂ℓ ∂ℓᵀ by layer, ∂ℓ the gradient by A's and B's entries in a row."""
    result: dict[str, list[Tensor]] = {}
    for batch in batches:
        for i in range(len(batch["x"])):
            loss = squared_error(model, {key: value[i : i + 1] for key, value in batch.items()})
            for name, layer in lora_layers(model).items():
                gradients = torch.autograd.grad(loss, adapter_weights(layer), retain_graph=True)
                result.setdefault(name, []).append(torch.cat([gradient.flatten() for gradient in gradients]))
    return {name: torch.stack(rows).T @ torch.stack(rows) / len(rows) for name, rows in result.items()}


def dense(curvature: Curvature, A: Tensor, B: Tensor) -> Tensor:
    """Return Λ as a matrix: half of the second derivatives of ``δᵀ Λ δ``."""

    def quadratic(flat: Tensor) -> Tensor:
        return curvature.quadratic(flat[: A.numel()].view_as(A), flat[A.numel() :].view_as(B))

    return torch.autograd.functional.hessian(quadratic, torch.zeros(A.numel() + B.numel(), dtype=A.dtype)) / 2


@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize("start", ["lora", "corda"])
def test_diagonal_is_that_of_the_dense_fisher(tmp_path: Path, tokens: int | None, start: str) -> None:
    task = tiny_task(tmp_path, tokens=tokens)
    model = corda_model(task) if start == "corda" else attach_variant(task, config_for(task, RANK))
    batches = [dict(task.contexts["first"][0]), {key: value[:3] for key, value in task.contexts["second"][0].items()}]
    expected = dense_fisher(model, batches)
    for name, result in diagonal_fisher(model, squared_error, batches).items():
        torch.testing.assert_close(torch.cat([result.of_A.flatten(), result.of_B.flatten()]), expected[name].diagonal())
        assert result.of_B.min() > 0
        assert (result.of_A == 0).all() if start == "lora" else (result.of_A > 0).all()


def test_kronecker_products_are_exact_for_one_sample(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    model = corda_model(task)
    sample = {key: value[:1] for key, value in task.contexts["first"][0].items()}
    x = sample["x"]
    inputs = {WIDE: x, TALL: outputs(lora_layers(model)[WIDE], {"x": x}).tanh()}
    covariances = {name: Covariance.of(rows.T @ rows, 1) for name, rows in inputs.items()}
    expected = dense_fisher(model, [sample])
    for coupled in (False, True):
        for name, result in kronecker_fisher(model, squared_error, [sample], covariances, coupled=coupled).items():
            A, B = adapter_weights(lora_layers(model)[name])
            Lambda, wanted = dense(result, A, B), expected[name].clone()
            if not coupled:
                wanted[: A.numel(), A.numel() :] = wanted[A.numel() :, : A.numel()] = 0
            torch.testing.assert_close(Lambda, wanted)


@pytest.mark.parametrize("tokens", [None, 5])
def test_kronecker_products_of_many_samples(tmp_path: Path, tokens: int | None) -> None:
    """Against matrices built entry by entry from gradients by hand: ``g = ŷ − y``, and through tanh for the first layer."""
    task = tiny_task(tmp_path, tokens=tokens)
    covariances, model = task.covariances("first"), corda_model(task)
    source = list(task.contexts["first"][:2])
    x, y = (torch.cat([batch[key] for batch in source]) for key in "xy")
    h, V = outputs(lora_layers(model)[WIDE], {"x": x}).tanh(), lora_layers(model)[TALL].get_base_layer().weight
    g_tall = (outputs(model, {"x": x}) - y) / (tokens or 1)
    by_hand = {WIDE: (g_tall @ V) * (1 - h**2), TALL: g_tall}
    for name, result in kronecker_fisher(model, squared_error, source, covariances, coupled=True).items():
        A, B = (weight.detach() for weight in adapter_weights(lora_layers(model)[name]))
        g, C = by_hand[name].flatten(0, -2), covariances[name].matrix.double()
        G = 4 * g.T @ g / len(x)  # the scaling, squared
        expected = torch.cat(
            [
                torch.cat([torch.kron(B.T @ G @ B, C), torch.kron(B.T @ G, C @ A.T)], 1),
                torch.cat([torch.kron(G @ B, A @ C), torch.kron(G, A @ C @ A.T)], 1),
            ]
        )
        Lambda = dense(result, A, B)
        torch.testing.assert_close(Lambda, expected)
        assert torch.linalg.eigvalsh(Lambda).min() > -1e-9 * Lambda.norm()
        change_A, change_B = torch.randn_like(A), torch.randn_like(B)
        change = B @ change_A + change_B @ A
        torch.testing.assert_close(result.quadratic(change_A, change_B), (G @ change @ C * change).sum())


@pytest.mark.parametrize("start", ["lora", "corda"])
@pytest.mark.parametrize("form", FORMS)
def test_penalty(tmp_path: Path, form: Form, start: Literal["lora", "corda"]) -> None:
    task = tiny_task(tmp_path)
    before = outputs(task.model, task.batches[0])
    adapted = Lalora(RANK, strength=3, curvature=form, start=start).adapt(task)
    assert adapted.penalty is not None
    torch.testing.assert_close(outputs(adapted.model, task.batches[0]), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in adapted.model.modules())
    parameters = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    value = adapted.penalty()
    assert value == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, parameters))
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn_like(parameter) / 10
    assert adapted.penalty() > 0
    # Derivatives by differences, along one direction.
    direction, step = [torch.randn_like(parameter) for parameter in parameters], 1e-4
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(adapted.penalty(), parameters), direction, strict=True))
    sides = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, part in zip(parameters, direction, strict=True):
                parameter += sign * step * part
            sides.append(adapted.penalty())
    torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("start", ["lora", "corda"])
@pytest.mark.parametrize("form", FORMS)
def test_a_larger_penalty_changes_less_of_what_is_kept(tmp_path: Path, form: Form, start: Literal["lora", "corda"]) -> None:
    moved = []
    for strength in (0, 100, 10000):
        task = tiny_task(tmp_path)
        context = {"x": torch.cat([batch["x"] for batch in task.contexts["first"]])}
        before = outputs(task.model, context)
        adapted = Lalora(RANK, strength=strength, curvature=form, start=start).adapt(task)
        trained = train(adapted, task, 1e-2)
        assert strength > 100 or trained.validation_losses[-1][1] < trained.validation_losses[0][1]
        moved.append(float((outputs(adapted.model, context) - before).norm()))
    assert moved[0] > 1.2 * moved[1] > 1.5 * moved[2]


def test_kfac_forms_agree_from_loras_start(tmp_path: Path) -> None:
    """At B₀ = 0 the block between A and B is zero."""
    penalties = []
    for form in FORMS[1:]:
        torch.manual_seed(0)
        adapted = Lalora(RANK, strength=1, curvature=form).adapt(tiny_task(tmp_path))
        assert adapted.penalty is not None
        with torch.no_grad():
            for parameter in adapted.model.parameters():
                parameter += 0.1 * parameter.requires_grad
        penalties.append(adapted.penalty())
    torch.testing.assert_close(*penalties)


def test_no_penalty_is_plain_lora(tmp_path: Path) -> None:
    changes = []
    for plain in (True, False):
        task = tiny_task(tmp_path)
        task.covariances("first", "second")
        torch.manual_seed(1)
        adapted = Lalora(RANK, strength=0).adapt(task)
        train(replace(adapted, penalty=None) if plain else adapted, task, 1e-2)
        changes.append(change_factors(lora_layers(adapted.model)[WIDE]))
    torch.testing.assert_close(changes[0], changes[1], rtol=0, atol=0)


def test_on_a_language_model(tmp_path: Path) -> None:
    model = tiny_llama().requires_grad_(False)
    layers = tuple(name for name, _ in model.named_modules() if name.endswith(("q_proj", "k_proj", "down_proj")))
    contexts = {"first": [{"input_ids": torch.randint(4, 20, (4, 16))} for _ in range(2)]}
    task = tiny_task(tmp_path, model=model, layers=layers, contexts=contexts, kept_loss=text_loss)
    adapted = Lalora(RANK, strength=1, curvature="kfac", start="corda").adapt(task)
    assert adapted.penalty is not None
    assert adapted.penalty() == 0
    assert next(adapted.model.parameters()).dtype == torch.float32
    result = kronecker_fisher(adapted.model, text_loss, contexts["first"], task_covariances(layers), coupled=False)
    shared = {id(result[name].inputs_A) for name in layers if "layers.0.self_attn" in name}
    assert all(isinstance(curvature, Kronecker) and curvature.gradients_B.norm() > 0 for curvature in result.values())
    assert len(shared) == 1  # q and k have the same inputs


def task_covariances(layers: tuple[str, ...]) -> dict[str, Covariance]:
    narrow, other = Covariance.of(torch.eye(32), 32), Covariance.of(torch.eye(48), 48)
    return {name: other if name.endswith("down_proj") else narrow for name in layers}


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    with pytest.raises(ValueError, match="Task.kept_loss is None"):
        Lalora(RANK, strength=1).adapt(replace(task, kept_loss=None))
    with pytest.raises(ValueError, match="curvature='full'"):
        Lalora(RANK, strength=1, curvature="full").adapt(task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength=-1"):
        Lalora(RANK, strength=-1).adapt(task)
    with pytest.raises(ValueError, match="elsewhere"):
        Lalora(RANK, strength=1, context=("elsewhere",)).adapt(task)
