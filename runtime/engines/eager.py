"""The reference engine: PyTorch runs the graph operator by operator. It always works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.ir.graph import Graph, Node
from dfc.planning.engine import Engine, Runner


class Eager(Engine):
    """Runs the graph as an `fx.GraphModule`."""

    name = "eager"
    devices = ("cpu", "cuda")

    def supports(self, node: Node) -> str | None:
        return None

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        import torch

        from dfc.emit.fx import to_fx
        from dfc.runtime.kernels.graph import kernels

        module = to_fx(graph, device, kernels(device))

        def run(inputs: Sequence[Any]) -> list[Any]:
            with torch.no_grad():
                return list(module(*inputs))

        return run


ENGINE = Eager()
