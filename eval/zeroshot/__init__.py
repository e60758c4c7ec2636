"""Zero-shot classification and retrieval: data, prompts, scores."""
