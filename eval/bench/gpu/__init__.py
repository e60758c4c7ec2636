"""The record of one GPU: correctness, and time and memory at seven billion parameters beside what they cannot be less than."""
