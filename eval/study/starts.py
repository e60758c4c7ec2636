"""Starting points that a method of the study computes itself, in the form that ``corda_core`` attaches."""

from collections.abc import Callable

import torch
from torch import Tensor

from corda_core import AdapterInit, AdapterPlan, Covariance, Mode
from corda_core.bases import base_digest
from corda_core.layers import no_progress, over_layers
from corda_eval.study.peft_lora import clipped_ranks
from corda_eval.study.task import Task


def even_context(n: int) -> Covariance:
    """Return C = I (n, n), of a context that uses all directions alike: components of ``W C`` are then those of W."""
    return Covariance.of(torch.eye(n), n)


def plan_from(task: Task, rank: int, start: Callable[[str, Tensor, int], tuple[Tensor, Tensor]]) -> AdapterPlan:
    """Return the plan of what a method gives each layer; ``attach`` takes it as one of ``corda_core.plan``.

    Args:
        task: Whose model and layers; only read.
        rank: r; clipped to min(m, n) where a layer is smaller.
        start: Returns A0 (r, n) and B0 (m, r) for a layer's name, W (m, n) in float64, and its rank.

    Raises:
        ValueError: If the rank is below 1, or the method refuses a layer (the text names it).

    Note:
        ``sigma`` and ``components``, which only describe, are those of ``B0 A0`` itself.
    """
    ranks = clipped_ranks(task.model, task.layers, rank)

    def init(name: str, weight: Tensor) -> AdapterInit:
        A0, B0 = start(name, weight.double(), ranks[name])
        sigma = torch.linalg.svdvals(torch.linalg.qr(B0.double()).R @ torch.linalg.qr(A0.double().T).R.T)
        return AdapterInit(A0.float().contiguous(), B0.float().contiguous(), sigma, slice(0, ranks[name]), num_tokens=0)

    layers = over_layers(task.model, task.layers, init, no_progress, "start")
    return AdapterPlan(layers, Mode.KPM, rank, {"base_digest": base_digest(task.model, layers)})
