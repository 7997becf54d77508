"""Measuring a machine: what its devices and links do, as the facts of a target."""
