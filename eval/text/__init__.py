"""What a model knows and predicts in text alone."""
