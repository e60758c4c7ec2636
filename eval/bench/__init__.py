"""Benchmarks against the peers: each side in fresh processes, alternating, reported as ratios."""
