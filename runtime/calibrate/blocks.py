"""Blocks of mixed operators: what is left to start one when another one was started before it.

A chain of one operator finds its code and its operands in the caches of the processor, a model's
operators do not, and a model also reads parameters and sizes. So times to start are taken from
nodes of small blocks, where they stand, and rates are slowed so that the model of costs says of
these blocks with many items what they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs
from dfc.planning.cost import Work, work_of

_FEW, _MANY = 2, 64  # items of a batch: nothing to compute, and as much as small models have


@dataclass(frozen=True)
class Block:
    """A traced module with the inputs that it is measured on."""

    graph: Graph
    inputs: Sequence[Any]

    @cached_property
    def works(self) -> list[Work]:
        sizes = bind_inputs(self.graph, self.inputs)
        return [work_of(n, sizes) for n in self.graph.nodes]


@cache
def blocks() -> Mapping[str, Block]:
    """An encoder, convolutions with their norms, lookups; and each with many items."""
    import torch

    ids = torch.arange(_FEW * 8).reshape(_FEW, 8)
    made = {
        "encoder": _traced(_encoder(), torch.ones(_FEW, 8, 32)),
        "convolutions": _traced(_convolutions(), torch.ones(_FEW, 8, 16, 16)),
        "lookups": _traced(_lookups(), ids),
    }
    return made | {f"many {name}": _many(block) for name, block in made.items()}


def _traced(model: Any, x: Any) -> Block:
    import torch

    from dfc.capture.torch_export import trace

    batch = torch.export.Dim("B", min=1, max=_MANY)
    with torch.random.fork_rng(devices=[]):
        return Block(trace(model.eval(), (x,), None, ({0: batch},)), [x])


def _many(block: Block) -> Block:
    (x,) = block.inputs
    return Block(block.graph, [x.repeat_interleave(_MANY // _FEW, 0)])


def _encoder() -> Any:
    import torch
    from torch import nn
    from torch.nn.functional import gelu, scaled_dot_product_attention

    class Layers(nn.Module):
        def __init__(self, width: int = 32, heads: int = 4) -> None:
            super().__init__()
            self.heads = heads
            self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def split(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                y = self.before(x)
                q, k, v = (self.split(f(y)) for f in (self.q, self.k, self.v))
                y = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
                x = x + self.out(y)
                x = x + self.down(gelu(self.up(self.after(x)), approximate="tanh"))
            return x

    return Layers()


def _convolutions() -> Any:
    from torch import nn

    def part(width_in: int, width: int, window: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(width_in, width, window, stride, padding=window // 2, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    shapes = ((8, 8, 3, 1), (8, 16, 3, 2), (16, 16, 1, 1), (16, 16, 3, 1), (16, 24, 1, 1))
    return nn.Sequential(*(m for shape in shapes for m in part(*shape)))


def _lookups() -> Any:
    """A table, the best places of a row, masks, root mean squares: what decoders do beside."""
    import torch
    from torch import nn

    class Lookups(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.table = nn.Embedding(8 * _MANY, width)

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.scaled(self.table(ids))
            places = x.sum(-1).topk(4, -1).indices
            wide = places.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            found = torch.cat([x.gather(1, wide), self.table.weight[places]], 1)
            here = torch.arange(8, device=ids.device)[None, :, None] < 6
            kept = torch.where(here, self.scaled(found), found.amax(-1, keepdim=True))
            return torch.cat([x, kept], -1).softmax(-1)

    return Lookups()
