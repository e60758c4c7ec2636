"""ThanoRA: the rank's split, the joined start, and the penalty that keeps the tasks' blocks apart."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from corda_core import change_factors, lora_layers, select_linears
from corda_core.decompose import spectrum
from corda_eval.study.methods import METHODS
from corda_eval.study.methods.thanora import Thanora, entropy, mean_overlap, overlap, split_rank
from corda_eval.study.task import TARGET, Batch, Task
from corda_eval.study.train import train


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


@pytest.fixture
def task(llama: LlamaForCausalLM, tmp_path: Path) -> Task:
    """Two tasks of random tokens, the second of only four different ones, and something to keep."""
    llama.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    samples = {
        name: [{"input_ids": torch.randint(low, high, (4, 16), generator=generator)} for _ in range(4)]
        for name, low, high in (("many", 4, 22), ("few", 10, 14), ("kept", 4, 22))
    }
    learned = [{"input_ids": torch.cat([item["input_ids"] for item in pair])} for pair in zip(samples["many"], samples["few"], strict=True)]
    return Task(
        model=llama,
        layers=select_linears(llama),
        loss=_loss,
        batches=learned * 5,
        contexts=samples | {TARGET: learned},
        validate=lambda model: float(_loss(model, learned[0]).detach()),
        measure=lambda model: {},
        cache=tmp_path,
        seed=0,
        learned=("many", "few"),
    )


def test_entropy_of_known_spectra() -> None:
    assert entropy(torch.ones(8).double()) == pytest.approx(math.log(8))
    assert entropy(torch.tensor([3.0, 0, 0]).double()) == 0
    assert entropy(torch.tensor([2.0, 1, 1]).double()) == pytest.approx(1.5 * math.log(2))
    assert entropy(7 * torch.tensor([2.0, 1, 1]).double()) == pytest.approx(1.5 * math.log(2))


def test_split_by_hand() -> None:
    # Quotas 10 · (3, 2, 1) / 6 = 5, 3.33, 1.67: rounded down 5, 3, 1, and the one left over goes to the remainder 0.67.
    assert split_rank([3.0, 2.0, 1.0], 10) == (5, 3, 2)
    assert split_rank([1.0, 1.0], 5) == (3, 2)
    assert split_rank([5.0, 0.0], 4) == (3, 1)
    assert split_rank([0.0, 0.0], 4) == (2, 2)
    with pytest.raises(ValueError, match="rank of 1 cannot be split over 2 tasks"):
        split_rank([1.0, 1.0], 1)


def test_split_sums_to_the_rank_and_follows_entropy() -> None:
    generator = random.Random(0)
    for _ in range(200):
        entropies = [generator.uniform(0, 6) for _ in range(generator.randint(2, 5))]
        rank = generator.randint(len(entropies), 40)
        ranks = split_rank(entropies, rank)
        assert sum(ranks) == rank
        assert min(ranks) >= 1
        by_entropy = [given for _, given in sorted(zip(entropies, ranks, strict=True))]
        assert by_entropy == sorted(by_entropy)


def test_overlap_of_known_blocks() -> None:
    A, B = torch.eye(6).double()[:4], torch.eye(5).double()[:, :4]
    assert overlap(A, B, (1, 3)) == 0
    assert overlap(3 * A, B, (2, 2)) == 0
    assert overlap(A[[0, 1, 0, 2]], B, (2, 2)) == pytest.approx(0.5)
    assert overlap(A[[0, 1, 0, 1]], 2 * B[:, [0, 1, 0, 1]], (2, 2)) == pytest.approx(2)
    assert overlap(A[[0, 1, 0, 1]], B, (2, 1, 1)) == pytest.approx(1)
    inside = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 2]]).double()
    assert overlap(inside, B, (2, 2)) == 0
    A, B = torch.randn(4, 6).double(), torch.randn(5, 4).double()
    unit_a, unit_b = A / A.norm(dim=1, keepdim=True), B / B.norm(dim=0)
    cosines = (unit_a[:1] @ unit_a[1:].T).square().sum() + (unit_b[:, :1].T @ unit_b[:, 1:]).square().sum()
    assert overlap(A, B, (1, 3)) == pytest.approx(float(cosines) / 2)


def test_start_is_the_base_and_blocks_are_each_tasks_first_components(task: Task) -> None:
    ids = task.batches[0]["input_ids"]
    before = task.model(ids).logits
    weights = {name: task.model.get_submodule(name).weight.detach().double().clone() for name in task.layers}
    adapted = Thanora(rank=6).adapt(task)
    assert torch.equal(adapted.model(ids).logits, before)
    covariances = [task.covariances(name) for name in task.learned]
    higher = 0
    for name, layer in lora_layers(adapted.model).items():
        W, A, B = weights[name], layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert layer.r["default"] == len(A) == 6
        split = split_rank([entropy(spectrum(W, of_task[name])) for of_task in covariances], 6)
        higher += split[0] > split[1]
        for of_task, rows, columns, rank in zip(covariances, A.split(split), B.split(split, dim=1), split, strict=True):
            C = of_task[name].damped(0.01).dense(torch.float64, torch.device("cpu"))
            U = torch.linalg.svd(W @ C).U[:, :rank]
            torch.testing.assert_close(columns @ rows, U @ U.T @ W, atol=1e-5, rtol=1e-4)
    assert higher > len(task.layers) / 2  # more different tokens, more components
    assert all(not change.any() for change in (B @ A for A, B in map(change_factors, lora_layers(adapted.model).values())))


def test_penalty_falls_in_training_and_the_loss_with_it(task: Task) -> None:
    torch.manual_seed(0)
    adapted = Thanora(rank=6, penalty=1.0).adapt(task)
    assert adapted.penalty is not None
    before = adapted.penalty().item()
    trained = train(adapted, task, 3e-3)
    assert 0 < adapted.penalty().item() < 0.5 * before
    assert trained.validation_losses[-1][1] < trained.validation_losses[0][1]


def test_without_weight_nothing_keeps_blocks_apart(task: Task) -> None:
    adapted = Thanora(rank=6, penalty=0.0).adapt(task)
    layers = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in lora_layers(adapted.model).items()}
    before = mean_overlap(layers, dict.fromkeys(layers, (3, 3))).item()
    train(adapted, task, 3e-3)
    assert adapted.penalty is not None
    assert adapted.penalty().item() == 0
    assert mean_overlap(layers, dict.fromkeys(layers, (3, 3))).item() > 0.5 * before


def test_refuses_one_task_and_unknown_ones(task: Task) -> None:
    with pytest.raises(ValueError, match="needs at least two"):
        Thanora(rank=4).adapt(replace(task, learned=()))
    with pytest.raises(ValueError, match="needs at least two"):
        Thanora(rank=4, tasks=("many", "many")).adapt(task)
    with pytest.raises(ValueError, match="elsewhere is not one of this setting's"):
        Thanora(rank=4, tasks=("many", "elsewhere")).adapt(task)
    assert METHODS["thanora"] is Thanora


def test_what_is_learned_is_not_kept(task: Task) -> None:
    assert task.default_context("kpm") == ("kept",)
    assert task.default_context("ipm") == (TARGET,)
    assert replace(task, learned=()).default_context("kpm") == ("many", "few", "kept")


def test_two_tasks_of_one_spectrum_share_all_they_start_from(task: Task) -> None:
    """Equal contexts give equal blocks: the penalty then counts every dimension of the smaller one."""
    same = replace(task, contexts={**task.contexts, "few": task.contexts["many"]})
    adapted = Thanora(rank=4, penalty=1.0).adapt(same)
    assert adapted.penalty is not None
    assert adapted.penalty().item() >= 2
