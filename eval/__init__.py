"""Evaluation: what an adapted model gained and what it forgot. Installed as ``corda_eval``."""
