"""Variants of a graph on one batch: what a variant shares with the graph is not run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import bind_inputs, resume


class Replay:
    """The values of one graph on one batch, kept to run variants from where they differ.

    Needs:   variants are made from copies of the graph: the same inputs in the same order, and
             names that stay with what is not changed.
    Cost:    memory for all values of the batch.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.graph, self.inputs = graph, inputs
        self.bindings: dict[str, Any] = dict(bind_inputs(graph, inputs))
        known = dict(zip(graph.inputs, inputs, strict=True))
        self.values = resume(graph, known, self.bindings)
        self.outputs = [self.values[v] for v in graph.outputs]
        self._named: dict[str, Value] | None = None

    def run(self, variant: Graph) -> list[Any]:
        """The variant's outputs."""
        known = {
            v: self.values[w] for v, w in shared(self.graph, variant).items() if w in self.values
        }
        values = resume(variant, known, dict(self.bindings))
        return [values[v] for v in variant.outputs]

    @property
    def bytes(self) -> int:
        """Memory for the values; views count once."""
        import torch

        held = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in self.values.values()
            if isinstance(x, torch.Tensor)
        }
        return sum(held.values())

    def named(self, v: Value) -> Any:
        """The value of the graph that one of a variant is named after; None where none is."""
        if self._named is None:
            self._named = {w.name: w for w in self.values if not isinstance(w, Parameter)}
        found = self._named.get(v.name)
        return self.values[found] if found is not None and found.type == v.type else None


def shared(graph: Graph, variant: Graph) -> dict[Value, Value]:
    """The values of a variant that are those of the graph: same node, on the same values."""
    by_name = {n.results[0].name: n for n in graph.nodes if n.results}
    twin: dict[Value, Value] = dict(zip(variant.inputs, graph.inputs, strict=True))
    for node in variant.nodes:
        old = by_name.get(node.results[0].name) if node.results else None
        if old is not None and _same(node, old, twin):
            twin.update(zip(node.results, old.results, strict=True))
    return twin


def _same(node: Node, old: Node, twin: dict[Value, Value]) -> bool:
    if node.op != old.op or node.attributes != old.attributes or not node.pure:
        return False
    if len(node.results) != len(old.results) or node.graphs != old.graphs:
        return False
    mine, others = list(node.operands), list(old.operands)
    return len(mine) == len(others) and all(
        _same_parameter(a, b) if isinstance(a, Parameter) else twin.get(a) is b
        for a, b in zip(mine, others, strict=True)
    )


def _same_parameter(a: Parameter, b: Value) -> bool:
    return isinstance(b, Parameter) and a.type == b.type and a.data is b.data


def differences(graph: Graph, variant: Graph) -> tuple[set[Node], set[Node]]:
    """The nodes of the graph that are not in the variant, and of the variant not in the graph.

    A node counts by its own name, op, attributes and the names of what it reads: what only follows
    from a change before it is in both.
    """
    mine = {_key(n): n for n in graph.nodes if n.results}
    others = {_key(n): n for n in variant.nodes if n.results}
    return (
        {n for k, n in mine.items() if k not in others},
        {n for k, n in others.items() if k not in mine},
    )


def _key(node: Node) -> tuple[object, ...]:
    names = tuple(
        (v.name, str(v.type), id(v.data)) if isinstance(v, Parameter) else v.name
        for v in node.operands
    )
    types = tuple(str(r.type) for r in node.results)
    return (node.results[0].name, node.op, node.attributes, names, types)
