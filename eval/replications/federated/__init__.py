"""Federated rounds, simulated: clients in turn, in one process, each with its own data.

FedSmoothLoRA (arXiv 2605.29460, Algorithm 2) beside FedAvg-LoRA, which averages A and B apart, and FedAvg of full-rank changes. Each
round reports the losses, how exact the aggregation was, and by how much the clients' losses jump when they resume:

    python -m corda_eval.replications.federated rounds.jsonl --method fedsmooth --rounds 4 --steps 10

Throughout: W (m, n) of a layer at the server, r the rank, c one of C clients. LoRA's scale is 1 (alpha = r).
"""
