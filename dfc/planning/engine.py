"""What dfc asks of an engine: whether it takes a node, and a function that runs a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from dfc.ir.graph import Graph, Node, Value

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


@runtime_checkable
class Donating(Protocol):
    """An engine that can use the memory of inputs which the caller has no more use for."""

    def build_donating(
        self, graph: Graph, device: str, threads: int | None, donated: Collection[Value]
    ) -> Runner:
        """As `build`; what the runner is given for the donated inputs may be written over."""
        ...


@runtime_checkable
class Holding(Protocol):
    """A runner that has its weights in memory of its own, and threads or files that it can end."""

    def memory(self) -> Sequence[Any]:
        """The tensors that weights are in."""
        ...

    def close(self) -> None: ...
