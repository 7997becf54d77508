"""Equal values where an operator chooses by order: what it takes first, each runtime decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.interpret import interpret

if TYPE_CHECKING:
    import torch

_FIRST = {"argmax", "argmin", "max", "min"}  # those that read two values: the best, and the next
_CHOOSING = {*_FIRST, "topk", "sort", "argsort", "kthvalue", "median", "mode"}
_NEAR = 16  # units of the last place of the largest value: kernels round so differently


def ties(graph: Graph, inputs: Sequence[Any]) -> str:
    """Where values tie that the result depends on; nothing where none do, or it cannot be told."""
    choosing = [n for n in graph.nodes if _chooses(n)]
    read = {n.inputs[0] for n in choosing}
    held: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def keep(node: Node, results: Sequence[Any]) -> None:
        held.update((v, x) for v, x in zip(node.results, results, strict=True) if v in read)

    if not choosing:
        return ""
    try:
        interpret(graph, inputs, observe=keep)
    except DfcError:
        return ""
    found = [(n, _equal(n, held[n.inputs[0]])) for n in choosing if n.inputs[0] in held]
    for node, count in found:
        if count:
            place = f" at {node.loc}" if node.loc else ""
            return (
                f"%{node.results[0].name} ({node.op}{place}) chooses by order, and "
                f"{counted(count, 'value')} that it reads {'is' if count == 1 else 'are'} equal to "
                "the next, up to rounding: which comes first is not defined, nor what follows"
            )
    return ""


def _chooses(node: Node) -> bool:
    space, _, rest = node.op.partition(".")
    name, _, overload = rest.partition(".")
    if space != "aten" or name not in _CHOOSING or not isinstance(node.inputs[0], Value):
        return False
    if name in ("max", "min", "median") and "dim" not in overload:
        return False
    return bool(node.results[-1].users)  # of indices: equal values are the same in any order


def _equal(node: Node, x: torch.Tensor) -> int:
    """How many of the values that are compared are as large as the one after it in order."""
    import torch

    name = node.op.split(".")[1]
    given = node.attributes
    if not x.numel() or x.is_complex():
        return 0
    dim = given.get("dim")
    x = x.flatten() if dim is None and name in _FIRST else x
    dim = -1 if dim is None or not x.dim() else dim
    if not x.dim() or not isinstance(dim, int):
        return 0
    falling = given.get("largest", given.get("descending", name in ("argmax", "max")))
    ordered = x.to(torch.float64).sort(dim, descending=bool(falling)).values
    count = given["k"] if name == "topk" else 1 if name in _FIRST else None
    if isinstance(count, int):
        ordered = ordered.narrow(dim, 0, min(count + 1, ordered.shape[dim]))
    gaps = ordered.diff(dim=dim).abs()
    near = 0.0
    if x.is_floating_point():
        finite = x[x.isfinite()].abs()
        near = _NEAR * torch.finfo(x.dtype).eps * float(finite.max()) if finite.numel() else 0.0
    return int((gaps <= near).sum())
