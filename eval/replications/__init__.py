"""Other papers' experiments, beside the study."""
