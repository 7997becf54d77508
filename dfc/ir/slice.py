"""A part of a graph as a graph of its own: what it reads from outside becomes its inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dfc.ir.expr import symbols
from dfc.ir.graph import Argument, Graph, Node, Parameter, Value, map_input
from dfc.ir.tree import LEAF, Seq


def slice_graph(graph: Graph, nodes: Collection[Node]) -> tuple[Graph, list[Value]]:
    """The nodes as a graph, and the values of the whole one that its inputs stand for.

    Needs:   nodes of the graph itself, not of graphs inside.
    Ensures: values that are read outside, or by nobody, are outputs, so that a rule finds as many
             readers as before. Sizes keep their names: where no input fixes one, an input of the
             whole graph that does is added, though nothing reads it.
    """
    chosen = [n for n in graph.nodes if n in nodes]
    part = Graph("part")
    outer = _read_from_outside(chosen)
    outer += _binders(graph, chosen, outer)
    twin: dict[Value, Value] = {v: part.add_input(v.name, v.type) for v in outer}
    part.arguments = tuple(Argument(v.name, LEAF) for v in outer)
    for p in dict.fromkeys(v for n in chosen for v in n.operands if isinstance(v, Parameter)):
        assert p.type is not None
        twin[p] = part.add_parameter(p.name, p.type, p.kind, p.data, p.aliases)  # type: ignore[arg-type]
    for n in chosen:
        made = part.add(
            n.op,
            [map_input(x, twin) for x in n.inputs],
            n.attributes,
            types=[r.type for r in n.results],
            names=[r.name for r in n.results],
            graphs=[g.copy() for g in n.graphs],
            binds=n.binds,
            stage=n.stage,
            loc=n.loc,
        )
        twin.update(zip(n.results, made.results, strict=True))
    inside = set(chosen)
    kept = [
        r for n in chosen for r in n.results if not r.users or any(u not in inside for u in r.users)
    ]
    part.set_outputs([twin[r] for r in kept], Seq("tuple", (LEAF,) * len(kept)), [])
    _copy_sizes(graph, part)
    return part, outer


def _read_from_outside(chosen: Iterable[Node]) -> list[Value]:
    nodes = list(chosen)
    made = {r for n in nodes for r in n.results}
    read = (v for n in nodes for v in n.operands if not isinstance(v, Parameter))
    return [v for v in dict.fromkeys(read) if v not in made]


def _binders(graph: Graph, chosen: list[Node], outer: list[Value]) -> list[Value]:
    """Inputs of the whole graph that fix sizes which nothing else does."""
    wanted: set[str] = set()
    for n in chosen:
        wanted |= n.symbols | {s for v in (*n.results, *n.operands) for s in v.type.symbols}
    plain = _fixed(outer) | {b.symbol for n in chosen for b in n.binds}
    found: list[Value] = []
    for v in graph.inputs:
        if v not in outer and (_fixed([v]) & wanted) - plain:
            found.append(v)
            plain |= _fixed([v])
    return found


def _fixed(values: Iterable[Value]) -> set[str]:
    """The sizes that stand alone as a dimension, or are the value itself."""
    found = set()
    for v in values:
        for size in getattr(v.type, "shape", ()):
            name = getattr(size, "symbol", None)
            if name is not None:
                found.add(name)
        if not hasattr(v.type, "shape"):
            found.add(v.name)
    return found


def _copy_sizes(graph: Graph, part: Graph) -> None:
    known: set[str] = set()
    for v in part.inputs:
        known |= v.type.symbols
    for n in part.nodes:
        known |= {s for r in n.results for s in r.type.symbols}
    for n in graph.nodes:  # a size that data decides is an input's here
        for b in n.binds:
            if b.symbol in known:
                part.ranges[b.symbol] = (b.low or 0, b.high)
    own = {b.symbol for n in part.nodes for b in n.binds}
    part.ranges.update({s: r for s, r in graph.ranges.items() if s in known})
    for s in own:
        part.ranges.pop(s, None)
    part.requires = tuple(r for r in graph.requires if symbols(r) <= known)


def neighbours(graph: Graph, seeds: Collection[Node], steps: int) -> list[Node]:
    """The seeds and what lies within so many steps, in the graph's order."""
    found = set(seeds)
    level = list(seeds)
    for _ in range(steps):
        near = [v.node for n in level for v in n.operands if v.node is not None]
        near += [u for n in level for u in n.users]
        level = [n for n in dict.fromkeys(near) if n not in found and n.graph is graph]
        level = [n for n in level if n is not graph.result]
        found.update(level)
    return [n for n in graph.nodes if n in found]
