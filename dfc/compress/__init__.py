"""Algorithms that make models smaller: calibration, quantization, pruning, and what they cost."""
