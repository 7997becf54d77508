"""Which types the results of ATen ops have: by direct rules, else by fake tensors.

A type holds for all sizes within their bounds, and is asked for once for each signature.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from dfc.ir.expr import Expr, evaluate
from dfc.ir.graph import Node
from dfc.ir.types import TensorType, Type
from dfc.ops.aten import AtenOp, _resolve

# float -> same float, same shape: most nodes of most models, decided without a fake tensor
_SAME = frozenset(
    [
        "abs",
        "ceil",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "dropout",
        "elu",
        "erf",
        "exp",
        "floor",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "log",
        "log_softmax",
        "mish",
        "neg",
        "reciprocal",
        "relu",
        "relu6",
        "round",
        "rsqrt",
        "selu",
        "sigmoid",
        "sign",
        "silu",
        "sin",
        "softmax",
        "softplus",
        "sqrt",
        "tan",
        "tanh",
        "tril",
        "triu",
        "alias",
        "lift_fresh_copy",
        "layer_norm",
        "group_norm",
        "rms_norm",
    ]
)
_BROADCAST = frozenset(["add", "sub", "mul", "div", "maximum", "minimum"])


def infer(op: AtenOp, node: Node) -> tuple[Type, ...]:
    direct = _direct(op, node)
    if direct is not None:
        return (direct,)
    types = tuple(
        None if x is None else tuple(v and v.type for v in x) if isinstance(x, tuple) else x.type
        for x in node.inputs
    )
    ranges = node.graph.ranges if node.graph else {}
    free: set[str] = set(node.symbols)
    for v in node.operands:
        free |= v.type.symbols
    bounds = tuple(sorted((s, ranges.get(s, (0, None))) for s in free))
    binds = tuple(b.symbol for b in node.binds)
    if free and not binds:
        return _infer_symbolic(op.name, types, node.attributes, bounds)
    return _infer_fake(op.name, types, node.attributes, bounds, binds)


def _direct(op: AtenOp, node: Node) -> TensorType | None:
    """The type without asking PyTorch: padding, and elementwise ops on floats of one dtype."""
    first = node.inputs[0] if node.inputs else None
    if first is None or isinstance(first, tuple) or not isinstance(first.type, TensorType):
        return None
    type = first.type
    if op.name == "aten.constant_pad_nd.default":
        return _padded(type, node.attributes.get("pad"))
    if not type.dtype.is_float or node.attributes.get("dtype") is not None:
        return None
    if op._base in _SAME and op.result_lists == (False,):
        return type
    if op._base in _BROADCAST and len(node.inputs) == 2:
        second = node.inputs[1]
        if second is None or isinstance(second, tuple) or second.type == type:
            return type if second is not None else None
    if op._base in _BROADCAST and op.name.endswith(".Scalar"):
        other = node.attributes.get("other")
        return type if isinstance(other, (int, float)) else None
    return None


def _padded(type: TensorType, pad: Any) -> TensorType | None:
    """PyTorch's own rule settles for the sizes that it sees."""
    if not isinstance(pad, tuple) or len(pad) % 2 or len(pad) > 2 * type.rank:
        return None
    if not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    shape = list(type.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] = shape[-1 - i] + pad[2 * i] + pad[2 * i + 1]
    return type.with_shape(tuple(shape))


@cache
def _infer_symbolic(
    name: str,
    types: tuple[Any, ...],
    attributes: Any,
    bounds: tuple[tuple[str, tuple[int, int | None]], ...],
) -> tuple[Type, ...]:
    """The types for all sizes; fake tensors alone may settle for the size that they see.

    Raises:  ValueError when two sizes within the bounds give types that do not fit.
    """
    found = _infer_fake(name, types, attributes, bounds, ())
    for start in (2, 5):  # 0 and 1 are special to PyTorch: capture does without them, too
        sizes = {}
        for i, (symbol, (low, high)) in enumerate(bounds):
            size = max(low, start + i)
            sizes[symbol] = size if high is None else min(size, high)
        concrete = tuple(_substituted(t, sizes) for t in types)
        values = type(attributes)({k: _bound(v, sizes) for k, v in attributes.items()})
        if _infer_fake(name, concrete, values, (), ()) != _substituted(found, sizes):
            shown = ", ".join(f"{k}={v}" for k, v in sizes.items())
            raise ValueError(f"the result is not {list(found)} for every size: not for {shown}")
    return found


def _substituted(t: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(t, tuple):
        return tuple(_substituted(x, sizes) for x in t)
    return t and t.substitute(sizes)


@cache
def _infer_fake(
    name: str,
    types: tuple[Any, ...],
    attributes: Any,
    bounds: tuple[tuple[str, tuple[int, int | None]], ...],
    binds: tuple[str, ...],
) -> tuple[Type, ...]:
    """Run the operator on fake tensors. Memoised: a model repeats the same few signatures."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dfc.ops.symbolic import SymbolTable

    op = _resolve(name)
    assert isinstance(op, AtenOp)
    table = SymbolTable(dict(bounds), dynamic=bool(bounds) or bool(binds))

    def fake(t: Any) -> Any:
        if isinstance(t, tuple):
            return [fake(x) for x in t]
        if not isinstance(t, TensorType):
            return None
        shape = [table.concrete(s) for s in t.shape]
        return torch.empty(shape, dtype=t.dtype.to_torch(), device="cpu")

    # A refused operand is our caller's to report; torch would log a traceback as well.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    mode = FakeTensorMode(shape_env=table.env, allow_non_fake_inputs=False)
    try:
        with mode, torch.no_grad():
            values = {k: table.concrete_deep(v) for k, v in attributes.items()}
            results = op.run([fake(t) for t in types], values)
    finally:
        logger.setLevel(level)
    return tuple(table.type_of(r, binds) for r in results)


def sample_types(node: Node, bindings: Mapping[str, int]) -> tuple[Type, ...] | None:
    """The result types with the symbols bound to numbers; None when they depend on data.

    Cheaper than symbolic inference, and independent of it: the verifier compares with this.
    """
    op = node.info
    if not isinstance(op, AtenOp) or op._assertion:
        return None
    types = tuple(
        None
        if x is None
        else tuple(v and v.type.substitute(bindings) for v in x)
        if isinstance(x, tuple)
        else x.type.substitute(bindings)
        for x in node.inputs
    )
    attributes = node.attributes
    if node.symbols:
        attributes = type(attributes)({k: _bound(v, bindings) for k, v in attributes.items()})
    if node.binds:
        return None
    return _infer_fake(op.name, types, attributes, (), ())


def waits_for_data(error: Exception) -> bool:
    """Whether a type rule gave up since it looks at numbers: `istft` at its window's sums."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    return isinstance(error, DataDependentOutputException)


def _bound(value: Any, bindings: Mapping[str, int]) -> Any:
    if isinstance(value, tuple):
        return tuple(_bound(v, bindings) for v in value)
    return evaluate(value, bindings) if isinstance(value, Expr) else value
