"""SmolLM2-135M learns additions from clients that have operands of different size."""

import dataclasses
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from corda_eval.lab.smollm2 import smollm2_model
from corda_eval.records import add_line
from corda_eval.replications.federated.rules import FedAvg, FedSmooth, FullRank, Rule
from corda_eval.replications.federated.simulate import Client, Federation, federate
from corda_eval.study.settings.lines import additions
from corda_eval.study.settings.shared import answer_loss, answer_score


class MethodName(StrEnum):
    """The methods by name."""

    FEDSMOOTH = "fedsmooth"
    FEDAVG = "fedavg"
    FULLRANK = "fullrank"


def smollm2_federation(clients: int, rounds: int, steps: int, *, batch_size: int = 4, test_windows: int = 8, seed: int = 0) -> Federation:
    """Return SmolLM2-135M and clients that add numbers of different size, digits of the sum reversed (``settings.lines``).

    The operands below 1000 are shared out by size: client c has those from ``1000^(c/C)`` to ``1000^((c+1)/C)``, so three clients have
    those of one, of two and of three digits.
    """
    model, layers, tokenizer = smollm2_model()
    model.requires_grad_(False)
    edges = [0, *(round(1000 ** (number / clients)) for number in range(1, clients + 1))]

    def client(low: int, high: int) -> Client:
        draw = partial(additions, tokenizer, low=low, high=high)
        batches = draw(rounds * steps * batch_size, "train", seed, batch_size=batch_size)
        validation = draw(test_windows, "validation")
        return Client(
            [batches[number * steps : (number + 1) * steps] for number in range(rounds)],
            lambda adapted: answer_score(adapted, validation).loss or 0.0,
        )

    return Federation(model, layers, answer_loss, [client(low, high) for low, high in zip(edges, edges[1:], strict=False)])


def main(
    out: Annotated[Path, typer.Argument(help="JSON lines: the options, then the rounds.")],
    method: MethodName = MethodName.FEDSMOOTH,
    clients: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of each client, in each round.")] = 10,
    rank: int = 8,
    rate: float = 1e-3,
    zeta: Annotated[float, typer.Option(help="fedsmooth: ζ in the first round.")] = FedSmooth.zeta,
    min_zeta: Annotated[float, typer.Option(help="fedsmooth: what ζ falls to.")] = FedSmooth.min_zeta,
    seed: int = 0,
) -> None:
    """Simulate federated rounds of SmolLM2 learning additions, split over clients by the operands' size."""
    options = {key: value for key, value in locals().items() if key != "out"}
    rules: dict[MethodName, Rule] = {
        MethodName.FEDSMOOTH: FedSmooth(zeta, min_zeta),
        MethodName.FEDAVG: FedAvg(),
        MethodName.FULLRANK: FullRank(seed),
    }
    torch.manual_seed(seed)
    try:
        federation = smollm2_federation(clients, rounds, steps, seed=seed)
    except ValueError as error:
        raise SystemExit(f"corda_eval.replications.federated: {error}") from error
    out.unlink(missing_ok=True)
    add_line(out, {"options": options, "base": [client.validate(federation.model) for client in federation.clients]})
    for finished in federate(federation, rules[method], rank=rank, rate=rate):
        add_line(out, dataclasses.asdict(finished))


if __name__ == "__main__":
    typer.run(main)
