"""Blocks of mixed operators: what is left to start one when another one was started before it.

A chain of one operator finds its code in the caches of the processor, a model's operators do not,
and a model also reads parameters and sizes. Times to start are stretched so that the model of costs
says of these blocks what they take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs
from dfc.planning.cost import Work, work_of
from dfc.planning.machine import Device
from dfc.runtime.calibrate.sampling import Reading

_LEAST, _MOST = 0.5, 4.0  # of a stretch; beyond, something else is wrong


@dataclass(frozen=True)
class Block:
    """A traced module with the inputs that it is measured on."""

    graph: Graph
    inputs: list[Any]

    def runner(self, device: str) -> Callable[[], None]:
        """Runs the block once on a device, and waits for it."""
        import torch

        from dfc.runtime.engines import find_engine

        run = find_engine("eager").build(self.graph, device)
        inputs = [x.to(device) for x in self.inputs]

        def once() -> None:
            run(inputs)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)

        return once

    def works(self) -> list[Work]:
        sizes = bind_inputs(self.graph, self.inputs)
        return [work_of(n, sizes) for n in self.graph.nodes]


def blocks() -> dict[str, Block]:
    """An encoder layer, and convolutions with their norms; tiny, with a dynamic batch."""
    return {"encoder": _encoder(), "convolutions": _convolutions()}


def _traced(model: Any, x: Any) -> Block:
    import torch

    from dfc.capture.torch_export import trace

    with torch.random.fork_rng(devices=[]):
        graph = trace(model.eval(), (x,), None, ({0: torch.export.Dim("B", min=1, max=64)},))
    return Block(graph, [x])


def _encoder() -> Block:
    import torch
    from torch import nn
    from torch.nn.functional import gelu, scaled_dot_product_attention

    class Layer(nn.Module):
        def __init__(self, width: int = 16, heads: int = 2) -> None:
            super().__init__()
            self.heads = heads
            self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.out, self.up, self.down = (
                nn.Linear(width, width) for _ in range(6)
            )

        def split(self, x: Any) -> Any:
            return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

        def forward(self, x: Any) -> Any:
            for _ in range(2):
                y = self.before(x)
                q, k, v = (self.split(f(y)) for f in (self.q, self.k, self.v))
                y = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
                x = x + self.out(y)
                x = x + self.down(gelu(self.up(self.after(x)), approximate="tanh"))
            return x

    return _traced(Layer(), torch.ones(2, 8, 16))


def _convolutions() -> Block:
    import torch
    from torch import nn

    def part(width_in: int, width: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    net = nn.Sequential(*part(8, 8, 1), *part(8, 16, 2), *part(16, 16, 1), *part(16, 24, 2))
    return _traced(net, torch.ones(2, 8, 8, 8))


def stretch(
    device: Device, works: Mapping[str, list[Work]], took: Mapping[str, Reading]
) -> tuple[float, float]:
    """How many times as long as alone operators take to start in a model; and convolutions.

    The encoder tells the first; what the convolutions' block then lacks is put on convolutions.
    """
    plain = _factor(device, works["encoder"], took["encoder"].value, lambda w: True)
    stretched = replace(
        device, launch=device.launch * plain,
        launches={k: v * (1 if k == "conv" else plain) for k, v in device.launches.items()},
    )  # fmt: skip
    block = works["convolutions"], took["convolutions"].value
    return plain, _factor(stretched, *block, lambda w: w.kind == "conv")


def _factor(
    device: Device, works: list[Work], seconds: float, counts: Callable[[Work], bool]
) -> float:
    """What the starts that count are to be multiplied with, so that all takes `seconds`."""
    starts = sum(w.launching(device) for w in works if counts(w))
    rest = sum(w.seconds(device) for w in works) - starts
    return min(max((seconds - rest) / starts, _LEAST), _MOST) if starts else 1.0
