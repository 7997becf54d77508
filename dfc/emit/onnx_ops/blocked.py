"""Weights in groups as standard ONNX: blocks of codes, DequantizeLinear, MatMul (opset 21).

Weights lie with inputs first, [K, N], and every product has a DequantizeLinear of its own: that is
the form of which ONNX Runtime makes its kernel MatMulNBits when it loads the file. By default that
kernel rounds each group of a row to int8, as the op with int8 activations does; a runtime that
multiplies floats is nearer to the weights' own results. Of a weight or a scale that two products
read it makes none, and unpacks it at every call: files with ONNX Runtime's own operators have the
kernel for each, and the constants once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_types import D
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.codes import OFFSET, groups_of, pack4, unpack4

if TYPE_CHECKING:
    from onnxscript import ir
    from torch import Tensor

BLOCKS = (16, 32, 64, 128, 256)  # block sizes that ONNX Runtime's kernels take
FIRST_OPSET = 21
_CLIPS = ("aten.relu", "aten.clamp", "aten.hardtanh")  # as are written as Relu and Clip


def blocked_linear(
    b: Builder, call: Call, x: Val, codes: Val, scale: Val, zero: Val | None, bias: Val | None,
    bits: int, group: int,
) -> Val:  # fmt: skip
    """A linear layer with int8 activations and constant weights in groups.

    Raises:  NoTranslation for what ONNX or its runtimes have no such form of.
    """
    n, k = b.dim(scale, 0), b.dim(x, -1)
    fits = b.root.opset >= FIRST_OPSET and group in BLOCKS and x.dtype == D.FLOAT and b.rank(x) > 1
    if not fits or not isinstance(n, int) or not isinstance(k, int) or _is_read_as_table(call):
        raise NoTranslation("")
    turned = b.derived(scale, "columns", lambda t: t.float().T.contiguous())
    weight = _codes4(b, codes, zero, n, k) if bits == 4 else _codes8(b, codes)
    points = None if zero is None else _zeros4(b, zero, n, groups_of(k, group))
    if turned is None or weight is None or (zero is not None and points is None):
        raise NoTranslation("")
    wide = b.op("DequantizeLinear", weight, turned, points, dtype=D.FLOAT, axis=0, block_size=group)
    y = b.op("MatMul", x, wide)
    y = y if bias is None else b.op("Add", y, bias)
    return b.op("Max", y, b.const(-math.inf, D.FLOAT)) if _is_clipped(call) else y


def _is_clipped(call: Call) -> bool:
    """Whether a Relu or Clip alone reads the result.

    Why:  ONNX Runtime takes a product and such a reader for one node that is to be rounded behind
          it, and makes no kernel; a maximum that changes nothing keeps them apart.
    """
    node = call.graph_node
    users = [] if node is None else [u.op for u in node.results[0].users]
    return len(users) == 1 and users[0].startswith(_CLIPS)


def _is_read_as_table(call: Call) -> bool:
    """Whether rows of the weight are looked up too: turned around it would be stored twice."""
    node = call.graph_node
    return node is None or any("embedding" in u.op for u in node.inputs[1].users)


def _codes8(b: Builder, codes: Val) -> Val | None:
    return b.derived(codes, "columns", lambda t: t.T.contiguous())


def _codes4(b: Builder, packed: Val, zero: Val | None, n: int, k: int) -> Val | None:
    """INT4 around 0, or UINT4 where there are zero points."""
    flip = OFFSET if zero is None else 0  # codes around 8 as two's complement, and back

    def turn(t: Tensor) -> Tensor:
        return pack4((unpack4(t)[:, :k].T.contiguous() ^ flip).flatten())

    return _four_bits(b, packed, D.INT4 if zero is None else D.UINT4, (k, n), turn)


def _zeros4(b: Builder, zero: Val, n: int, groups: int) -> Val | None:
    def turn(t: Tensor) -> Tensor:
        return pack4(unpack4(t)[:, :groups].T.contiguous().flatten())

    return _four_bits(b, zero, D.UINT4, (groups, n), turn)


def _four_bits(
    b: Builder, x: Val, dtype: ir.DataType, shape: tuple[int, int], turn: Callable[[Any], Any]
) -> Val | None:
    """Codes of four bits as a constant, two a byte over the ends of rows."""
    from onnxscript import ir

    found = b.derived(x, "columns", turn)
    if found is None or found.dtype == dtype:
        return found
    packed = found.const_value.raw.numpy()  # type: ignore[union-attr]
    found.const_value = ir.PackedTensor(packed, dtype, shape=ir.Shape(shape), name=found.name)
    found.dtype, found.shape = dtype, ir.Shape(shape)
    found.meta["type"] = TensorType(DTYPES["u8"], shape)  # of a kind that dfc has no name for
    return found
