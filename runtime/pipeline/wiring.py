"""The whole graph as its ranks know it: values by number, edges, links, programs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs
from dfc.planning.actions import Program
from dfc.runtime.pipeline.folder import Assembly
from dfc.runtime.pipeline.lanes import Values
from dfc.runtime.pipeline.links import pairs_of
from dfc.runtime.pipeline.routes import Edge, Routed, Routes

Numbered = dict[Hashable, Any]


class Wiring:
    """Between a host, who knows values, and its ranks, who know their numbers."""

    def __init__(self, graph: Graph, made: Assembly, numbers: Mapping[Hashable, int]) -> None:
        self.graph = graph
        self.placement = tuple(made.placement)
        self.edges = tuple(made.routed())
        self.pairs = pairs_of(self.edges, self.placement)
        self._numbers = numbers
        self._values: dict[Hashable, Any] = {n: v for v, n in numbers.items()}
        self.types = {i: [self._values[n].type for n in e.values] for i, e in enumerate(self.edges)}
        self._routed = Routed(self.edges)

    @property
    def ranks(self) -> int:
        return 1 + max(self.placement)

    def numbered(self, given: Sequence[Values]) -> list[Numbered]:
        """Each microbatch's inputs by number."""
        known = [v for v in self.graph.inputs if v in self._numbers]
        return [{self._numbers[v]: part[v] for v in known} for part in given]

    def named(self, results: Sequence[Numbered]) -> list[dict[Hashable, Any]]:
        return [{self._values[n]: x for n, x in r.items()} for r in results]

    def by_edge(self, sent: Mapping[int, int]) -> dict[Edge, int]:
        return {e: sent.get(i, 0) for i, e in enumerate(self.edges)}

    def sizes(self, given: Sequence[Values]) -> tuple[list[dict[str, Any]], list[int]]:
        """The sizes that there are, and which of them each microbatch has."""
        inputs = self.graph.inputs
        known: dict[tuple[Any, ...], int] = {}
        distinct: list[dict[str, Any]] = []
        size_of: list[int] = []
        for part in given:
            values = [part[v] for v in inputs]
            like = tuple([getattr(x, "shape", (type(x), x)) for x in values])
            if like not in known:
                known[like] = len(distinct)
                distinct.append(bind_inputs(self.graph, values))
            size_of.append(known[like])
        return distinct, size_of

    def routes(self, program: Program, microbatches: int) -> Routes:
        """A program's routes, checked once.

        Raises:  DfcError N054 for a program that is not of these ranks, N020.. for what is wrong.
        """
        if program.placement != self.placement or program.microbatches != microbatches:
            raise DfcError(
                "N054",
                f"the program is for stages on ranks {list(program.placement)} and "
                f"{program.microbatches} microbatches, there are {list(self.placement)} and "
                f"{microbatches}",
            )
        return self._routed[program]
