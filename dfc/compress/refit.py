"""Refit what reads a pruned group: least squares from what arrives there to what came out before.

W' = (Y X^T + l W)(X X^T + l I)^-1, layer after layer: X is what the pruned layers before it give,
refitted already, and Y what the layer made in the whole graph, so that it makes up for those before
it too. A bias takes part as a column of ones.
Why:  with X of the whole graph errors add up: EfficientNet-Lite0 loses 2.6 points with a tenth of
      its multiply-adds so, and 1.3 in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.axes import Kept, kept_mask
from dfc.compress.dimensions import Use
from dfc.compress.groups import Group, Groups
from dfc.compress.sequential import Prefix
from dfc.compress.shrink import replace_data
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.rewrite.code_digest import code_of
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

_DAMPING = 1e-4  # of the mean of the diagonal
_FEW = 12  # rows for each unit: with fewer, noise is fitted too,
_DAMPED = 0.1  # and so much of the diagonal keeps weights near what they were
_WIDEST = 8192  # a matrix of second moments of this width has 512 MiB


@dataclass(eq=False)
class Layer:
    """A linear layer, or a convolution of single pixels, that can be refitted."""

    node: Node
    weight: Parameter
    bias: Parameter | None

    @property
    def x(self) -> Value:
        value = self.node.inputs[0]
        assert isinstance(value, Value)
        return value

    def rows(self, x: Tensor) -> Tensor:
        """What the layer reads, a row each time that its weights are used."""
        if self.kernel:
            strides = _each(self.node.attributes["stride"], self.kernel)
            at: list[Any] = [..., *(slice(None, None, s) for s in strides)]
            x = x[tuple(at)]
        return self.columns(x)

    def columns(self, y: Tensor) -> Tensor:
        """Channels last, everything else in rows."""
        dim = y.dim() - 1 - self.kernel
        return y.movedim(dim, -1).reshape(-1, y.shape[dim])

    @property
    def width(self) -> int:
        """Units that it reads."""
        return int(self.weight.tensor_type.shape[1])  # type: ignore[arg-type]

    @property
    def kernel(self) -> int:
        """Dimensions of the kernel, which lie behind the channels."""
        return self.weight.tensor_type.rank - 2


def _each(sizes: Any, count: int) -> tuple[int, ...]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return given * count if len(given) == 1 else given


def layers_of(graph: Graph, chosen: Iterable[Group]) -> list[Layer]:
    """What reads the groups and can be refitted, in the order in which it runs."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    found = {u.node: made for g in chosen for u in g.readers if (made := _layer(u)) is not None}
    return [found[n] for n in sorted((n for n in found if n in place), key=place.__getitem__)]


def _layer(use: Use) -> Layer | None:
    """Weights of single pixels that nothing else reads, or None."""
    node, weight = use.node, use.parameter
    plain = node.op.startswith(("aten.linear.", "aten.conv"))
    if weight is None or not plain or node.inputs[1] is not weight:
        return None
    bias, width = node.inputs[2], weight.tensor_type.shape[1]
    single = use.dim == 1 and all(k == 1 for k in weight.tensor_type.shape[2:])
    given = node.attributes
    padding = given.get("padding", 0)
    padded = padding not in (0, "valid") and any(padding)
    owned = bias is None or (isinstance(bias, Parameter) and bias.use_count == 1)
    if not single or padded or not owned or weight.use_count > 1 or given.get("groups", 1) != 1:
        return None
    if not isinstance(width, int) or width > _WIDEST:
        return None
    return Layer(node, weight, bias if isinstance(bias, Parameter) else None)


def refit(
    groups: Groups, whole: Graph, layers: Sequence[Layer], stays: Kept, batches: Any, ctx: Context
) -> None:
    """Solve the layers of a graph that has shrunk, in turn.

    `whole` is the graph as it was: it has values of the same names.
    Memory:  for each batch, the values that are needed where the layers wait for one another.
    Cost:    one run of the batches through either graph.
    """
    graph = groups.analysis.graph
    made = {n.results[0].name: n.results[0] for n in whole.nodes if n.results}
    given = [list(batch) for batch in batches]
    small, before = Prefix(graph, given), Prefix(whole, given)
    done = _Done(ctx, whole, graph, small.digest)
    for number, layer in enumerate(layers):
        found = done.load(number)
        if found is None:
            rows = kept_mask(groups.analysis.dims[layer.weight][0], stays)
            outcomes = before.reach(made[layer.node.results[0].name])
            found = _solve(layer, rows, zip(small.reach(layer.x), outcomes, strict=True))
            done.save(number, found)
        small.weights.update(found)
        ctx.progress(number + 1, len(layers))
    for layer in layers:
        for p in (layer.weight, layer.bias):
            if p is not None:
                replace_data(graph, p, small.weights[p.name])


def _solve(
    layer: Layer, rows: Sequence[bool], data: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The weight and the bias by name."""
    import torch

    stay = torch.tensor(list(rows)).nonzero().flatten()
    assert layer.weight.data is not None
    weight = layer.weight.data.tensor()
    start = weight.flatten(1).double()
    if layer.bias is not None:
        assert layer.bias.data is not None
        start = torch.cat([start, layer.bias.data.tensor().double()[:, None]], 1)
    within = start.new_zeros(start.shape[1], start.shape[1])
    across, count = torch.zeros_like(start), 0
    for x, y in data:
        seen, wanted = layer.rows(x).float(), layer.columns(y).float()[:, stay]
        if layer.bias is not None:
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        within += seen.T @ seen
        across += wanted.T @ seen
        count += len(seen)
    damping = _DAMPED if count < _FEW * len(within) else _DAMPING
    damping *= float(within.diagonal().mean())
    within.diagonal().add_(damping)
    found = torch.linalg.solve(within, (across + damping * start).T).T.to(weight.dtype)
    solved = {}
    if layer.bias is not None:
        solved[layer.bias.name] = found[:, -1].contiguous()
        found = found[:, :-1]
    return {**solved, layer.weight.name: found.reshape(weight.shape).contiguous()}


class _Done:
    """The layers that were solved before a kill, in the journal: an entry for each."""

    def __init__(self, ctx: Context, whole: Graph, graph: Graph, data: str) -> None:
        self.journal, self.words = ctx.journal, [data]
        if self.journal is not None:
            self.words += [*code_of(whole), whole.fingerprint(), graph.fingerprint()]

    def _key(self, number: int) -> str:
        return hashlib.sha256("\n".join(["refit", *self.words, str(number)]).encode()).hexdigest()

    def load(self, number: int) -> dict[str, Tensor] | None:
        found = self.journal.read(self._key(number)) if self.journal is not None else None
        return None if found is None else found[1]

    def save(self, number: int, solved: dict[str, Tensor]) -> None:
        if self.journal is not None:
            self.journal.write(self._key(number), {}, solved)
