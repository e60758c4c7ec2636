"""An adapter beside which a context is kept: ``corda_vlm.training.keep``, by the KL to the base or by the context's own loss, to a budget.

The context's samples are those that covariances are taken from, drawn one by one; its loss is added to that of what is learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from corda_eval.study.methods.corda import Corda
from corda_eval.study.methods.lora import Lora
from corda_eval.study.named import options_of
from corda_eval.study.task import Adapted, Batch, Method, Task
from corda_vlm.options import Count, NotNegative, Positive
from corda_vlm.training.divergence import Kind
from corda_vlm.training.keep import Keeper, KeepOptions

ADAPTERS: dict[str, type[Method]] = {"corda": Corda, "lora": Lora}
"""What can be trained so, by the name that stands in a study's config."""


@dataclass(frozen=True)
class Keep:
    """Options of keeping; see ``corda_vlm.training.keep.KeepOptions``."""

    adapter: Mapping[str, Any]
    """What trains: ``method`` and its options."""

    loss: Literal["distill", "replay"] = "distill"
    weight: Positive = 1.0
    every: Count = 1
    batch_size: Count | None = None
    """Samples of the context a step: None is half as many as are trained on, at least 2; of two towers, which tell pairs apart, as many."""
    budget: NotNegative | None = None
    """Nats of KL to the base on held-out samples of the context."""
    context: Sequence[str] = ()
    """Domains whose samples are kept, by default all that is to be kept; "self" is what the base wrote."""

    def adapt(self, task: Task) -> Adapted:
        """Return the adapter with the context's loss as penalty, and what takes off a budget's excess at the end.

        Raises:
            ValueError: If an option is not right, or the setting lacks a domain.
        """
        domains = self.context or task.default_context("kpm")
        samples = [sample for domain in domains for batch in task.samples(domain) for sample in samples_of(batch)]
        adapted: Adapted = options_of(self.adapter, "method", ADAPTERS, "adapter").adapt(task)
        trained = len(next(iter(task.batches[0].values())))
        size = self.batch_size or (trained if task.pairs else max(2, trained // 2))
        options = KeepOptions(kind=Kind(self.loss), weight=self.weight, batch_size=size, every=self.every, budget=self.budget)
        keeper = Keeper(adapted.model, samples, joined, options, batch_size=size, num_steps=len(task.batches), seed=task.seed)
        steps = count()

        def penalty() -> Tensor | None:
            with task.casting():
                return keeper.loss(next(steps))

        def finish() -> dict[str, float]:
            with task.casting():
                kept = keeper.finish_()
            return {} if kept is None else numbers_of(asdict(kept))

        return replace(adapted, penalty=penalty, after_step=keeper.hold_, finish=finish)


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what of these is a number."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def samples_of(batch: Batch) -> list[Batch]:
    """Return the samples of a batch, each as a batch of itself."""
    sizes = {len(value) for value in batch.values()}
    if len(sizes) != 1:
        raise ValueError(f"The inputs of a context differ in how many samples they have: {sorted(sizes)}; expected one number.")
    return [{name: value[place : place + 1] for name, value in batch.items()} for place in range(sizes.pop())]


def joined(samples: Sequence[Batch]) -> dict[str, Tensor]:
    """Return samples as one batch: texts of several lengths padded on the left, with an ``attention_mask``; all pictures."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch = {name: [sample[name] for sample in samples if name in sample] for name in names}
    lengths = [ids.shape[1] for ids in batch.get("input_ids", [])]
    if len(set(lengths)) > 1:
        batch["attention_mask"] = [torch.ones_like(ids) for ids in batch["input_ids"]]
        for name in ("input_ids", "attention_mask"):
            batch[name] = [F.pad(row, (max(lengths) - row.shape[1], 0)) for row in batch[name]]
    return {name: torch.cat(values) for name, values in batch.items()}
