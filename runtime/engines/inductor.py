"""torch.compile's backend on the emitted module: fused C++ or Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.engine import Engine, Runner


class Inductor(Engine):
    """Compiles the whole graph without breaks; compiled kernels live in torch's own cache."""

    name = "inductor"
    devices = ("cpu", "cuda")

    def supports(self, node: Node) -> str | None:
        if node.graphs:
            return "control flow is run by the `eager` engine"
        return None

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        import torch

        from dfc.emit.checks import checked, lift_checks
        from dfc.emit.fx import to_fx
        from dfc.runtime.kernels.graph import kernels

        for node in graph.nodes:
            reason = self.supports(node)
            if reason:
                raise DfcError("K003", f"engine `inductor` cannot run `{node.op}`: {reason}")
        lifted, messages = lift_checks(graph)
        module = to_fx(lifted, device, kernels(device))
        dynamic = bool(graph.ranges) or any(n.binds for n in graph.nodes)
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
        patch = torch._dynamo.config.patch(
            capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
        )

        def run(inputs: Sequence[Any]) -> list[Any]:
            with torch.no_grad(), patch:
                return list(compiled(*inputs))

        return checked(run, len(graph.outputs), messages)


ENGINE = Inductor()
