"""The demo: a small LLaVA learns to read digits."""
