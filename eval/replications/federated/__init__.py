"""Federated rounds, simulated: clients in turn, in one process, each with data of its own.

FedSmoothLoRA (arXiv 2605.29460, Algorithm 2) beside FedAvg-LoRA, which averages A and B apart, and FedAvg of full-rank changes. Of each
round are told the losses, how exact the aggregation was, and the jump of the clients' losses as they take up work again:

    python -m corda_eval.replications.federated rounds.jsonl --method fedsmooth --rounds 4 --steps 10

Throughout: W (m, n) of a layer at the server, r the rank, c one of C clients. LoRA's scale is 1 (alpha = r).
"""
