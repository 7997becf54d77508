"""Tests of dfc, and the assets and models they share."""
