"""Compute at compile time what depends on constants alone."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.op import DeclaredOp
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota

# What these hold is whatever was in memory: a compiled model must not depend on it.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "empty_permuted"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace pure nodes whose operands are all constant by their value.

    Needs:    a valid graph; parameters without data are left alone.
    Ensures:  no pure node of static shape reads only constants, unless its value is too large.
    Keeps:    the model's size: a value may be at most `growth` bytes larger than what it replaces;
              random ops; what the model mutates.
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
            for n in graph.nodes:
                if self._why_not(n, mutated) is None and quota.allows(n):
                    _fold(graph, n, ctx, quota)
        for node in graph.nodes if ctx.asked else ():
            reason = self._why_not(node, mutated)
            if reason and reason is not _COMPUTED:
                ctx.decided(node, KEPT, reason)
        return quota.done

    def _why_not(self, node: Node, mutated: set[Value]) -> str | None:
        """Why a node cannot be folded, None when it can; `_COMPUTED` for most nodes."""
        if node.graphs or not node.results:
            return _COMPUTED
        read = 0
        for v in node.operands:
            if not isinstance(v, Parameter):
                return _COMPUTED
            read += _bytes(v.type) if v.use_count == 1 else 0
        if isinstance(node.info, DeclaredOp) and node.info.cls.unpacks:
            return "it unpacks weights, which are meant to stay small"
        if node.binds or node.symbols:
            return "its size is known only when the model runs"
        if not node.pure:
            return "it is random, or has an effect"
        if node.op.split(".")[1] in _UNINITIALISED:
            return "it holds whatever was in memory"
        for v in node.operands:
            assert isinstance(v, Parameter)
            if v in mutated:
                return f"the model writes to !{v.name}"
            if v.data is None:
                return f"!{v.name} has no numbers: the model has no weights"
        types = [r.type for r in node.results]
        if not all(isinstance(t, TensorType) and t.is_static for t in types):
            return "its size is known only when the model runs"
        size = sum(map(_bytes, types))
        if size > read + self.growth:
            return (
                f"it would add {size - read} bytes to the model, more than `growth` ({self.growth})"
            )
        return None


_COMPUTED = "it reads what is computed from the inputs"


def _bytes(t: object) -> int:
    assert isinstance(t, TensorType)
    return int(t.numel) * t.dtype.itemsize  # type: ignore[arg-type]


def _fold(graph: Graph, node: Node, ctx: Context, quota: Quota) -> None:
    from dfc.ir.interpret import run_constant

    try:
        values = run_constant(node)
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
