"""Compute at compile time what depends on constants alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import RESULT, Graph, Node, Parameter, Value
from dfc.ir.interpret import stepper
from dfc.ir.op import DeclaredOp
from dfc.ir.types import TensorType
from dfc.ops.aten import AtenOp
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota

if TYPE_CHECKING:
    from torch import Tensor

# What these hold is whatever was in memory: a compiled model must not depend on it.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "empty_permuted"})
_COMPUTED = "it reads what is computed from the inputs"
Views = dict[Value, Parameter]  # results of views that are kept, and whose numbers they are


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace pure nodes whose operands are all constant by their value.

    Needs:    a valid graph; parameters without data are left alone.
    Ensures:  no pure node of static shape reads only constants, unless its value is too large, or
              a view of a parameter that others read too.
    Keeps:    the model's size: a value may be at most `growth` bytes larger than what it replaces,
              and tied weights stay tied; random ops; what the model mutates.
    Cost:     one run of each folded node.
    """

    name = "fold_constants"
    growth: int = 65536  # bytes that one folded value may add to the model
    limit: int | None = None  # fold at most this many nodes; bisects a miscompile
    skip: tuple[int, ...] = ()  # folds by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        mutated = {m.target for m in graph.mutations}
        done = -1
        while done != quota.done:  # folding one reader of a parameter may free it for the last one
            done = quota.done
            views: Views = {}
            for n in graph.nodes:
                if self._why_not(n, mutated, views) is None and quota.allows(n):
                    _fold(graph, n, views, ctx, quota)
        for node in graph.nodes if ctx.asked else ():
            reason = self._why_not(node, mutated, views)
            if reason and reason is not _COMPUTED:
                ctx.decided(node, KEPT, reason)
        return quota.done

    def _why_not(self, node: Node, mutated: set[Value], views: Views) -> str | None:
        """Why a node cannot be folded, None when it can; `_COMPUTED` for most nodes.

        A view that is kept is noted in `views`: what reads it may still be folded.
        """
        if node.graphs or not node.results:
            return _COMPUTED
        read, sources = 0, []
        for v in node.operands:
            source = v if isinstance(v, Parameter) else views.get(v)
            if source is None:
                return _COMPUTED
            read += _bytes(v.type) if source is v and v.use_count == 1 else 0
            sources.append(source)
        if isinstance(node.info, DeclaredOp) and node.info.cls.unpacks:
            return "it unpacks weights, which are meant to stay small"
        if node.binds or node.symbols:
            return "its size is known only when the model runs"
        if not node.pure:
            return "it is random, or has an effect"
        if node.op.split(".")[1] in _UNINITIALISED:
            return "it holds whatever was in memory"
        for source in sources:
            if source in mutated:
                return f"the model writes to !{source.name}"
            if source.data is None:
                return f"!{source.name} has no numbers: the model has no weights"
        types = [r.type for r in node.results]
        if not all(isinstance(t, TensorType) and t.is_static for t in types):
            return "its size is known only when the model runs"
        if len(sources) == 1 and _is_second_look(node, sources[0], views):
            views.update(dict.fromkeys(node.results, sources[0]))
            name = sources[0].name
            return f"it is a view of !{name}, which others read too: a copy would store it twice"
        size = sum(map(_bytes, types))
        if size > read + self.growth:
            return (
                f"it would add {size - read} bytes to the model, more than `growth` ({self.growth})"
            )
        return None


def _bytes(t: object) -> int:
    assert isinstance(t, TensorType)
    return int(t.numel) * t.dtype.itemsize  # type: ignore[arg-type]


def _is_second_look(node: Node, source: Parameter, views: Views) -> bool:
    """Whether a node only views a parameter that would stay if the node were folded."""
    (read,) = node.operands
    if read is source and source.use_count == 1:
        return False
    if not _is_view(node, source, views):
        return False
    if read is not source or not all(_is_view(u, source, views) for u in source.users):
        return True
    # Pieces that were cut out of it take its place; two views of all of it would double it.
    return sum(_bytes(r.type) for u in source.users for r in u.results) > _bytes(source.type)


def _is_view(node: Node, source: Parameter, views: Views) -> bool:
    """Whether what a node gives lies in a parameter's memory."""
    if node.op == RESULT or node.graphs or node.symbols:
        return False
    if not isinstance(node.info, AtenOp) or not node.info.may_view:
        return False
    if any(v is not source and v not in views for v in node.operands):
        return False
    assert source.data is not None
    try:
        held = source.data.tensor()  # a file's entry is mapped as long as it is held
        results = _run(node, views)
    except DfcError:
        return False
    return all(r.untyped_storage().data_ptr() == held.untyped_storage().data_ptr() for r in results)


def _run(node: Node, views: Views) -> list[Tensor]:
    """What a node gives that reads parameters, or views of them.

    Raises:  DfcError K020 when the op fails.
    """
    import torch

    needed = [node]
    for n in needed:
        needed += [v.node for v in n.operands if v in views and v.node is not None]
    step, values = stepper(), dict[Value, Any]()
    with torch.no_grad():
        for n in reversed(needed):
            values.update(zip(n.results, step(n, values, {}), strict=True))
    return [values[r] for r in node.results]


def _fold(graph: Graph, node: Node, views: Views, ctx: Context, quota: Quota) -> None:
    try:
        values = _run(node, views)
    except DfcError as e:
        ctx.decided(node, KEPT, f"computing it fails: {e.message}")
        quota.failed(node)  # it fails at run time too, where the user sees it with its line
        return
    made: list[Value] = []
    for r, x in zip(node.results, values, strict=True):
        x = x.detach().clone()  # strides are kept: another layout rounds differently
        made.append(graph.add_constant(f"folded.{r.name}", x))
    ctx.decided(node, "folded", "depends on constants alone", made[0])
    graph.replace(node, made)
