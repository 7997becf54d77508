"""Changing graphs and proving that nothing else changed."""
