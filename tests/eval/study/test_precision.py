"""Frozen weights cast once for a whole training: the same numbers, bit for bit, and the weights as they were afterwards."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corda_eval.study import train as training
from corda_eval.study.methods.lora import Lora
from corda_eval.study.precision import cast_once
from corda_eval.study.settings.shared import casting
from corda_eval.study.task import TARGET, Adapted, Batch, Score, Task


class Tied(nn.Module):
    """Tokens in, logits out: an embedding, two linear layers, and the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.short, self.long = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        for parameter in (self.embed.weight, self.short.weight):
            parameter.data = parameter.data.bfloat16().float()
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.long(F.relu(self.short(self.embed(ids)))))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    with casting():
        return F.cross_entropy(model(batch["ids"]).float(), batch["ids"].flip(0))


def adapted(tmp_path: Path) -> tuple[Adapted, Task]:
    """Return a LoRA on the task of reading tokens backwards."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"ids": torch.randint(11, (12,), generator=generator)} for _ in range(12)]
    task = Task(
        model=Tied().requires_grad_(False).eval(),
        layers=("short", "long"),
        loss=loss_of,
        batches=batches,
        contexts={TARGET: batches},
        validate=lambda model: loss_of(model, batches[0]).item(),
        measure=lambda _: {TARGET: Score(None)},
        cache=tmp_path,
        seed=0,
        casting=casting,
    )
    torch.manual_seed(2)
    return Lora(rank=4).adapt(task), task


def test_a_training_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = training.train(*adapted(tmp_path), rate=1e-2)
    monkeypatch.setattr(training, "cast_once", lambda model, casting: nullcontext())
    each_time = training.train(*adapted(tmp_path), rate=1e-2)
    assert once.training_losses == each_time.training_losses
    assert once.validation_losses == each_time.validation_losses
    assert once.training_losses[-1] != once.training_losses[0]


def test_holds_what_the_shorter_type_holds_exactly_and_gives_it_back() -> None:
    model = Tied().requires_grad_(False)
    model.long.requires_grad_(True)
    weights = dict(model.named_parameters(remove_duplicate=False))
    values = {name: weight.clone() for name, weight in weights.items()}
    with cast_once(model, casting):
        assert model.short.weight.dtype is model.head.weight.dtype is torch.bfloat16
        assert model.long.weight.dtype is model.embed.weight.dtype is torch.float32
        with cast_once(model, casting):
            pass
        assert model.short.weight.dtype is torch.bfloat16
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is weight and torch.equal(weight, values[name]) for name, weight in weights.items())
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("trains", [True, False])
def test_leaves_alone_what_trains_or_would_be_rounded(trains: bool) -> None:
    model = Tied().requires_grad_(trains)
    with cast_once(model, casting):
        assert model.long.weight.dtype is torch.float32


def test_does_nothing_without_casting() -> None:
    model = Tied().requires_grad_(False)
    with cast_once(model, nullcontext):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gives_the_weights_back_after_an_error() -> None:
    model = Tied().requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), cast_once(model, casting):
        raise RuntimeError("stop")
    assert model.short.weight.dtype is torch.float32
