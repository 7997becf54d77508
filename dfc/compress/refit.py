"""Refit what reads a pruned group: least squares from what stays to what came out before.

W' = (Y X_S^T)(X_S X_S^T + l I)^-1 with Y = W X: the second moments of X are all that is needed of
the data. A bias takes part as a column of ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.axes import Kept, kept_mask
from dfc.compress.calibrate import observe
from dfc.compress.dimensions import Use
from dfc.compress.groups import Group, Groups
from dfc.compress.shrink import replace_data
from dfc.ir.graph import Graph, Parameter, Value
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

_DAMPING = 1e-4  # of the mean of the diagonal
_WIDEST = 8192  # a matrix of second moments of this width has 512 MiB


class SecondMoments:
    """X X^T over all rows of a value, with a row of ones below."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        import torch

        rows = x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim])
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        found = (rows.T @ rows).double()
        self.sum = found if self.sum is None else self.sum + found

    def state(self) -> dict[str, Tensor]:
        return {} if self.sum is None else {"sum": self.sum}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.sum = state.get("sum")


@dataclass
class Refit:
    """One layer that will be refitted: its weights as they were, and what it read."""

    use: Use
    weight: Parameter
    bias: Parameter | None
    before: Tensor
    bias_before: Tensor | None
    moments: SecondMoments

    def run(self, graph: Graph, rows: Sequence[bool], columns: Sequence[bool]) -> None:
        """Solve for the columns that stay; only the rows that stay are needed."""
        import torch

        stay = torch.tensor(list(columns)).nonzero().flatten()
        out = torch.tensor(list(rows)).nonzero().flatten()
        whole = self.before.flatten(1).double()[out]
        gram = self.moments.sum
        assert gram is not None
        n = whole.shape[1]
        if self.bias_before is not None:
            whole = torch.cat([whole, self.bias_before.double()[out, None]], 1)
            stay = torch.cat([stay, torch.tensor([n])])
        else:
            gram = gram[:n, :n]
        inner = gram[stay][:, stay]
        inner = inner + torch.eye(len(stay)).double() * (_DAMPING * inner.diagonal().mean())
        solved = torch.linalg.solve(inner, (whole @ gram[:, stay]).T).T
        dtype = self.before.dtype
        if self.bias is not None:
            replace_data(graph, self.bias, solved[:, -1].to(dtype).contiguous())
            solved = solved[:, :-1]
        kernel = self.before.shape[2:]  # of single pixels
        solved = solved.to(dtype).reshape(*solved.shape, *kernel).contiguous()
        replace_data(graph, self.weight, solved)


def prepare(groups: Groups, chosen: Sequence[Group], batches: Any, ctx: Context) -> list[Refit]:
    """What can be refitted, with the second moments of what it reads, before anything shrinks."""
    moments: dict[Value, SecondMoments] = {}
    found: dict[Parameter, Refit] = {}
    for g in chosen:
        for use in g.readers:
            made = _refit(use, moments)
            if made is not None:
                found.setdefault(made.weight, made)
    observe(groups.analysis.graph, batches, moments, ctx, "second moments")
    return list(found.values())


def _refit(use: Use, moments: dict[Value, SecondMoments]) -> Refit | None:
    """A linear layer, or a convolution of single pixels, whose weights nothing else reads."""
    node, weight, source = use.node, use.parameter, use.source
    kernel = () if weight is None else weight.tensor_type.shape[2:]
    plain = node.op.startswith(("aten.linear.", "aten.conv"))
    if weight is None or source is None or not plain or node.inputs[1] is not weight:
        return None
    bias = node.inputs[2]
    single = use.dim == 1 and all(k == 1 for k in kernel) and weight.use_count == 1
    padded = any(node.attributes.get("padding", ()) or ())
    owned = bias is None or (isinstance(bias, Parameter) and bias.use_count == 1)
    width = weight.tensor_type.shape[1]
    if not single or padded or not owned or not isinstance(width, int) or width > _WIDEST:
        return None
    assert weight.data is not None
    held = moments.setdefault(source, SecondMoments(use.source_dim - source.tensor_type.rank))
    kept = bias if isinstance(bias, Parameter) else None
    return Refit(
        use, weight, kept, weight.data.tensor(),
        kept.data.tensor() if kept is not None and kept.data is not None else None, held,
    )  # fmt: skip


def refit(groups: Groups, refits: Sequence[Refit], stays: Kept) -> int:
    """Solve each one, after the graph has shrunk; how many there were."""
    for r in refits:
        rows, columns = groups.analysis.dims[r.weight][:2]
        r.run(groups.analysis.graph, kept_mask(rows, stays), kept_mask(columns, stays))
    return len(refits)
