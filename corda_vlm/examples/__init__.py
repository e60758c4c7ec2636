"""Scripts that train a model from ``corda_vlm.prepare`` with other libraries' trainers; each is whole, to be copied and changed."""
