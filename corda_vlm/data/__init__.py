"""From what people have (pairs, rows, files, datasets) to batches of model inputs."""
