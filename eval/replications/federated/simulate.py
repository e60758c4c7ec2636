"""The rounds themselves, clients in turn on one model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corda_core import lora_layers
from corda_eval.replications.federated.changes import Change, Changes, average_changes
from corda_eval.replications.federated.rules import Rule, Turn, cosine
from corda_eval.study.task import Batch
from corda_vlm import attach_lora


@dataclass(frozen=True)
class Client:
    """A participant and its data."""

    batches: Sequence[Sequence[Batch]]
    """What it trains on, by round."""
    validate: Callable[[nn.Module], float]
    """The loss on samples of its own that it does not train on."""


@dataclass(frozen=True)
class Federation:
    """A model and those who train it."""

    model: nn.Module
    """The base, all parameters frozen; it is changed in place."""
    layers: Sequence[str]
    loss: Callable[[nn.Module, Batch], Tensor]
    clients: Sequence[Client]


@dataclass(frozen=True)
class Round:
    """The result of a round. Losses are of each client on its own validation samples."""

    number: int
    served: list[float]
    """The server's model, after the round."""
    started: list[float]
    """Each client's model, before its first step of the round."""
    ended: list[float]
    """And after its last."""
    jump: float | None
    """Mean rise of a client's loss from the end of the last round to the start of this one; None in the first."""
    aggregation_error: float
    """Mean over layers of ``‖mean_c(B_c A_c) − B_s A_s‖_F / ‖mean_c(B_c A_c)‖_F``. Where the server merges, B_c A_c is a change since the
    last round, else (FedAvg) since the base, so that its error counts for less from round to round: compare rounds, not the two kinds."""


def federate(federation: Federation, rule: Rule, *, rank: int, rate: float, gradient_batches: int = 8) -> Iterator[Round]:
    """Train in as many rounds as the clients have batches for, and yield the result of each.

    Each client trains with an AdamW of its own, new in each round, gradients clipped to the norm 1, at a constant rate that falls from
    round to round by a cosine. After the last round the federation's model is the server's.

    Args:
        federation: The model, which LoRA of PEFT is put on, and the clients; all take part in each round.
        rule: The method.
        rank: r of each layer.
        rate: AdamW's learning rate in the first round.
        gradient_batches: How many of its batches of a round a client takes gradients of at the start, where the rule asks for them.

    Yields:
        The result of each round, once it is done.

    Raises:
        ValueError: If there is no client, or they have batches for different numbers of rounds.
    """
    rounds = {len(client.batches) for client in federation.clients}
    if len(rounds) != 1:
        raise ValueError(
            f"The {len(federation.clients)} clients have batches for {sorted(rounds)} rounds; expected the same number of all."
        )
    site, count = _Site(federation, rank), rounds.pop()
    served = site.factors()
    own = [served] * len(federation.clients)
    before: list[float] = []
    for number in range(count):
        started, ended = list[float](), list[float]()
        for place, client in enumerate(federation.clients):
            batches = client.batches[number]
            start = rule.start(Turn(number, count, own[place], served, partial(site.gradients, batches[:gradient_batches])))
            site.load(start.factors, start.removed)
            started.append(client.validate(site.model))
            site.train(batches, rate * cosine(number, count))
            ended.append(client.validate(site.model))
            own[place] = {name: rule.upload(trained, start.removed.get(name)) for name, trained in site.factors().items()}
        served = {name: rule.serve([changes[name] for changes in own]) for name in served}
        errors = [_relative_error(average_changes([changes[name] for changes in own]), change) for name, change in served.items()]
        site.serve(served, merge=rule.merges)
        jump = (sum(started) - sum(before)) / len(before) if before else None
        losses = [client.validate(site.model) for client in federation.clients]
        yield Round(number, losses, started, ended, jump, sum(errors) / len(errors))
        before = ended


def _relative_error(wanted: Change, got: Change) -> float:
    size = wanted.norm()
    return (wanted - got).norm() / size if size else 0.0


class _Site:
    """The one model of the process, which clients and server take turns on, and the server's weights W."""

    def __init__(self, federation: Federation, rank: int) -> None:
        self.loss = federation.loss
        self.model: nn.Module = attach_lora(federation.model, federation.layers, rank)
        layers = lora_layers(self.model)
        self.bases: dict[str, Any] = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        self.downs = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
        self.ups = {name: layer.lora_B["default"].weight for name, layer in layers.items()}
        self.weights = {name: base.detach().clone() for name, base in self.bases.items()}

    def factors(self) -> Changes:
        """Return copies of what LoRA has in it."""
        return {name: Change(self.downs[name].detach().clone(), self.ups[name].detach().clone()) for name in self.weights}

    def no_change(self) -> Changes:
        """Return A as it is and B = 0."""
        return {name: 0.0 * change for name, change in self.factors().items()}

    @torch.no_grad()
    def load(self, factors: Changes, removed: Changes) -> None:
        """Let the model compute with ``W − removed + B A``."""
        for name, weight in self.weights.items():
            self.bases[name].copy_(weight - removed[name].dense() if name in removed else weight)
            self.downs[name].copy_(factors[name].A)
            self.ups[name].copy_(factors[name].B)

    def gradients(self, batches: Sequence[Batch], added: Changes) -> dict[str, Tensor]:
        """Return the mean gradients of the weights over batches at ``W + added``."""
        self.load(self.no_change(), {name: -1 * change for name, change in added.items()})
        tensors = [base.requires_grad_() for base in self.bases.values()]
        self.model.train()
        total = [torch.zeros_like(tensor) for tensor in tensors]
        for batch in batches:
            for total_, gradient in zip(total, torch.autograd.grad(self.loss(self.model, batch), tensors), strict=True):
                total_ += gradient / len(batches)
        for tensor in tensors:
            tensor.requires_grad_(False)
        return dict(zip(self.bases, total, strict=True))

    def train(self, batches: Sequence[Batch], rate: float) -> None:
        """Train LoRA's factors on each batch once."""
        trained = [*self.downs.values(), *self.ups.values()]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self.model.train()
        for batch in batches:
            optimizer.zero_grad()
            self.loss(self.model, batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    @torch.no_grad()
    def serve(self, served: Changes, *, merge: bool) -> None:
        """Let the model be the server's: with ``B_s A_s`` added to W for good, or in LoRA's factors."""
        if merge:
            for name, weight in self.weights.items():
                weight += served[name].dense()
            served = self.no_change()
        self.load(served, {})
