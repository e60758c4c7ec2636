"""What makes a federated method: where a client starts, what it sends, what the server makes of that."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from corda_eval.replications.federated.changes import Change, Changes, aligned, average_changes, average_factors, truncated


@dataclass(frozen=True)
class Turn:
    """What a client knows as its round begins."""

    number: int
    rounds: int
    own: Changes
    """``B_c A_c``, its change in the last round; before the first, ``B A`` with A Kaiming and B = 0."""
    served: Changes
    """``B_s A_s``, the server's; as above before the first."""
    gradients: Callable[[Changes], dict[str, Tensor]]
    """The loss's gradients (m, n) on the client's data, at the server's weights plus a change."""


@dataclass(frozen=True)
class Start:
    """Where a client's training starts: at ``W − removed + B A``, of which A and B train."""

    factors: Changes
    removed: Changes = field(default_factory=dict)


class Rule(Protocol):
    """What makes a federated method: a client's start, what it sends, and what the server makes of that."""

    merges: ClassVar[bool]
    """Whether the server adds ``B_s A_s`` to W for good, and LoRA starts anew."""

    def start(self, turn: Turn) -> Start:
        """Return where a client starts."""
        ...

    def upload(self, trained: Change, removed: Change | None) -> Change:
        """Return a layer's ``B_c A_c``, the change against W that a client sends: the factors as they are."""
        return trained

    def serve(self, uploads: Sequence[Change]) -> Change:
        """Return a layer's ``B_s A_s``."""
        ...


def cosine(number: int, rounds: int) -> float:
    """Return ``(1 + cos(π t / T)) / 2``: 1 in round 0, towards 0 in the last."""
    return (1 + math.cos(math.pi * number / rounds)) / 2


@dataclass(frozen=True)
class FedAvg(Rule):
    """FedAvg on LoRA's A and B; the base stays, all clients start from the server's factors."""

    merges: ClassVar[bool] = False

    def start(self, turn: Turn) -> Start:
        """Return the server's factors."""
        return Start(turn.served)

    def serve(self, uploads: Sequence[Change]) -> Change:
        """Return ``average_factors``."""
        return average_factors(uploads)


@dataclass(frozen=True)
class FullRank(Rule):
    """FedAvg of ``B_c A_c`` at full rank, merged each round: exact, what a server of rank r can at best come near to."""

    seed: int = 0
    """Of the rounds' starts."""

    merges: ClassVar[bool] = True

    def start(self, turn: Turn) -> Start:
        """Return a new LoRA, the same for all clients: A Kaiming, B = 0."""
        generator = torch.Generator().manual_seed(1000 * self.seed + turn.number)
        return Start(
            {
                name: Change(nn.init.kaiming_uniform_(own.A.clone(), a=math.sqrt(5), generator=generator), torch.zeros_like(own.B))
                for name, own in turn.own.items()
            }
        )

    def serve(self, uploads: Sequence[Change]) -> Change:
        """Return ``average_changes``."""
        return average_changes(uploads)


@dataclass(frozen=True)
class FedSmooth(Rule):
    """FedSmoothLoRA: ``W_init,c = Ŵ_ga,c + ζ (B_c A_c − B_s A_s)`` of the last round, truncated to rank r, on the base ``W − Ŵ_ga,c``.

    So, apart from the truncation, a client resumes at ``W + ζ (B_c A_c − B_s A_s)``; with ζ = 1 where it stopped, as W has the
    B_s A_s of the last round in it. Ŵ_ga,c is ``aligned`` to the gradient there. Sent is ``SVD_r(B A − Ŵ_ga,c)``, served is ``SVD_r`` of
    the mean.

    Note:
        From the authors' code: the truncations, and that the gradient is taken at the start. With ζ = 1 throughout, and r large enough,
        no client's start holds anything of the others' work: each trains on alone, and the server's W is the mean of them all. With a small
        r the truncation is what limits how smooth it is: the r equal singular values of Ŵ_ga, √(m / γ²), crowd out what is to be matched
        where that is smaller; a larger γ leaves more room.
    """

    merges: ClassVar[bool] = True
    zeta: float = 1.0
    """ζ in the first round."""
    min_zeta: float = 0.5
    """ζ falls by a cosine to this in the end; as ``zeta`` for the paper's "constant", which is for clients of one distribution."""
    gamma: float = 64.0
    """γ: the smaller, the larger Ŵ_ga."""

    def start(self, turn: Turn) -> Start:
        """Return the round-matched, gradient-aligned start."""
        zeta = self.min_zeta + (self.zeta - self.min_zeta) * cosine(turn.number, turn.rounds)
        matched = {name: zeta * (own - turn.served[name]) for name, own in turn.own.items()}
        gradients = turn.gradients(matched)
        ranks = {name: len(own.A) for name, own in turn.own.items()}
        towards = {name: aligned(gradients[name], rank, self.gamma) for name, rank in ranks.items()}
        return Start({name: _matched_start(towards[name], matched[name], rank) for name, rank in ranks.items()}, removed=towards)

    def upload(self, trained: Change, removed: Change | None) -> Change:
        """Return ``SVD_r(B A − Ŵ_ga)``."""
        assert removed is not None, "start gives it"
        return truncated(trained - removed, len(trained.A))

    def serve(self, uploads: Sequence[Change]) -> Change:
        """Return ``SVD_r`` of ``average_changes``."""
        return truncated(average_changes(uploads), len(uploads[0].A))


def _matched_start(towards: Change, matched: Change, rank: int) -> Change:
    """Return ``SVD_r(Ŵ_ga + ζ W_rm)``, or Ŵ_ga as it is where there is nothing to match: in the first round, or with a single client.

    All singular values of Ŵ_ga are equal: its SVD would turn the factors at the whim of rounding errors, which Adam would follow.
    """
    nothing = matched.norm() <= 1e-5 * towards.norm()
    return towards if nothing else truncated(towards + matched, rank)
