"""What dfc asks of an engine: whether it takes a node, and a function that runs a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dfc.ir.graph import Graph, Node

# Takes the graph's flat inputs; returns the outputs' leaves, then the mutations' final values.
Runner = Callable[[Sequence[Any]], list[Any]]


class Engine(Protocol):
    """One way to run a graph on one device."""

    name: str
    devices: tuple[str, ...]

    def supports(self, node: Node) -> str | None:
        """None, or the reason why the engine cannot run the node: shown to the user."""
        ...

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        """Compile the graph.

        Raises:  DfcError K family when the engine refuses it.
        """
        ...
