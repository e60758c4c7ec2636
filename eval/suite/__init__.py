"""Suites: base and tuned models on the same tasks, and what was gained and forgotten."""
