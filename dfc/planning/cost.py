"""What a node costs: arithmetic, bytes moved, and the time of both on a device.

Time is the longer of computing and moving (the roofline), plus what starting a kernel takes, which
differs by the operator's class (`kinds`); a GPU's are started while others run, so that there it is
the longer of both. A matrix product of sides m, n and k is charged for a larger one, by the
device's grain: small sides leave it idle (`padding`). Bytes that fit the cache move at its speed;
results that malloc maps anew each time take their page faults. Convolutions change layouts before
they compute, so their bytes come on top; small ones on a processor unfold their input and multiply
instead, as PyTorch chooses. Views are free where nobody measured them. Measured times take the
place of all this where there are some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any

from dfc.errors import DfcError
from dfc.ir.expr import evaluate
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.op import DeclaredOp
from dfc.ir.types import TensorType
from dfc.planning.kinds import EACH, INDEXED, INNER, KINDS, VIEWS
from dfc.planning.machine import Device

Sizes = Mapping[str, int]
# Larger allocations are mapped and unmapped each time. Source: glibc, DEFAULT_MMAP_THRESHOLD_MAX.
MAPPED = 32 << 20


@dataclass(frozen=True)
class Work:
    """One node's work: flops (a fused multiply and add is two), and bytes, each moved once."""

    flops: float
    read: float
    written: float
    dtype: str  # what is computed in
    kind: str = "plain"  # view, matmul, conv, unfold, attention, or another of `kinds`
    sides: tuple[float, float, float] | None = None  # m, n, k of a matrix product
    matrices: float = 1.0  # products of a batch, heads of attention
    inner: int = 0  # more operators that run inside
    fresh: float = 0.0  # bytes of results that are mapped for it

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def seconds(self, device: Device) -> float:
        """The time on a device: its work and its start, one after the other or side by side."""
        work, start = self.working(device), self.launching(device)
        return max(work, start) if device.ahead else work + start

    def working(self, device: Device) -> float:
        """Seconds of the work alone, by the device's roofline."""
        computing, moving = self.computing(device), self.moving(device)
        together = self.kind == "conv" and device.layout_bandwidth
        return computing + moving if together else max(computing, moving)

    def computing(self, device: Device) -> float:
        """Seconds of arithmetic, small sides padded."""
        if not self.flops:
            return 0.0
        padded = self.flops * self._padding(device)
        return padded / device.rate(self.kind, self.dtype)

    def _padding(self, device: Device) -> float:
        return padding(device.grain, device.kind, self.kind, self.sides) if self.sides else 1.0

    def moving(self, device: Device) -> float:
        mapping = self.fresh / device.fresh_bandwidth
        if self.kind == "conv" and device.layout_bandwidth:
            return self.bytes / device.layout_bandwidth + mapping
        return device.moving(self.bytes) + mapping

    def launching(self, device: Device) -> float:
        each = device.each_product if self.kind == "matmul" else device.each_matrix
        more = self.matrices * each if self.matrices > 1 else 0.0
        return device.launching(self.kind) + more + self.inner * device.launch


def padding(grain: float, device: str, kind: str, sides: tuple[float, float, float]) -> float:
    """How many times its flops a product is charged for on a kind of device.

    A processor's kernels for products take a block of columns or waste it, and rows almost one by
    one; what is contracted, and the sides of other kernels, are charged for the grain on top.
    """
    m, n, k = (max(side, 1.0) for side in sides)
    if kind == "matmul" and device == "cpu":
        return (1 + grain / 4 / m) * max(1.0, 4 * grain / n) * (1 + grain / k)
    return (1 + grain / m) * (1 + grain / n) * (1 + grain / k)


def default_sizes(graph: Graph, given: Sizes | None = None) -> dict[str, int]:
    """A number for every symbol: the given ones, else 1 or the least that its range allows; for
    a size that data decides, the most that it can be.

    Raises:  DfcError N040 for a size that the graph does not have, or not in its range.
    """
    sizes = {name: max(1, low) for name, (low, _) in graph.ranges.items()}
    binds = (b for node in graph.walk() for b in node.binds)
    sizes.update({b.symbol: max(1, b.low or 0) if b.high is None else b.high for b in binds})
    for name, value in (given or {}).items():
        if name not in sizes:
            have = ", ".join(sizes) or "none: its shapes are fixed"
            raise DfcError("N040", f"the graph has no size `{name}`", help=f"it has {have}")
        low, high = graph.ranges.get(name, (0, None))
        if not isinstance(value, Integral) or not low <= value <= (value if high is None else high):
            shown = f"at least {low}" if high is None else f"{low}..{high}"
            message = f"`{name}` is {value!r}, outside its range {shown}"
            raise DfcError("N040", message, status=2)
        sizes[name] = int(value)
    return sizes


def bytes_of(x: Any, sizes: Sizes) -> float:
    """The bytes of a value's type, 0 for numbers and None."""
    type = x.type if isinstance(x, Value) else x
    if not isinstance(type, TensorType):
        return 0.0
    # Numbers are multiplied, not expressions: that is a tenth of the time.
    return prod((number(d, sizes) for d in type.shape), start=float(type.dtype.itemsize))


def number(size: Any, sizes: Sizes) -> float:
    """A size with its symbols bound."""
    if isinstance(size, int | float):
        return float(size)
    found = evaluate(size, sizes)
    if not isinstance(found, int | float):
        raise DfcError("N041", f"`{size}` depends on data: say what to plan for", help="--size")
    return float(found)


def work_of(node: Node, sizes: Sizes) -> Work:
    """What one node does, nothing for views."""
    name = node.op.split(".")[1] if "." in node.op else node.op
    dtype = _dtype(node)
    passes = name == "dropout" and not node.attributes.get("train")
    if node.op.startswith("aten.") and (name in VIEWS or passes):
        return Work(0.0, 0.0, 0.0, dtype, "view")
    if not any(isinstance(v.type, TensorType) for v in node.results):
        return Work(0.0, 0.0, 0.0, dtype, "view")
    read = sum(_read(node, v, sizes) for v in node.operands)
    written = sum(bytes_of(r, sizes) for r in node.results)
    sides = _SIDES[name](node, sizes) if name in _SIDES else None
    kind = "unfold" if _unfolds(node, name, sizes) else KINDS.get(name, "plain")
    return Work(
        _flops(node, name, sizes), read, written, dtype, kind, sides,
        _matrices(node, kind, sizes), _inner(node, name, sizes), _fresh(node, sizes),
    )  # fmt: skip


def _inner(node: Node, name: str, sizes: Sizes) -> int:
    """Operators inside a composite one; a mask of attention is turned into numbers to add."""
    if name == "scaled_dot_product_attention":
        return 2 if len(node.inputs) > 3 and node.inputs[3] is not None else 0
    if name == "matmul":  # of batches: both are flattened
        return 1 if len(_shape(node.inputs[1], sizes)) > 2 else 0
    return INNER.get(name, 0)


def _fresh(node: Node, sizes: Sizes) -> float:
    """Bytes of results that malloc does not keep for the next one when they are freed."""
    all_sizes = (bytes_of(r, sizes) for r in node.results)
    return sum(size for size in all_sizes if size > MAPPED)


def _read(node: Node, value: Value, sizes: Sizes) -> float:
    """A table is read where it is looked up, everything else as a whole."""
    base = node.op.split(".")[1] if "." in node.op else node.op
    if base in ("embedding", "index_select", "index", "gather") and value is node.inputs[0]:
        return min(bytes_of(value, sizes), sum(bytes_of(r, sizes) for r in node.results))
    return bytes_of(value, sizes)


def _dtype(node: Node) -> str:
    for value in (*node.results, *node.operands):
        if isinstance(value.type, TensorType):
            return value.type.dtype.name
    return "f32"


def _flops(node: Node, name: str, sizes: Sizes) -> float:
    if isinstance(node.info, DeclaredOp) and hasattr(node.info.cls, "cost"):
        types = [v.type if isinstance(v, Value) else None for v in node.inputs]
        return number(node.info.instance(node.attributes).cost(*types).flops, sizes)
    counted = _COUNTED.get(name)
    if counted is not None:
        return counted(node, sizes)
    kind = KINDS.get(name)
    if kind == "reduce":
        return _reduction(node, name, sizes)
    if kind == "gather" and name not in INDEXED:
        return 0.0
    elements = sum(prod(_shape(r, sizes)) for r in node.results)
    if name == "pow" and node.attributes.get("exponent") in (0.5, -0.5, -1, -2, 2, 3):
        return float(elements)  # no logarithm is taken
    return float(elements * EACH.get(name, 1))


def _reduction(node: Node, name: str, sizes: Sizes) -> float:
    """Each element that is read, and what a result takes however few it is of; variances are of
    running sums."""
    read, results = prod(_shape(node.inputs[0], sizes)), prod(_shape(node.results[0], sizes))
    return (46 if name.startswith(("var", "std")) else 1) * read + 70 * results


def _shape(value: Any, sizes: Sizes) -> list[float]:
    type = value.type if isinstance(value, Value) else None
    return [number(d, sizes) for d in type.shape] if isinstance(type, TensorType) else [0.0]


def _matmul(node: Node, sizes: Sizes) -> float:
    """Twice the outputs times the contracted dimension of the first matrix operand."""
    return 2 * prod(_shape(node.results[0], sizes)) * _shape(node.inputs[0], sizes)[-1]


def _addmm(node: Node, sizes: Sizes) -> float:
    return 2 * prod(_shape(node.results[0], sizes)) * _shape(node.inputs[1], sizes)[-1]


def _convolution(node: Node, sizes: Sizes) -> float:
    """Each output (of a transposed one, each input) meets one filter of its group."""
    weight = _shape(node.inputs[1], sizes)
    at = node.inputs[0] if node.attributes.get("transposed", False) else node.results[0]
    return 2 * prod(_shape(at, sizes)) * prod(weight[1:])


def _pool(node: Node, sizes: Sizes) -> float:
    """A window for each output; a maximum also remembers its place."""
    window = node.attributes.get("kernel_size", (1,))
    each = prod(window) if isinstance(window, tuple | list) else float(window)
    return prod(_shape(node.results[0], sizes)) * each * (25 if "max" in node.op else 10)


def _softmax(node: Node, sizes: Sizes) -> float:
    """What an element takes, and what a row takes however short it is."""
    shape = _shape(node.results[0], sizes)
    elements, row = prod(shape), max(shape[-1], 1.0) if shape else 1.0
    return 12 * elements + 600 * elements / row


def _attention(node: Node, sizes: Sizes) -> float:
    """Scores and their product with the values."""
    q, k = _shape(node.inputs[0], sizes), _shape(node.inputs[1], sizes)
    v = _shape(node.inputs[2], sizes)
    scores = prod(q[:-1]) * k[-2]
    return 2 * scores * q[-1] + 2 * scores * v[-1] + 12 * scores


_COUNTED: Mapping[str, Callable[[Node, Sizes], float]] = {
    "linear": _matmul, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "mv": _matmul,
    "grouped_mm_fallback": _matmul, "_grouped_mm": _matmul,
    "addmm": _addmm, "baddbmm": _addmm,
    "convolution": _convolution, "conv1d": _convolution, "conv2d": _convolution,
    "conv3d": _convolution, "conv_transpose2d": _convolution,
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax, "_softmax": _softmax, "log_softmax": _softmax, "_log_softmax": _softmax,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"), _pool),
}  # fmt: skip


def _matmul_sides(node: Node, sizes: Sizes) -> tuple[float, float, float]:
    """Of each of a batch's matrices; a linear layer's rows are one matrix."""
    first, second = node.inputs[-2:] if "add" in node.op else node.inputs[:2]
    left, right = _shape(first, sizes), _shape(second, sizes)
    out = _shape(node.results[0], sizes)
    is_one = len(right) == 2
    rows = prod(out[:-1]) if is_one else (out[-2] if len(out) > 1 else 1.0)
    return rows, out[-1] if out else 1.0, left[-1] if left else 1.0


def _matrices(node: Node, kind: str, sizes: Sizes) -> float:
    """How many products an operator is made of: of a batch, or of heads."""
    name = node.op.split(".")[1] if "." in node.op else node.op
    if kind != "attention" and name not in ("matmul", "bmm", "baddbmm"):
        return 1.0
    if kind != "attention" and len(_shape(node.inputs[-1], sizes)) < 3:
        return 1.0
    return prod(_shape(node.results[0], sizes)[:-2])


def _attention_sides(node: Node, sizes: Sizes) -> tuple[float, float, float]:
    q, k = _shape(node.inputs[0], sizes), _shape(node.inputs[1], sizes)
    return q[-2], k[-2], q[-1]


def _convolution_sides(node: Node, sizes: Sizes) -> tuple[float, float, float]:
    """As the product of an unfolded input: places, filters, and what a filter sees."""
    out, weight = _shape(node.results[0], sizes), _shape(node.inputs[1], sizes)
    return prod(out) / max(out[1], 1.0), weight[0], prod(weight[1:])


def _transposed_sides(node: Node, sizes: Sizes) -> tuple[float, float, float]:
    """As the product that is folded: places of the input, what each writes, its channels."""
    x, weight = _shape(node.inputs[0], sizes), _shape(node.inputs[1], sizes)
    return prod(x) / max(x[1], 1.0), prod(weight[1:]), weight[0]


def _unfolds(node: Node, name: str, sizes: Sizes) -> bool:
    """Whether PyTorch's processor kernels unfold instead of calling oneDNN, on one thread.

    Source:  aten/src/ATen/native/Convolution.cpp, use_mkldnn.
    """
    if name != "conv2d":
        return False
    x, weight = _shape(node.inputs[0], sizes), _shape(node.inputs[1], sizes)
    window, groups = weight[2:], node.attributes.get("groups", 1)
    moves = [v for k in ("stride", "dilation") for v in node.attributes.get(k, ())]
    is_product = all(v == 1 for v in (*moves, *window)) and x[0] < 16
    is_small = groups == 1 and max(window) <= 3 and x[0] <= 1 and prod(x) <= 20480
    return is_product or is_small


_SIDES: Mapping[str, Callable[[Node, Sizes], tuple[float, float, float]]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"), _matmul_sides),
    "scaled_dot_product_attention": _attention_sides,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution_sides),
    "conv_transpose2d": _transposed_sides,
}
