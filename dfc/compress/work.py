"""What a graph takes to run, before it is run: multiply-adds, bytes of weights, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.compress.axes import leaves
from dfc.compress.choice import Part
from dfc.compress.dimensions import Analysis
from dfc.errors import DfcError
from dfc.ir.expr import Size, evaluate
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType
from dfc.planning import cost
from dfc.planning.here import here
from dfc.planning.machine import Device

_SEEN = 128  # a size that nothing tells


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one call, bytes of the weights that it reads, and its time on a device.

    Units:  `seconds` are those of the device's roofline, 0 where no device is known.
    """

    macs: int
    weight_bytes: int
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.macs / 1e6:.4g} M multiply-adds, {self.weight_bytes / 1e6:.4g} MB of weights"


def forecast(before: Work, after: Work, device: Device | None) -> str:
    """What is saved, in words, before anything is timed."""
    macs = after.macs / before.macs if before.macs else 1.0
    weights = after.weight_bytes / before.weight_bytes if before.weight_bytes else 1.0
    saved = f"{1 - macs:.1%} fewer multiply-adds, {1 - weights:.1%} fewer bytes"
    if device is None or not after.seconds:
        return f"predicted {before} -> {after}: {saved}"
    faster = before.seconds / after.seconds
    return f"predicted {faster:.2f}x as fast by the roofline of {device.name}, {saved}: " + (
        f"{before} -> {after}"
    )


def device_of(target: Any) -> Device | None:
    """What times are predicted for: the target's first device, else this host's processors."""
    if target is None:
        return here().devices[-1]
    try:
        return target.machine().devices[0]  # type: ignore[no-any-return]
    except DfcError:  # its facts say too little for times
        return None


def work_of(
    graph: Graph, examples: Sequence[Sequence[Any]] = (), device: Device | None = None
) -> Work:
    """What a call takes, at the sizes of the first example; open sizes are 1 or 128 without one."""
    sizes = _sizes(graph, examples)
    total: Size = 0
    for node in graph.nodes:
        total = total + macs_of(node)
    found = evaluate(total, sizes)
    weights = sum(p.tensor_type.nbytes for p in graph.parameters.values() if p.use_count)
    seconds = 0.0
    if device is not None:
        seconds = sum(cost.work_of(n, sizes).seconds(device) for n in graph.nodes)
    return Work(int(found), int(weights), seconds)  # type: ignore[arg-type]


def parts_of(
    analysis: Analysis, examples: Sequence[Sequence[Any]], device: Device | None
) -> list[Part]:
    """What each node takes, and the axes that it grows with; multiply-adds without a device."""
    sizes = _sizes(analysis.graph, examples)
    found = []
    for node in analysis.graph.nodes:
        if device is not None:
            taken = cost.work_of(node, sizes).seconds(device)
        else:
            taken = float(evaluate(macs_of(node), sizes))  # type: ignore[arg-type]
        values = [*node.operands, *node.results]
        axes = (x for v in values if v in analysis.dims for axis in analysis.dims[v]
                for x in leaves(axis))  # fmt: skip
        found.append(Part(taken, frozenset(axes)))
    return found


def _sizes(graph: Graph, examples: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
    known = bind_inputs(graph, examples[0]) if examples else {}
    sizes: dict[str, Any] = {}
    names = {s for n in graph.nodes for r in n.results for s in r.type.symbols}
    names |= {s for v in graph.inputs for s in v.type.symbols}
    for at, name in enumerate(sorted(names | set(graph.ranges))):
        low, high = graph.ranges.get(name, (1, None))
        guess = max(low, 1 if at == 0 else _SEEN)
        sizes[name] = known.get(name, guess if high is None else min(guess, high))
    return sizes


def macs_of(node: Node) -> Size:
    """Multiply-adds of products of matrices and convolutions; other ops have none that count."""
    op = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    rule = _RULES.get(op)
    return rule(node) if rule is not None else 0


def _type(node: Node, i: int) -> TensorType:
    x = node.inputs[i]
    assert x is not None and not isinstance(x, tuple)
    return x.tensor_type


def _linear(node: Node) -> Size:
    return _type(node, 0).numel * _type(node, 1).shape[0]


def _product(node: Node, i: int = 0) -> Size:
    return node.result.tensor_type.numel * _type(node, i).shape[-1]


def _each(weight: TensorType) -> Size:
    """Elements for each index of the first dimension."""
    return weight.with_shape(weight.shape[1:]).numel


def _conv(node: Node) -> Size:
    weight = _type(node, 1)
    if node.attributes.get("transposed", False) or "transpose" in node.op:
        return _type(node, 0).numel * _each(weight)
    return node.result.tensor_type.numel * _each(weight)


def _attention(node: Node) -> Size:
    q, k, v = (_type(node, i) for i in range(3))
    return q.numel * k.shape[-2] + node.result.tensor_type.numel * v.shape[-2]


_RULES = {
    "linear": _linear,
    "dfc.linear_gelu": _linear,
    "matmul": _product, "mm": _product, "bmm": _product, "mv": _product,
    "transformers.grouped_mm_fallback.default": _product, "_grouped_mm": _product,
    "addmm": lambda node: _product(node, 1), "baddbmm": lambda node: _product(node, 1),
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "convolution": _conv,
    "conv_transpose1d": _conv, "conv_transpose2d": _conv, "conv_transpose3d": _conv,
    "scaled_dot_product_attention": _attention,
    "dfc.multi_head_attention": _attention,
}  # fmt: skip
