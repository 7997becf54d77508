"""Writing ops into a graph by name: defaults are filled in and types inferred.

What a decomposition is handed: `y = b("aten.linear.default", x, weight, bias)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Input, Node, Value
from dfc.ir.op import REQUIRED, DeclaredOp, Op, OpInfo, lookup
from dfc.ops.aten import AtenOp, complete


class Builder:
    """Writes nodes before an anchor (default: at the end of the graph).

    New nodes take the anchor's stage and source line: they stand for it.
    """

    def __init__(self, graph: Graph, before: Node | None = None) -> None:
        self.graph = graph
        self.before = before

    def node(self, op: str, /, *inputs: Input | Sequence[Value | None], **attributes: Any) -> Node:
        """Write a node; attributes that are not given take the op's default, operands None.

        Raises:  DfcError V010 for an unknown op, V011 for a wrong attribute, V020 for operands.
        """
        at = self.before
        info = lookup(op)
        operands = [tuple(x) if isinstance(x, (list, tuple)) else x for x in inputs]
        operands += [None] * (len(info.operands) - len(operands))
        return self.graph.add(
            op,
            operands,  # type: ignore[arg-type]
            _with_defaults(info, attributes),
            before=at,
            stage=at.stage if at else None,
            loc=at.loc if at else None,
        )

    def __call__(
        self, op: str, /, *inputs: Input | Sequence[Value | None], **attributes: Any
    ) -> Value:
        """Write a node that has one result, and give the result."""
        return self.node(op, *inputs, **attributes).result


def _with_defaults(info: OpInfo, given: dict[str, Any]) -> dict[str, Any]:
    if isinstance(info, AtenOp):
        return complete(info, given)
    known = {a.name: a.default for a in info.attributes}
    unknown = [name for name in given if name not in known]
    missing = [n for n, default in known.items() if default is REQUIRED and n not in given]
    if unknown or missing:
        problem = f"has no attribute `{unknown[0]}`" if unknown else f"needs `{missing[0]}`"
        raise DfcError("V011", f"`{info.name}` {problem}", status=2)
    return {**known, **given}


def decomposable(op: str) -> bool:
    """Whether this is a declared op that says how it is made of others."""
    if op.startswith("aten."):
        return False
    info = lookup(op)
    return isinstance(info, DeclaredOp) and hasattr(info.cls, "decompose")


def decompose(node: Node) -> tuple[Value, ...]:
    """Write what a declared op is made of before the node; the values that equal its results.

    Needs:  `decomposable(node.op)`. The node itself stays: the caller replaces it.
    """
    assert node.graph is not None and isinstance(node.info, DeclaredOp)
    op: Op = node.info.instance(node.attributes)
    made = op.decompose(Builder(node.graph, node), *node.inputs)
    return made if isinstance(made, tuple) else (made,)
