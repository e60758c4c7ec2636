"""A task for studies in float64: two layers of different shapes that learn one linear map and are to keep another's outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_eval.study.task import TARGET, Batch, Score, Task

WIDE, TALL = "wide", "tall"
"""Layers (8, 12) and (10, 8)."""


class TwoLayers(nn.Module):
    """``tall(tanh(wide(x)))`` of inputs (b, 12) or (b, t, 12); only the first has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 8)
        self.tall = nn.Linear(8, 10, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.tall(self.wide(x).tanh())


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return half the squared error, summed over outputs, the mean over all else."""
    return (model(**batch) - batch["y"]).square().sum(-1).mean() / 2


def tiny_task(cache: Path, *, tokens: int | None = None, **changes: Any) -> Task:
    """Return the task: contexts "first" and "second" are to be kept, of 8 samples a batch, each of ``tokens`` inputs or one."""
    torch.manual_seed(0)
    model = TwoLayers().double().requires_grad_(False).eval()
    shape = (8,) if tokens is None else (8, tokens)

    def draw(scale: Tensor) -> Batch:
        return {"x": torch.randn(*shape, 12, dtype=torch.float64) * scale, "y": torch.randn(*shape, 10, dtype=torch.float64)}

    # Some directions are hardly used by what is to be kept, others hardly by what is learned.
    kept, learned = torch.logspace(0, -2, 12, dtype=torch.float64), torch.logspace(-1, 0, 12, dtype=torch.float64)
    task = Task(
        model=model,
        layers=(WIDE, TALL),
        loss=squared_error,
        batches=[draw(learned) for _ in range(20)],
        contexts={
            "first": [draw(kept) for _ in range(3)],
            "second": [draw(kept) for _ in range(3)],
            TARGET: [draw(learned) for _ in range(3)],
        },
        validate=lambda adapted: squared_error(adapted, task.batches[0]).item(),
        measure=lambda _: {TARGET: Score(None)},
        cache=cache,
        seed=0,
        kept_loss=squared_error,
    )
    return replace(task, **changes)


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's outputs without gradients."""
    with torch.no_grad():
        return model(**batch)
