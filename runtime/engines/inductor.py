"""torch.compile's backend on the emitted module: fused C++ or Triton kernels.

Weights are constants to it (freezing), so that it packs and folds them. What it compiles lies in
dfc's own folder of the user's cache, unless TORCHINDUCTOR_CACHE_DIR says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.engine import Engine, Runner
from dfc.runtime.modes import as_captured

# What torch.compile's mode "max-autotune" sets; its CUDA graphs are `:cuda_graph`.
MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}


class Inductor(Engine):
    """Compiles the whole graph without breaks, for half a minute and more."""

    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, name: str = "inductor", **options: Any) -> None:
        self.name = name
        self.options = options

    @property
    def variants(self) -> Mapping[str, Engine]:
        """On GPUs: replayed as one CUDA graph, and with kernels chosen by measuring."""
        from dfc.runtime.cuda_graph import CudaGraph

        measured = Inductor("inductor:max_autotune", **MAX_AUTOTUNE)
        return {
            "cuda_graph": CudaGraph(self),
            "max_autotune": measured,
            "max_autotune:cuda_graph": CudaGraph(measured),
        }

    def supports(self, node: Node) -> str | None:
        if node.graphs:
            return "control flow is run by the `eager` engine"
        return None

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        import torch

        from dfc.emit.checks import checked, lift_checks
        from dfc.emit.fx import to_fx
        from dfc.runtime.allocation import keep_pages
        from dfc.runtime.kernels.graph import kernels

        if device == "cpu":
            keep_pages()
        for node in graph.nodes:
            reason = self.supports(node)
            if reason:
                raise DfcError("K003", f"engine `{self.name}` cannot run `{node.op}`: {reason}")
        use_own_cache()
        lifted, messages = lift_checks(graph)
        module = to_fx(lifted, device, kernels(device, traced=True))
        dynamic = bool(graph.ranges) or any(n.binds for n in graph.nodes)
        options: dict[str, Any] = {"freezing": device == "cpu", **self.options}
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, options=options)
        patch = torch._dynamo.config.patch(
            capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
        )

        def run(inputs: Sequence[Any]) -> list[Any]:
            with as_captured(), patch:
                return list(compiled(*inputs))

        return checked(run, len(graph.outputs), messages)


def use_own_cache() -> None:
    """Compiled code is loaded again later: not from a folder that others may write to.

    Why:  torch's default is a folder of a known name below /tmp, and importing inductor writes it
          into the environment: it stands there though nobody asked for it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from dfc.rewrite.proofs import cache_folder

    folder = cache_folder("inductor")
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is not None and given in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


ENGINE = Inductor()
