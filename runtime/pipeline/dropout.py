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
from dfc.ir.types import TensorType

if TYPE_CHECKING:
    import torch

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

    Raises:  DfcError N071 for one that draws whole channels, or that the mask's reader needs.
    """
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
        made = graph.add("aten.mul.Tensor", [source, mask], types=[type], before=node,
                         stage=node.stage, loc=node.loc)  # fmt: skip
        graph.replace_uses(node.results[0], made.result)
        graph.erase(node)
    return found


def _plain(node: Node) -> bool:
    mask_is_read = len(node.results) > 1 and node.results[1].use_count > 0
    return not node.op.startswith("aten.feature") and not mask_is_read
