"""Weights that are streamed to where they are computed with: from files to memory, or to a GPU."""
