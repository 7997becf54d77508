"""Model to graph."""
