"""CorDA (arXiv 2406.05223) and CorDA++ (2506.13187): the package's own ``plan`` and ``attach``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corda_core import Covariance, allocate, attach, choose, plan
from corda_core.allocate import budget_of_rank
from corda_core.decompose import Mode, Split
from corda_core.linears import weight_shape
from corda_core.lora import Protect
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Corda:
    """Options of CorDA; see ``corda_core.plan`` and ``attach``."""

    rank: Count
    mode: Mode = Mode.KPM
    protect: Protect = Protect.START
    split: Split = Split.BALANCED
    context: Sequence[str] = ()
    """Domains that the covariances are taken from, together; by default all that is kept (KPM), what is learned (IPM)."""

    context_batches: Count | None = None
    """Take only so many batches of each domain; None takes all."""

    draws: Count = 1
    """CorDA++: each layer takes the one that suits it best of so many draws of ``context_batches`` of each domain."""

    allocated: bool = False
    """CorDA++: each layer takes a rank of the budget that ``rank`` everywhere would cost."""

    candidates: Sequence[Sequence[str]] = ()
    """Sets of domains in place of draws, and a rank of the budget."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with the adapter on the task's layers.

        Raises:
            ValueError: If both ``context`` and ``candidates`` are given, or several draws of all that there is.
        """
        if self.context and self.candidates:
            raise ValueError("CorDA got both context and candidates, which are contexts themselves; leave one of the two out.")
        if self.draws > 1 and (self.candidates or self.context_batches is None):
            raise ValueError("CorDA draws several times only without candidates and with context_batches, the size of a draw; give that.")
        whiten = self.protect is Protect.WHITENED
        sets = self.candidates or [self.context or task.default_context(self.mode)] * self.draws
        draws = [0] * len(sets) if self.candidates else range(self.draws)
        collections = (task.covariances(*domains, first=self.context_batches, draw=draw) for domains, draw in zip(sets, draws, strict=True))
        covariances: Mapping[str, Covariance]
        if len(sets) > 1 or self.allocated or self.candidates:
            covariances, choices = choose(task.model, collections, in_full=True)
        else:
            (covariances,) = collections
        ranks = None
        if self.allocated or self.candidates:
            budget = budget_of_rank((weight_shape(task.model, name) for name in task.layers), self.rank)
            ranks = allocate(task.model, choices, budget, self.mode)
        adapter_plan = plan(task.model, covariances, mode=self.mode, rank=self.rank, ranks=ranks, split=self.split, whiten=whiten)
        return Adapted(attach(task.model, adapter_plan, protect=self.protect))
