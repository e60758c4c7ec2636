"""ThanoRA (arXiv 2505.18640): several tasks share one LoRA, in which each has rank and subspace of its own.

At the start each layer's rank r is split over the tasks by the entropy of their spectra, and each task's block of A and B is made of the
first components of ``W C_t``. In training a penalty keeps the blocks apart. What comes out is one LoRA of rank r, trained on the mixture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from corda_core import AdapterInit, AdapterPlan, Mode, attach, lora_layers, plan
from corda_core.decompose import spectrum
from corda_core.linears import weight_matrix
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, NotNegative


@dataclass(frozen=True)
class Thanora:
    """Options of ThanoRA."""

    rank: Count
    """r, of all tasks together."""

    penalty: NotNegative = 0.1
    """Weight of ``overlap`` in the loss."""

    tasks: Sequence[str] = ()
    """The contexts that are learned, at least two; by default ``Task.learned``."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with one adapter whose blocks belong to the tasks; its outputs are what they were.

        Raises:
            ValueError: If there are fewer than two tasks, a task is no context of the setting, or a layer has fewer components than
                there are tasks.

        Note:
            The paper is read as follows where algorithms.md says no more than "split by entropy, kept apart by an orthogonality penalty":
            spectra and components are CorDA's, of ``W C_t`` with the damped second moment of the task's inputs, the largest ones as in
            IPM; the start is taken off again in offset form, so that training begins at the base.
        """
        names = tuple(self.tasks) or task.learned
        if len(set(names)) < 2:
            raise ValueError(
                f"ThanoRA got the tasks {list(names)}, and needs at least two that are learned at once; name them in `tasks`, or choose a "
                "setting that learns several."
            )
        covariances = [task.covariances(name) for name in names]
        weights = {layer: weight_matrix(task.model, layer) for layer in task.layers}
        ranks = {
            layer: split_rank([entropy(spectrum(W, of_task[layer])) for of_task in covariances], min(self.rank, *W.shape))
            for layer, W in weights.items()
        }
        plans = [
            plan(task.model, of_task, mode=Mode.IPM, rank=self.rank, ranks={layer: ranks[layer][number] for layer in task.layers})
            for number, of_task in enumerate(covariances)
        ]
        model = attach(task.model, joined(plans, self.rank))
        layers = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in lora_layers(model).items()}
        return Adapted(model, penalty=lambda: self.penalty * mean_overlap(layers, ranks))


def entropy(sigma: Tensor) -> float:
    """Return ``H = −Σ_j p_j log p_j`` in nats of a spectrum (k,), ``p = σ / Σ σ``: 0 for one component, log k for k equal ones."""
    return float(torch.special.entr(sigma / sigma.sum()).sum())


def split_rank(entropies: Sequence[float], rank: int) -> tuple[int, ...]:
    """Return each task's rank ``r_t ≈ r H_t / Σ H``: whole numbers of at least 1 that sum to r.

    Those left over by rounding down go to the largest remainders; of equal ones, to the task that comes first.

    Raises:
        ValueError: If r is smaller than the number of tasks.

    Note:
        Proportional, largest remainder and the least of 1 are our reading; the more complex task has the higher entropy and gets more.
    """
    if rank < len(entropies):
        raise ValueError(f"A rank of {rank} cannot be split over {len(entropies)} tasks; raise it, or leave such layers out.")
    total = sum(entropies)
    quotas = [rank * share / total if total else rank / len(entropies) for share in entropies]
    ranks = [1] * len(entropies)
    for _ in range(rank - len(entropies)):
        ranks[max(range(len(ranks)), key=lambda task: quotas[task] - ranks[task])] += 1
    return tuple(ranks)


def joined(plans: Sequence[AdapterPlan], rank: int) -> AdapterPlan:
    """Return one plan whose ``B0 = [B_1 … B_T]`` and ``A0 = [A_1; …; A_T]`` are those of plans of the same layers, side by side."""
    layers = {name: _joined([adapter.layers[name] for adapter in plans]) for name in plans[0].layers}
    return AdapterPlan(layers, plans[0].mode, rank, plans[0].provenance)


def overlap(A: Tensor, B: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return ``Σ_(s<t) (‖Â_s Â_tᵀ‖²_F + ‖B̂_sᵀ B̂_t‖²_F) / 2`` of a layer: how many dimensions the tasks' blocks share.

    Zero where the blocks of A (r, n) have orthogonal rows and those of B (m, r) orthogonal columns, whatever is inside a block.

    Note:
        Rows and columns are divided by their lengths (the hats), which is our reading: unnormalised, the penalty weighs the layers by the
        size of their weights, and is met by shrinking the blocks as well as by turning them apart.
    """
    blocks = (F.normalize(A, dim=1).split(tuple(ranks)), F.normalize(B.T, dim=1).split(tuple(ranks)))
    return sum(((first @ second.T).square().sum() / 2 for rows in blocks for first, second in combinations(rows, 2)), A.new_zeros(()))


def mean_overlap(layers: Mapping[str, tuple[Tensor, Tensor]], ranks: Mapping[str, Sequence[int]]) -> Tensor:
    """Return the mean over layers of ``overlap``, of their (A, B) and their tasks' ranks."""
    return torch.stack([overlap(A, B, ranks[name]) for name, (A, B) in layers.items()]).mean()


def _joined(inits: Sequence[AdapterInit]) -> AdapterInit:
    A0, B0 = torch.cat([init.A0 for init in inits]), torch.cat([init.B0 for init in inits], dim=1)
    sigma = torch.cat([init.sigma for init in inits])
    # Each block has the first components of its own W C_t; the slice is of no single one.
    return AdapterInit(A0, B0, sigma, slice(0, len(A0)), min(init.num_tokens for init in inits))
