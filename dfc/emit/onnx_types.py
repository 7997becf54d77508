"""Element types and shapes of ONNX values: of a graph's types, and of what an ONNX op gives.

A complex tensor is a pair of reals: a real tensor with a trailing dimension of 2.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from onnxscript import ir

from dfc.ir.types import BOOL, FLOAT, INT, TensorType, Type

D = ir.DataType
ONNX_DTYPES: dict[str, ir.DataType] = {
    "f16": D.FLOAT16, "bf16": D.BFLOAT16, "f32": D.FLOAT, "f64": D.DOUBLE,
    "f8e4m3fn": D.FLOAT8E4M3FN, "f8e5m2": D.FLOAT8E5M2,
    "f8e4m3fnuz": D.FLOAT8E4M3FNUZ, "f8e5m2fnuz": D.FLOAT8E5M2FNUZ,
    "c32": D.FLOAT16, "c64": D.FLOAT, "c128": D.DOUBLE,
    "i8": D.INT8, "i16": D.INT16, "i32": D.INT32, "i64": D.INT64,
    "u8": D.UINT8, "u16": D.UINT16, "u32": D.UINT32, "u64": D.UINT64, "bool": D.BOOL,
}  # fmt: skip
FLOATS = frozenset({D.FLOAT16, D.BFLOAT16, D.FLOAT, D.DOUBLE})

_GIVES_BOOL = frozenset(
    [
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "Not",
        "And",
        "Or",
        "Xor",
        "IsNaN",
        "IsInf",
    ]
)
_GIVES_INT64 = frozenset(["Shape", "Size", "ArgMax", "ArgMin", "NonZero"])
_LIKE_SECOND = frozenset({"Where", "CastLike"})
_UNKNOWN = frozenset(
    [
        "If",
        "Loop",
        "Scan",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceInsert",
        "SplitToSequence",
        "SequenceAt",
        "ConcatFromSequence",
        "SequenceMap",
        "Optional",
        "QuantizeLinear",
        "DequantizeLinear",
        "Multinomial",
    ]
)


_UNBACKED = re.compile(r"u[fb]?[0-9]+\Z")


def is_unbacked(symbol: str) -> bool:
    """Whether a symbol is bound by data, not by the shape of an input."""
    return bool(_UNBACKED.match(symbol))


def onnx_dtype(type: Type) -> ir.DataType:
    """The element type of a value's ONNX tensor."""
    if isinstance(type, TensorType):
        return ONNX_DTYPES[type.dtype.name]
    return {INT: D.INT64, FLOAT: D.DOUBLE, BOOL: D.BOOL}[type]  # type: ignore[index]


def onnx_shape(type: Type) -> ir.Shape:
    """The shape of a value's ONNX tensor; symbolic sizes as text.

    Why:  ONNX Runtime shares memory among values whose sizes have the same text, and a branch or a
          loop may bind a symbol anew: sizes that only the data tell stay unnamed.
    """
    if not isinstance(type, TensorType):
        return ir.Shape([])
    dims: list[int | str | None] = [
        s if isinstance(s, int) else None if any(map(is_unbacked, s.symbols)) else str(s)
        for s in type.shape
    ]
    return ir.Shape([*dims, 2] if type.dtype.is_complex else dims)


def np_array(x: Any, dtype: ir.DataType) -> np.ndarray[Any, Any]:
    """Python numbers in an element type, rounded and wrapped as PyTorch does."""
    kind = dtype.numpy()
    if isinstance(x, complex):
        x = [x.real, x.imag]
    a = np.asarray(x)
    if a.dtype.kind == "f" and np.dtype(kind).kind in "iu":
        a = np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0).astype(np.int64)
    with np.errstate(all="ignore"):
        return np.asarray(a.astype(kind))


def propagate_dtype(node: ir.Node) -> None:
    """Element types of a node's outputs from its inputs, for the ops whose rule is simple."""
    outputs = node.outputs
    if not outputs or outputs[0].dtype is not None or node.domain not in ("", "ai.onnx"):
        return
    kind = node.op_type
    first = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if kind in _GIVES_BOOL:
        outputs[0].dtype = D.BOOL
    elif kind in _GIVES_INT64:
        outputs[0].dtype = D.INT64
    elif kind == "Cast":
        outputs[0].dtype = ir.DataType(node.attributes["to"].as_int())
    elif kind in _LIKE_SECOND:
        second = node.inputs[1]
        if second is not None and second.dtype is not None:
            outputs[0].dtype = second.dtype
    elif kind == "Constant":
        attr = next(iter(node.attributes.values()))
        if attr.name == "value":
            outputs[0].dtype = attr.as_tensor().dtype
        elif attr.name.startswith("value_int"):
            outputs[0].dtype = D.INT64
        elif attr.name.startswith("value_float"):
            outputs[0].dtype = D.FLOAT
    elif kind == "ConstantOfShape":
        attr = node.attributes.get("value")  # type: ignore[assignment]
        outputs[0].dtype = attr.as_tensor().dtype if attr is not None else D.FLOAT
    elif kind == "OneHot":
        third = node.inputs[2]
        if third is not None and third.dtype is not None:
            outputs[0].dtype = third.dtype
    elif kind in ("EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli"):
        attr = node.attributes.get("dtype")  # type: ignore[assignment]
        outputs[0].dtype = ir.DataType(attr.as_int()) if attr is not None else first
    elif kind in ("RandomNormal", "RandomUniform"):
        attr = node.attributes.get("dtype")  # type: ignore[assignment]
        outputs[0].dtype = ir.DataType(attr.as_int()) if attr is not None else D.FLOAT
    elif kind not in _UNKNOWN and first is not None:
        outputs[0].dtype = first
        if kind in ("TopK", "MaxPool", "Unique"):
            for o in outputs[1:]:
                o.dtype = D.INT64
        elif kind in ("Split", "LSTM", "GRU", "RNN", "BatchNormalization", "LayerNormalization"):
            for o in outputs[1:]:
                o.dtype = first
