"""Code under `torch.no_grad()`: what it makes has no derivatives, however it is captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_HOLDER = "wrap_with_set_grad_enabled"


def keep_out_gradients(module: fx.GraphModule) -> None:
    """Let code under `no_grad` read its tensors without their derivatives, here and further in.

    Why:  run_decompositions takes the wrapper away. It is the inputs that are detached, since such
          code may write to buffers (spectral norm) and return nothing.
    """
    for inner in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        holders = [n for n in inner.graph.nodes if _stops(n)]
        for node in holders:
            for x in [x for x in node.all_input_nodes if _has_derivative(x)]:
                with inner.graph.inserting_before(node):
                    made = inner.graph.call_function(torch.ops.aten.detach.default, (x,))
                made.meta["val"] = x.meta["val"].detach()
                node.replace_input_with(x, made)
        if holders:
            inner.recompile()


def _stops(node: fx.Node) -> bool:
    name = getattr(node.target, "name", None)
    return callable(name) and name() == _HOLDER and node.args[0] is False


def _has_derivative(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
