"""Whole layers: numbered modules whose input and output the residual stream ties together.

`layers.3` can go when one value leaves it, and one value of the same axes enters it: then whoever
read what it made reads what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.axes import find, leaves
from dfc.compress.dimensions import Analysis, analyse
from dfc.compress.work import device_of, forecast, work_of
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import KEPT, Context

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Block:
    """The nodes of one numbered module, what enters and what leaves them."""

    path: str
    nodes: list[Node]
    entry: Value | None = None
    exit: Value | None = None
    reason: str = ""  # why it cannot go

    @property
    def parameters(self) -> list[Parameter]:
        found = (v for n in self.nodes for v in n.operands if isinstance(v, Parameter))
        return list(dict.fromkeys(found))


def find_blocks(graph: Graph) -> list[Block]:
    """The numbered modules in the order in which they run; those that cannot go say why."""
    paths: dict[str, list[Node]] = {}
    for node in graph.nodes:
        module = node.loc.module if node.loc else ""
        for m in re.finditer(r"\d+(?=\.|$)", module):
            start = m.start()
            if start == 0 or module[start - 1] == ".":
                paths.setdefault(module[: m.end()], []).append(node)
    analysis = analyse(graph)
    blocks = [_bounded(Block(path, nodes), analysis) for path, nodes in paths.items()]
    outermost = [b for b in blocks if not b.reason]
    inside = {
        b.path for b in blocks for o in outermost if b is not o and b.path.startswith(f"{o.path}.")
    }
    return [b for b in blocks if b.path not in inside]


def _bounded(block: Block, analysis: Analysis) -> Block:
    """Find what enters and leaves a block."""
    if all(x.tensor_type.rank < 2 for x in block.parameters):
        block.reason = "it multiplies by no weights: removing it saves next to nothing"
        return block
    own = {r for n in block.nodes for r in n.results}
    members = set(block.nodes)
    leaving = [r for n in block.nodes for r in n.results if not set(r.users) <= members]
    if len(leaving) != 1:
        block.reason = f"{len(leaving)} values leave it"
        return block
    block.exit = leaving[0]
    entering = {
        v: None
        for n in block.nodes for v in n.operands
        if v not in own and v not in analysis.constant
    }  # fmt: skip
    fits = [v for v in entering if _same_axes(analysis, v, block.exit)]
    if len(fits) != 1:
        block.reason = "no residual ties what leaves it to what enters it"
        if len(fits) > 1:
            block.reason = f"{len(fits)} values of the same axes enter it"
        return block
    block.entry = fits[0]
    return block


def _same_axes(analysis: Analysis, v: Value, w: Value) -> bool:
    """Whether a residual, or an op that keeps sizes, makes two values' indices the same."""
    if v.type != w.type or v not in analysis.dims:
        return False
    pairs = list(zip(analysis.dims[v], analysis.dims[w], strict=True))
    return all(
        find(x) is find(y)
        or list(leaves(x)) == list(leaves(y))
        or not isinstance(find(x).size, int)
        for x, y in pairs
    )


def remove_blocks(graph: Graph, p: Any, ctx: Context) -> int:
    """Remove the least important share of the layers that can go; how many went.

    `p` is the pass `prune`: its selection, its ratio, and what importance is measured by.
    Raises:  DfcError Q071 where nothing can go, Q072 where the ratio is too small.
    """
    blocks = find_blocks(graph)
    chosen = _chosen(graph, blocks, p, ctx)
    count = int(p.ratio * len(chosen) + 0.5)
    if not count:
        message = f"{p.ratio:.0%} of {counted(len(chosen), 'layer')} is less than one"
        help = f"`ratio={1 / len(chosen):.2g}` takes one"
        raise DfcError("Q072", message, span=p._span(), help=help)
    scores = _scores(graph, chosen, p, ctx)
    going = set(sorted(chosen, key=lambda b: scores[b])[:count])
    device = device_of(ctx.target)
    before = work_of(graph, ctx.examples, device)
    for b in chosen:
        score = f"importance {scores[b]:.3g}"
        at = b.exit.node if b.exit is not None else None
        assert at is not None and b.entry is not None and b.exit is not None
        if b in going:
            ctx.decided(at, "pruned", f"{b.path} goes: {score}", b.entry)
        else:
            ctx.decided(at, KEPT, f"{b.path} matters more: {score}")
    for b in reversed(blocks):  # the last first: what it was given may go after it
        if b in going:
            _remove(graph, b)
    after = work_of(graph, ctx.examples, device)
    names = ", ".join(b.path for b in chosen if b in going)
    ctx.tell(f"prune: {names} removed; {forecast(before, after, device)}")
    return count


def _chosen(graph: Graph, blocks: Sequence[Block], p: Any, ctx: Context) -> list[Block]:
    inside = None if p.select is None else set(p.select.nodes_left(graph))
    outside = set() if p.exclude is None else set(p.exclude.nodes_left(graph))
    chosen, refused = [], []
    for b in blocks:
        if inside is not None and not set(b.nodes) <= inside:
            continue
        if not b.reason and set(b.nodes) & outside:
            b.reason = "`except` names a part of it"
        if b.reason:
            refused.append(f"`{b.path}`: {b.reason}")
            ctx.decided(b.nodes[0], KEPT, f"layer {b.path}: {b.reason}")
        else:
            chosen.append(b)
    if not chosen:
        message = f"no layer that `{p.select}` selects can be removed"
        if p.select is None:
            message = "no layer of this model can be removed"
        elif not refused:
            message = f"`{p.select}` selects no numbered module as a whole"
        help = 'a layer is a numbered module: `prune "layers.*.**" with what=layers`'
        raise DfcError("Q071", message, span=p._span(), notes=tuple(refused[:6]), help=help)
    return chosen


def _remove(graph: Graph, block: Block) -> None:
    """Let the block's readers read what it was given; drop its nodes and weights."""
    assert block.entry is not None and block.exit is not None
    entry, last = block.entry, block.exit
    parameters = block.parameters
    graph.replace_uses(last, entry)
    for node in reversed(block.nodes):
        if not any(r.use_count for r in node.results) and not node.effect:
            graph.erase(node)
    for x in parameters:
        if not x.use_count and graph.parameters.get(x.name) is x:
            graph.drop_parameter(x.name)


# Importance


def _scores(graph: Graph, blocks: Sequence[Block], p: Any, ctx: Context) -> dict[Block, float]:
    if p.by == "magnitude":
        return {b: _norm(b.parameters) for b in blocks}
    batches = p.batches(graph, ctx)
    total = dict.fromkeys(blocks, 0.0)
    seen = 0
    for batch in batches:
        seen += 1
        for b, change in _changes(graph, blocks, batch).items():
            total[b] += change
        ctx.progress(seen, getattr(batches, "count", None) or 0)
    return {b: x / max(seen, 1) for b, x in total.items()}


def _norm(parameters: Iterable[Parameter]) -> float:
    """Root mean square of all weights."""
    total = count = 0.0
    for x in parameters:
        if x.data is not None and x.tensor_type.dtype.is_float:
            tensor = x.data.tensor().float()
            total += float(tensor.square().sum())
            count += tensor.numel()
    return float((total / max(count, 1)) ** 0.5)


def _changes(graph: Graph, blocks: Sequence[Block], batch: Sequence[Any]) -> dict[Block, float]:
    """How far each block turns what it is given: 1 - cosine (Men et al. 2024, arXiv 2403.03853)."""
    wanted = {v for b in blocks for v in (b.entry, b.exit)}
    held: dict[Value | None, Tensor] = dict(zip(graph.inputs, batch, strict=True))

    def watch(node: Node, results: Sequence[Any]) -> None:
        for v, x in zip(node.results, results, strict=True):
            if v in wanted:
                held[v] = x

    interpret(graph, batch, observe=watch)
    return {b: _turned(held[b.entry], held[b.exit]) for b in blocks}


def _turned(x: Tensor, y: Tensor) -> float:
    import torch

    a, b = (t.float().flatten(0, -2) if t.dim() == 3 else t.float().flatten(1) for t in (x, y))
    return float(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())
