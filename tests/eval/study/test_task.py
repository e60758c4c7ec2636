"""A task's covariances are those of the untouched base, taken once; the size of a change is that of dense algebra in float64."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import corda_eval.study.task as study_task
from corda_core import Covariance, attach, collect, merge, plan
from corda_eval.study.change import effective_weight, interpolated, linear_copies, relative_changes
from corda_eval.study.task import TARGET, Score, Task
from corda_vlm import attach_lora


class TwoWays(nn.Module):
    """Reads ``x`` by two layers, and ``image`` by one more before these."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        return self.second(torch.tanh(self.first(self.eye(image) if x is None else x)))


def task_of(cache: Path, model: nn.Module | None = None, layers: tuple[str, ...] = ("eye", "first", "second")) -> Task:
    torch.manual_seed(0)
    model = (TwoWays() if model is None else model).eval().requires_grad_(False)
    contexts = {
        "text": [{"x": torch.randn(7, 6)}, {"x": torch.randn(9, 6)}],
        "pictures": [{"image": torch.randn(20, 5)}],
        TARGET: [{"image": torch.randn(11, 5)}],
    }
    return Task(
        model=model,
        layers=layers,
        loss=lambda model, batch: model(**batch).square().mean(),
        batches=contexts[TARGET],
        contexts=contexts,
        validate=lambda model: 0.0,
        measure=lambda model: {TARGET: Score(0.0)},
        cache=cache,
        seed=0,
    )


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often covariances are collected."""
    counts: Counter[str] = Counter()

    def counted(*args: object) -> dict[str, Covariance]:
        counts["collected"] += 1
        return collect(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(study_task, "collect", counted)
    return counts


def test_covariances_are_the_second_moments_of_several_domains_together(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    result = task.covariances("text", "pictures")
    images = task.contexts["pictures"][0]["image"].double()
    eye = task.model.get_submodule("eye").double()
    rows = torch.cat([*(batch["x"].double() for batch in task.contexts["text"]), eye(images)])
    torch.testing.assert_close(result["eye"].matrix.double(), images.T @ images / 20, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["first"].matrix.double(), rows.T @ rows / 36, rtol=1e-5, atol=1e-6)
    assert result["first"].num_tokens == 36


def test_the_first_batches_of_each_domain_are_a_context_of_their_own(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    whole, part = task.covariances("text", "pictures"), task.covariances("text", "pictures", first=1)
    x, images = task.contexts["text"][0]["x"].double(), task.contexts["pictures"][0]["image"].double()
    rows = torch.cat([x, task.model.get_submodule("eye").double()(images)])
    torch.testing.assert_close(part["first"].matrix.double(), rows.T @ rows / 27, rtol=1e-5, atol=1e-6)
    assert (part["first"].num_tokens, whole["first"].num_tokens) == (27, 36)
    with pytest.raises(ValueError, match="A context of 0 batches of each domain is empty; expected at least 1"):
        task.covariances("text", "pictures", first=0)


def test_a_second_call_reads_the_file(tmp_path: Path, collections: Counter[str]) -> None:
    first = task_of(tmp_path).covariances("pictures")
    again = task_of(tmp_path).covariances("pictures")
    assert collections["collected"] == 1
    assert all(torch.equal(first[name].matrix, again[name].matrix) for name in first)


def test_other_data_and_other_layers_are_collected_anew(tmp_path: Path, collections: Counter[str]) -> None:
    task = task_of(tmp_path)
    task.covariances("pictures")
    other = replace(task, contexts={"pictures": [{"image": torch.ones(3, 5)}]})
    assert other.covariances("pictures")["eye"].num_tokens == 3
    assert list(replace(task, layers=("second",)).covariances("pictures")) == ["second"]
    assert collections["collected"] == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_another_base_is_collected_anew(tmp_path: Path, collections: Counter[str]) -> None:
    first = task_of(tmp_path).covariances("pictures")
    other = task_of(tmp_path)
    other.model.get_submodule("first").weight.data += 1
    assert not torch.equal(other.covariances("pictures")["second"].matrix, first["second"].matrix)
    assert torch.equal(task_of(tmp_path).covariances("pictures")["second"].matrix, first["second"].matrix)
    assert collections["collected"] == 2


def test_an_adapted_model_is_not_collected_on_but_reads_what_is_there(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    before = task.covariances("pictures")
    attach_lora(task.model, task.layers, 2)
    assert torch.equal(task.covariances("pictures")["second"].matrix, before["second"].matrix)
    with pytest.raises(ValueError, match="eye carries an adapter, but covariances are those of the base; ask for them before"):
        task.covariances(TARGET)


@pytest.mark.parametrize(
    ("asked", "said"), [(("text", "tekst"), "The context tekst is not one of"), ((), "A method names no context; expected some of")]
)
def test_an_unknown_domain_is_named(tmp_path: Path, asked: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} this setting's: text, pictures, target"):
        task_of(tmp_path).covariances(*asked)


def test_a_domain_that_does_not_reach_all_layers_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The context text does not do for all 3 layers: eye .*several may be taken together"):
        task_of(tmp_path).covariances("text")
    assert not list(tmp_path.iterdir())


def test_kpm_takes_all_that_is_kept_and_ipm_what_is_learned(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    assert task.default_context("kpm") == ("text", "pictures")
    assert task.default_context("ipm") == (TARGET,)


def lora(model: nn.Module, task: Task) -> nn.Module:
    adapted = attach_lora(model, task.layers, 2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def corda(model: nn.Module, task: Task) -> nn.Module:
    adapted = attach(model, plan(model, task.covariances("pictures"), mode="kpm", rank=2))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted


ADAPTERS: dict[str, Callable[[nn.Module, Task], nn.Module]] = {"lora": lora, "corda": corda}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_effective_weight_is_that_of_the_merged_layer(tmp_path: Path, kind: str) -> None:
    task = task_of(tmp_path)
    adapted = ADAPTERS[kind](task.model, task)
    result = {name: effective_weight(adapted, name, copy.in_features) for name, copy in linear_copies(task.model, task.layers).items()}
    merged = merge(adapted) if kind == "corda" else adapted.merge_and_unload()  # type: ignore[operator]
    for name, weight in result.items():
        torch.testing.assert_close(weight, merged.get_submodule(name).weight)
        torch.testing.assert_close(effective_weight(merged, name, weight.shape[1]), weight)


def test_copies_are_not_reached_by_changes(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    copies = linear_copies(task.model, task.layers)
    before = {name: copy.weight.clone() for name, copy in copies.items()}
    for parameter in task.model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(copies[name].weight, weight) for name, weight in before.items())
    assert copies["second"].bias is None
    assert bool(copies["first"].bias.any())


def test_interpolation_ends_at_base_and_adapted_exactly(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    images = torch.randn(4, 5)
    copies, base = linear_copies(task.model, task.layers), task.model(image=images)
    adapted = lora(task.model, task)
    tuned = adapted(image=images)
    assert not torch.allclose(base, tuned)
    for alpha, wanted in ((0.0, base), (1.0, tuned)):
        with interpolated(adapted, copies, alpha):
            assert torch.equal(adapted(image=images), wanted)
    assert torch.equal(adapted(image=images), tuned)


def test_interpolation_is_that_of_the_weights(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    images = torch.randn(4, 5)
    copies = linear_copies(task.model, task.layers)
    adapted = lora(task.model, task)
    mixed = TwoWays()
    mixed.load_state_dict({f"{name}.{key}": value for name, copy in copies.items() for key, value in copy.state_dict().items()})
    for name, copy in copies.items():
        mixed.get_submodule(name).weight.data = 0.7 * copy.weight + 0.3 * effective_weight(adapted, name, copy.in_features)
    with interpolated(adapted, copies, 0.3):
        torch.testing.assert_close(adapted(image=images), mixed(image=images))


def test_hooks_of_an_interpolation_are_gone_after_an_error(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    copies = linear_copies(task.model, task.layers)
    with pytest.raises(KeyError), interpolated(task.model, copies, 0.5):
        raise KeyError
    assert not any(module._forward_hooks for module in task.model.modules())


def test_relative_changes_are_those_of_dense_float64(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    copies, covariances = linear_copies(task.model, task.layers), task.covariances("text", "pictures")
    adapted = lora(task.model, task)
    on_context, plain = [], []
    for name, copy in copies.items():
        W, C = copy.weight.double(), covariances[name].matrix.double()
        change = effective_weight(adapted, name, copy.in_features).double() - W
        values, vectors = torch.linalg.eigh(C)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        on_context.append((change @ root).norm() / (W @ root).norm())
        plain.append(change.norm() / W.norm())
    result = relative_changes(adapted, copies, covariances)
    assert result == pytest.approx((float(torch.stack(on_context).mean()), float(torch.stack(plain).mean())), rel=1e-5)


def test_a_change_that_avoids_the_context_is_no_change_on_it() -> None:
    """In float32 the energy of such a change comes out a little below zero for one in two."""
    for seed in range(8):
        torch.manual_seed(seed)
        layer = nn.Linear(64, 32).requires_grad_(False)
        model = nn.Sequential(layer)
        copies = linear_copies(model, ["0"])
        rows = torch.randn(16, 64)
        outside = torch.eye(64) - torch.linalg.pinv(rows) @ rows
        layer.weight += torch.randn(32, 64) @ outside
        on_context, plain = relative_changes(model, copies, {"0": Covariance.of(rows.T @ rows / 16, 16)})
        assert on_context == pytest.approx(0, abs=2e-3)
        assert plain > 1


def test_an_untouched_model_has_not_changed(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    result = relative_changes(task.model, linear_copies(task.model, task.layers), task.covariances("pictures"))
    assert result == pytest.approx((0, 0), abs=1e-6)
