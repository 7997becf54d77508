"""How far results are from those of the original, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Graph, Value

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCTS = ("linear", "addmm", "matmul", "mm", "baddbmm", "linear_w4", "linear_w8")
_THROUGH = ("view", "reshape", "_to_copy", "slice", "select", "squeeze", "unsqueeze", "dropout")


@dataclass
class Distance:
    """Sums over all float outputs of all batches.

    `relative` is the length of the difference as a share of the original's length; `cosine` the
    mean over rows; `kl` the mean Kullback-Leibler divergence of what softmax makes of rows, in
    nats, where an output is `logits`.
    """

    logits: Sequence[bool] = ()
    squares: float = 0.0
    total: float = 0.0
    cosines: float = 0.0
    rows: int = 0
    divergence: float = 0.0
    choices: int = 0
    finite: bool = True

    def add(self, results: Sequence[Any], originals: Sequence[Any]) -> None:
        """The outputs of one batch."""
        import torch

        for i, (x, o) in enumerate(zip(results, originals, strict=True)):
            if not isinstance(o, torch.Tensor) or not o.is_floating_point() or not o.numel():
                continue
            x, o = x.detach().double(), o.detach().double()
            known = o.isfinite()
            if not bool(x.isfinite()[known].all()):
                self.finite = False
                continue
            x, o = torch.where(known, x, 0.0), torch.where(known, o, 0.0)
            self.squares += float((x - o).square().sum())
            self.total += float(o.square().sum())
            if o.dim() and o.shape[-1] > 1:
                self._rows(x, o, i < len(self.logits) and self.logits[i])

    def _rows(self, x: Tensor, o: Tensor, logits: bool) -> None:
        import torch

        found = torch.nn.functional.cosine_similarity(x, o, dim=-1)
        self.cosines += float(found.sum())
        self.rows += found.numel()
        if logits:
            p, q = o.log_softmax(-1), x.log_softmax(-1)
            self.divergence += float((p.exp() * (p - q)).sum(-1).sum())
            self.choices += found.numel()

    @property
    def relative(self) -> float:
        if not self.finite:
            return math.inf
        return math.sqrt(self.squares / self.total) if self.total else math.sqrt(self.squares)

    @property
    def cosine(self) -> float | None:
        return self.cosines / self.rows if self.rows and self.finite else None

    @property
    def kl(self) -> float | None:
        if not self.choices:
            return None
        return self.divergence / self.choices if self.finite else math.inf


def logits_of(graph: Graph) -> tuple[bool, ...]:
    """Which outputs are scores that softmax makes probabilities of: products, as they come out."""
    return tuple(map(_is_product, graph.outputs))


def _is_product(v: Value) -> bool:
    node = v.node
    while node is not None and _name(node.op) in _THROUGH:
        first = next(iter(node.operands), None)
        node = first.node if first is not None else None
    return node is not None and _name(node.op) in _PRODUCTS


def _name(op: str) -> str:
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op
