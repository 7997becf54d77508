"""Recipes: what a user wants, resolved, checked, run and told."""
