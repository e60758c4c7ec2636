"""Recipes: load a base, prepare, train, resume, write what was trained."""
