"""Questions about images: data, prompts, answers."""
