"""The dfc language: text in, graphs, recipes and rules out, with every error at its place."""
