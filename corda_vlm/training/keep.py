"""Hold a model to what it was while it trains: by its base's predictions on samples of the context, or by their own loss; to a budget.

``KeepCallback`` does it in any of transformers' Trainers, ``Keeper`` in other loops.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from corda_core.layers import num_processes, process_rank, sum_over_processes_
from corda_core.linears import base_of
from corda_core.lora import active_adapter, peft_layers, shrink_, squared_change, trained_tensors
from corda_vlm.context import collator_for, is_batch, own_processor
from corda_vlm.data.rows import Numbered
from corda_vlm.data.samples import Collator
from corda_vlm.options import Count, NotNegative, Options, Positive
from corda_vlm.towers import has_two_towers
from corda_vlm.training.budget import largest_alpha
from corda_vlm.training.divergence import NOTHING, Kind, context_kl, keep_loss, kept_sum, num_kept

HELD_OUT = 32
"""At most so many samples, and at most a quarter, are held out to measure the divergence on."""
AIM = 1.3
"""The divergence is steered to so much of the budget. What is above in the end is taken off, which costs little; what was held back too
much cannot be learned any more."""
WEAKEST, STRONGEST = 0.1, 30.0
"""Between which the weight follows the divergence. A stronger one is of no use: while the rate is high the noise of the steps itself keeps
the divergence up, and gradients are clipped."""


LEAST = 0.93
"""How much of the change is left at the least, a step, when it is gently taken back."""
SETTLED = 0.85
"""After so much of the training nothing is gently taken back any more: rates are small, and noise in the mean would cost gain."""
CEILING = 5.0
"""How much more than the aim a step may come to at all: what is above it is taken back at once, at rates that are too high for the rest."""
STEERED = ("weight", "smoothed", "sums")
"""What a Keeper has learned on the way, for checkpoints."""


@dataclass(frozen=True, kw_only=True)
class KeepOptions(Options):
    """How a training is held to what the model was."""

    kind: Kind = Kind.DISTILL
    """"distill": the divergence KL(base ‖ adapted) of the predictions on the samples; "replay": the samples' own loss."""

    weight: Positive = 1.0
    """What that loss is multiplied by beside the training's own; with a budget where the divergence is what it is steered to."""

    batch_size: Count | None = None
    """Samples at a time, over all processes; None takes half of the training's batch, for two towers all of it."""

    every: Count = 1
    """Steps from one such batch to the next; its weight is then multiplied by them."""

    budget: NotNegative | None = None
    """What may be forgotten: KL(base ‖ adapted) on held-out samples, in nats a token (two towers: a pair). The weight follows from it,
    some of the change is taken back while too much is forgotten, and in the end what is above it."""

    def __post_init__(self) -> None:
        """Refuse a budget in a loss that does not measure what it limits."""
        super().__post_init__()
        if self.budget is not None and self.kind is Kind.REPLAY:
            raise ValueError('budget limits the divergence from the base, but kind is "replay"; leave one of the two out.')


@dataclass(frozen=True)
class Keep(KeepOptions):
    """Samples of what a model is to keep, and how it is held to them: ``Keep(samples, budget=0.01)``."""

    samples: Any
    """As ``images_texts`` of ``corda_vlm.prepare``; ready batches count as one sample each."""


@dataclass(frozen=True)
class Kept:
    """What was kept in the end."""

    kl: float
    """KL(base ‖ adapted), nats a token (two towers: a pair), on these samples."""
    num_samples: int
    are_held_out: bool
    """Whether the training never used them."""
    alpha: float
    """How much of the trained change was left to be within the budget."""
    weight: float
    """Of the last step."""

    def __str__(self) -> str:
        """Return it in words."""
        samples = f"{self.num_samples} {'held-out ' if self.are_held_out else ''}sample(s)"
        return f"KL(base ‖ adapted) is {self.kl:.3g} nats on {samples}" + (
            f", with {self.alpha:.0%} of the change" if self.alpha < 1 else ""
        )


class Keeper:
    """What holds a training to the base: which samples come at which step, and with what weight.

    In a loop of your own add ``keeper.loss(step)`` to the loss of each optimiser step, counted from 0; with a budget call
    ``keeper.hold_()`` after each step, and ``keeper.finish_()`` at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Any],
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        options: KeepOptions,
        *,
        batch_size: int,
        num_steps: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Take what is trained and what it is held to.

        Args:
            model: With an adapter.
            samples: Of what is to be kept.
            collate: Makes inputs of the model of some samples.
            options: How; its own batch size comes first.
            batch_size: Samples at a time, over all processes.
            num_steps: Of the training.
            micro_batch_size: Samples in one forward pass of one process; None takes its whole share, as two towers want it, which tell
                each pair from the others.
            seed: Of the order of the samples.

        Raises:
            ValueError: If there are too few samples, they cannot be read, the batch cannot be shared out, the base is not there without
                the adapter, or something trains that a budget cannot take back.
        """
        count, world = len(samples), num_processes()
        least = 1 if options.budget is None else 2
        if count < least:
            raise ValueError(f"keep has {count} sample(s); expected at least {least}: give samples of what the model is to keep.")
        self.model, self.samples, self.collate, self.options, self.seed = model, samples, collate, options, seed
        self.batch_size = options.batch_size or batch_size
        share, rest = divmod(self.batch_size, world)
        if rest:
            raise ValueError(f"keep.batch_size is {self.batch_size} for {world} processes; expected a multiple of their number.")
        self.micro_batch_size = share if micro_batch_size is None else min(share, micro_batch_size)
        self.adapter_name = active_adapter(model)
        self.num_steps = num_steps
        self.memory = 1 - 1 / min(7.0, max(2.0, num_steps / (9 * options.every)))
        held = random.Random(f"held out {seed}").sample(range(count), max(1, min(HELD_OUT, count // 4)))
        self.measured = sorted(held)
        self.trained = sorted(set(range(count)) - set(held)) if options.budget is not None else list(range(count))
        self.weight = options.weight
        self.step = 0
        """The last one asked for."""
        self.last: float | None = None
        """The divergence on the last batch, of a replay its loss; over all processes."""
        self.smoothed = AIM * (options.budget or 0.0)
        """Its running mean over a ninth of the training, at most seven batches: that of few samples varies severalfold."""
        self.sums = [0.0, 0.0]
        """Running sums of the divergence and of the squared size of the change: near the base the one is quadratic in the other."""
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Refuse before the training what could not be kept: by a sample, and by what trains."""
        kind, count = self.options.kind, len(self.samples)
        if kind is Kind.REPLAY and has_two_towers(base_of(self.model)) and count < self.batch_size:
            raise ValueError(
                f"keep has {count} pair(s) for batches of {self.batch_size}, in which each is told from the others; give more."
            )
        batches = (self.collate([self.samples[place]]) for place in self.measured)
        batch = next((batch for batch in batches if num_kept(self.model, batch, kind)), None)
        if batch is None:
            raise ValueError(NOTHING)
        keep_loss(self.model, batch, kind=kind)
        known = {tensor for tensor, _ in trained_tensors(self.model, self.adapter_name)}
        known |= {layer.lora_A[self.adapter_name].weight for _, layer in peft_layers(self.model, self.adapter_name).values()}
        for name, parameter in self.model.named_parameters():
            if self.options.budget is not None and parameter.requires_grad and parameter not in known:
                raise ValueError(f"{name} trains, which a budget cannot take back to where it began; leave it, or the budget, out.")

    def loss(self, step: int) -> Tensor | None:
        """Return the weighted loss of an optimiser step, None where it has none.

        Raises:
            ValueError: If a sample cannot be read.
        """
        losses = list(self.losses(step))
        return torch.stack(losses).sum() if losses else None

    def losses(self, step: int) -> Iterator[Tensor]:
        """Yield ``loss`` in parts, one for each forward pass: take each one's gradient before asking for the next.

        Their gradients are to be averaged over processes, as DDP and FSDP do.

        Raises:
            ValueError: If a sample cannot be read.
        """
        self.step = step
        if step % self.options.every:
            return
        if self.options.budget is not None:
            self.weight = self.options.weight * min(STRONGEST, max(WEAKEST, self._excess))
        change = 0.0 if self.options.budget is None else squared_change(self.model, self.adapter_name)
        places = self._places(step // self.options.every)[process_rank() :: num_processes()]
        size = self.micro_batch_size
        parts = [places[start : start + size] for start in range(0, len(places), size)]
        batches = [self.collate([self.samples[place] for place in part]) for part in parts]
        counts = [num_kept(self.model, batch, self.options.kind) for batch in batches]
        sums = torch.tensor([0.0, sum(counts)], dtype=torch.float64)
        sum_over_processes_(sums)
        for batch, count in zip(batches, counts, strict=True):
            total_loss, measured = kept_sum(self.model, batch, self.options.kind, count)
            sums[0] += measured / max(1.0, float(sums[1]))
            yield self.weight * self.options.every * num_processes() / max(1.0, float(sums[1])) * total_loss
        total = sums[:1].clone()
        sum_over_processes_(total)
        self.last = float(total)
        self.smoothed = self.memory * self.smoothed + (1 - self.memory) * self.last
        self.sums = [self.memory * total + value for total, value in zip(self.sums, (self.last, change), strict=True)]

    def hold_(self) -> None:
        """Take back what is too much for the budget of the change that a step has made; to be called after each optimiser step.

        A little while the mean of the divergence is above the budget's aim; all at once what is far above it. For the latter nothing is
        measured: it follows from the size of the change. So the training goes on within reach of the budget at any rate, instead of being
        cut down to it in the end; the weight alone cannot do it where single steps go beyond.
        """
        if self.options.budget is None or not self.sums[1]:
            return
        alpha, limit = 1.0, CEILING * AIM * self.options.budget
        if self._excess > 1 and self.step < SETTLED * self.num_steps and self.step % self.options.every == 0:
            alpha = max(LEAST**self.options.every, self._excess**-0.3)
            self.smoothed *= alpha**2  # near the base the divergence is quadratic
        expected = self.sums[0] / self.sums[1] * squared_change(self.model, self.adapter_name)
        if alpha**2 * expected > limit:
            alpha = (limit / expected) ** 0.5
        if alpha < 1:
            shrink_(self.model, alpha, self.adapter_name)

    @property
    def _excess(self) -> float:
        """The divergence as a multiple of what it is steered to; 0 without a budget."""
        if self.options.budget is None:
            return 0.0
        return max(self.smoothed, 1e-12) / max(AIM * self.options.budget, 1e-12)

    def _places(self, number: int) -> list[int]:
        """Return which samples the batch of this number holds: all in one order, then in another; none twice where they are enough."""
        count, size = len(self.trained), self.batch_size
        if count < size:
            return [self.trained[place % count] for place in range(size)]
        round_, place = divmod(number, count // size)  # what is left over of a round, less than a batch, comes in others
        return [self.trained[place] for place in _order(count, self.seed, round_)[place * size : (place + 1) * size]]

    @torch.no_grad()
    def finish_(self) -> Kept | None:
        """Measure the divergence, and take the change back to where it is within the budget; None for a replay, which has none.

        Raises:
            ValueError: If a sample cannot be read.
        """
        if self.options.kind is Kind.REPLAY:
            return None
        shared = len(self.measured) % num_processes() == 0  # else each measures all: as many passes in each, and the same mean
        own, size = self.measured[process_rank() :: num_processes()] if shared else self.measured, self.micro_batch_size
        batches = [self.collate([self.samples[place] for place in own[start : start + size]]) for start in range(0, len(own), size)]
        if self.options.budget is None:
            return Kept(context_kl(self.model, batches), len(self.measured), False, 1.0, self.weight)
        trained = [(tensor, tensor.detach().clone()) for tensor, _ in trained_tensors(self.model, self.adapter_name)]

        def leave_(alpha: float) -> None:
            for tensor, value in trained:
                tensor.copy_(value)
            torch.clear_autocast_cache()  # which holds the weights of before, if this runs within one autocast context
            if alpha < 1:
                shrink_(self.model, alpha, self.adapter_name)

        def kl_at(alpha: float) -> float:
            leave_(alpha)
            return context_kl(self.model, batches)

        alpha, kl = largest_alpha(kl_at, self.options.budget)
        leave_(alpha)
        return Kept(kl, len(self.measured), True, alpha, self.weight)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, round_: int) -> list[int]:
    return random.Random(f"keep {seed} {round_}").sample(range(count), count)


class KeepCallback(TrainerCallback, ExportableState):
    """Holds what one of transformers' Trainers trains, or TRL's, to its base: ``callbacks=[KeepCallback(Keep(samples), processor)]``.

    Before each (k-th) step the gradient of the loss on the samples is put beside which the training's own is added; it is clipped with it.
    Logs gain ``keep_kl`` (or ``keep_loss``) and ``keep_weight``; after the training ``kept`` says what was kept.

    Note:
        Under DDP and FSDP2 too; not with DeepSpeed or fp16, whose own backward passes scale gradients.
    """

    def __init__(self, keep: Keep, processor: Any = None) -> None:
        """Take what is to be kept, and what reads its samples; None looks beside the model's own files on this disk."""
        self.keep, self.processor = keep, processor
        self.keeper: Keeper | None = None
        self.kept: Kept | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make ready, with the weight of the checkpoint that is resumed.

        Raises:
            ValueError: If the samples cannot be kept, or the Trainer scales gradients in a way of its own.
        """
        if args.fp16 or args.deepspeed:
            raise ValueError(
                "keep takes gradients of its own, which fp16 and DeepSpeed scale each in a way of theirs; train in bf16, with DDP or FSDP."
            )
        model = kwargs["model"]
        base, world = base_of(model), args.world_size
        share = args.train_batch_size * args.gradient_accumulation_steps
        samples, collate, are_batches = reading(base, self.keep, self.processor)
        self.keeper = Keeper(
            model,
            samples,
            collate,
            self.keep,
            batch_size=world if are_batches else world * default_batch_size(base, share),
            num_steps=max(1, state.max_steps),
            micro_batch_size=1 if are_batches else None if has_two_towers(base) else args.train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        recorded = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(recorded, Mapping):
            for name in STEERED:
                setattr(self.keeper, name, recorded["attributes"].get(name, getattr(self.keeper, name)))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the gradient of the loss on the samples."""
        for loss in self._keeper.losses(state.global_step):
            loss.backward()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take back what is too much for the budget."""
        self._keeper.hold_()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add what was measured to a log of the training."""
        if logs is not None and "loss" in logs and self.keeper is not None and self.keeper.last is not None:
            shown = {"keep_kl" if self.keep.kind is Kind.DISTILL else "keep_loss": self.keeper.last, "keep_weight": self.keeper.weight}
            logs |= shown
            state.log_history[-1] |= shown

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what was kept, within the budget."""
        self.kept = self._keeper.finish_()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        attributes = {} if self.keeper is None else {name: getattr(self.keeper, name) for name in STEERED}
        return {"args": {}, "attributes": attributes}

    @property
    def _keeper(self) -> Keeper:
        assert self.keeper is not None, "the Trainer calls on_train_begin first"
        return self.keeper


def default_batch_size(base: nn.Module, batch_size: int) -> int:
    """Return how many samples are kept at a time beside a training's batch: half of it, for two towers all."""
    return batch_size if has_two_towers(base) else -(-batch_size // 2)


def reading(base: nn.Module, keep: Keep, processor: Any) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]], bool]:
    """Return the samples of what is to be kept, what makes inputs of the model of some, and whether they are such inputs already.

    Raises:
        ValueError: If they are no samples, or no processor is known.
    """
    samples = keep.samples if hasattr(keep.samples, "__getitem__") else list(keep.samples)
    if len(samples) and is_batch(samples[0]):
        return samples, lambda batches: dict(batches[0]), True
    collate = collator_for(base, processor or own_processor(base))
    if keep.kind is Kind.REPLAY and isinstance(collate, Collator):
        collate = replace(collate, with_labels=True, whole_texts=True)
    return Numbered(samples, "keep"), collate, False
