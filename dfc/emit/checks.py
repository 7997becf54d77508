"""Run-time assertions as outputs, for engines that cannot stop in the middle of a graph.

A decision that depended on data was taken as the example took it; an engine that ignored the
check would answer wrongly for other data. Nested graphs keep theirs: only the interpreter and the
eager engine check those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.expr import call
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.tree import LEAF, Leaf, Seq
from dfc.planning.engine import Runner

_PLAIN: dict[str, Any] = dict.fromkeys(("dtype", "layout", "device", "pin_memory"))
_CHECKS = ("aten._assert_scalar.", "aten._assert_async.")


def lift_checks(graph: Graph, *, tensors: bool = False) -> tuple[Graph, list[str]]:
    """The graph with each assertion's condition as a last output, and their messages.

    Conditions on sizes are numbers, or `tensors` as the others.
    """
    if not any(node.op.startswith(_CHECKS) for node in graph.nodes):
        return graph, []
    lifted = graph.copy()
    flags: list[Value] = []
    messages: list[str] = []
    for node in lifted.nodes:
        if node.op.startswith(_CHECKS):
            flags.append(_condition(lifted, node, tensors))
            place = f" (traced from {node.loc})" if node.loc else ""
            messages.append(f"{node.attributes.get('assert_msg') or 'assertion failed'}{place}")
            lifted.erase(node)
    mutations = [(m.target, m.value) for m in lifted.mutations]
    tree = Seq("tuple", (*(LEAF for _ in lifted.outputs), *(Leaf() for _ in flags)))
    # Flags stand between outputs and mutations; `checked` takes them out again.
    lifted.set_outputs([*lifted.outputs, *flags], tree, mutations)
    return lifted, messages


def _condition(graph: Graph, node: Node, tensors: bool) -> Value:
    if node.op.startswith("aten._assert_async."):
        tensor = node.inputs[0]
        assert isinstance(tensor, Value)
        return tensor
    value = node.attributes["self"]
    op, attributes = "torch.scalar", {"value": value}
    if tensors:
        op, attributes = "aten.scalar_tensor.default", {"s": call("where", value, 1, 0), **_PLAIN}
    made = graph.add(op, [], attributes, before=node, stage=node.stage, loc=node.loc)
    return made.result


def checked(run: Runner, outputs: int, messages: list[str]) -> Runner:
    """A runner that takes the flags from a lifted graph's results and raises when one is false."""
    if not messages:
        return run

    def run_checked(inputs: Sequence[Any]) -> list[Any]:
        results = run(inputs)
        flags = results[outputs : outputs + len(messages)]
        for flag, message in zip(flags, messages, strict=True):
            if not bool(flag):
                raise DfcError("K023", message)
        return [*results[:outputs], *results[outputs + len(messages) :]]

    return run_checked
