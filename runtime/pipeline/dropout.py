"""Dropout whose masks do not depend on how a model is cut: they are inputs, drawn by counters.

PyTorch draws masks from one stream in the order of execution, which stages and microbatches change.
Here each mask has a seed of its own, made of the run's seed, the step, the place of the operator in
the graph, and the microbatch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.ir.expr import evaluate
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.builder import Builder

if TYPE_CHECKING:
    import torch

_ATTENTION = "aten.scaled_dot_product_attention.default"
_DROPOUTS = ("aten.dropout.default", "aten.native_dropout.default", "aten.feature_dropout.default")


@dataclass(frozen=True)
class Mask:
    """One dropout: its number in the graph, its type, and how much of it is zero."""

    number: int
    type: TensorType
    p: float

    def draw(self, seed: int, step: int, microbatch: int, sizes: Mapping[str, int]) -> torch.Tensor:
        """Zeros, and 1/(1-p) elsewhere; the same for the same four numbers."""
        import torch

        counter = f"{seed} {step} {self.number} {microbatch}".encode()
        own = int.from_bytes(hashlib.sha256(counter).digest()[:8], "little") >> 1
        shape = [int(evaluate(s, sizes)) for s in self.type.shape]  # type: ignore[arg-type]
        mask = torch.empty(shape, dtype=self.type.dtype.to_torch())
        if self.p >= 1:
            return mask.zero_()
        mask.bernoulli_(1 - self.p, generator=torch.Generator().manual_seed(own))
        return mask.div_(1 - self.p)


def masked(graph: Graph) -> dict[Value, Mask]:
    """Let every dropout that is on multiply by a mask, which becomes an input after all others.

    Attention that drops out is written in its parts first.
    Raises:  DfcError N071 for one that draws whole channels, or is inside control flow.
    """
    for node in [n for n in graph.nodes if n.op == _ATTENTION and not n.pure]:
        graph.replace(node, [_in_parts(graph, node)])
    found: dict[Value, Mask] = {}
    for node in [n for n in graph.walk() if n.op.startswith(_DROPOUTS) and not n.pure]:
        if node.graph is not graph or not _plain(node):
            raise DfcError(
                "N071", f"`{node.op}` ({node.loc or 'unknown place'}) cannot be trained in stages",
                help="use nn.Dropout outside of control flow",
            )  # fmt: skip
        source = node.inputs[0]
        assert isinstance(source, Value)
        type, p = source.tensor_type, float(node.attributes["p"])
        mask = graph.add_input(graph.fresh_name("mask"), type)
        found[mask] = Mask(len(found), type, p)
        graph.replace_uses(node.results[0], Builder(graph, node)("aten.mul.Tensor", source, mask))
        graph.erase(node)
    return found


def _plain(node: Node) -> bool:
    mask_is_read = len(node.results) > 1 and node.results[1].use_count > 0
    return not node.op.startswith("aten.feature") and not mask_is_read


def _in_parts(graph: Graph, node: Node) -> Value:
    """`dropout(softmax(q @ k.T * scale + mask)) @ v`.

    Source:  the definition in the documentation of torch's scaled_dot_product_attention.
    """
    a, b = node.attributes, Builder(graph, node)
    q, k, v, mask = node.inputs[:4]
    assert isinstance(q, Value) and isinstance(k, Value) and isinstance(v, Value)
    width = q.tensor_type.shape[-1]
    if a.get("enable_gqa") or not isinstance(width, int):
        raise DfcError("N071", f"attention with dropout ({node.loc or 'unknown place'}) is trained "
                       "in stages with as many keys as queries, and one width")  # fmt: skip
    scale = a["scale"] if a.get("scale") is not None else width**-0.5
    keys = b("aten.transpose.int", b("aten.mul.Scalar", k, other=scale), dim0=-2, dim1=-1)
    scores = b("aten.matmul.default", q, keys)
    if a["is_causal"]:
        size = scores.tensor_type.shape[-2:]
        ones = b("aten.ones.default", size=size, dtype=DTYPES["bool"])
        mask = b("aten.tril.default", ones)
    if isinstance(mask, Value) and mask.tensor_type.dtype == DTYPES["bool"]:
        hidden = b("aten.logical_not.default", mask)
        scores = b("aten.masked_fill.Scalar", scores, hidden, value=float("-inf"))
    elif isinstance(mask, Value):
        scores = b("aten.add.Tensor", scores, mask)
    shares = b("aten.softmax.int", scores, dim=-1)
    kept = b("aten.dropout.default", shares, p=a["dropout_p"], train=True)
    return b("aten.matmul.default", kept, v)
