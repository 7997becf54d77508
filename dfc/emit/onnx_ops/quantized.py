"""Quantized ops in ONNX: QuantizeLinear and DequantizeLinear, MatMulNBits, MatMulInteger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.blocked import BLOCKS, blocked_linear
from dfc.emit.onnx_ops.logic import shifted
from dfc.emit.onnx_ops.nn import by_group
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import ONNX_DTYPES, D
from dfc.ir.expr import symbol
from dfc.ops.codes import OFFSET, fit_pairs, groups_of

_MIDDLE = 128  # what int8 codes are shifted by to be bytes


@translates("dfc.quantize")
def quantize(
    b: Builder, x: Val, scale: Val, zero: Val | None, dtype: str, axis: int | None,
    group: int | None, low: int | None, high: int | None,
) -> Val:  # fmt: skip
    target = ONNX_DTYPES[dtype]
    attributes = _placed(b, x, scale, axis, group)
    zero = zero or _no_zero(b, scale, target)
    y = b.op("QuantizeLinear", x, scale, zero, dtype=target, **attributes)
    if low is None and high is None:
        return y
    bounds = [None if v is None else b.const(v, target) for v in (low, high)]
    return b.op("Clip", y, *bounds, dtype=target)


@translates("dfc.dequantize")
def dequantize(
    b: Builder, q: Val, scale: Val, zero: Val | None, axis: int | None, group: int | None
) -> Val:
    """With a zero point always: without one ONNX Runtime makes no integer Gemm of its readers."""
    if b.root.contrib and q.dtype in (D.FLOAT8E4M3FN, D.FLOAT8E5M2) and q.const_value is not None:
        raise NoTranslation("")  # casts and products are computed when it loads: see float8.py
    attributes = _placed(b, q, scale, axis, group)
    if zero is None and group is None and q.dtype in (D.INT8, D.UINT8):
        zero = _no_zero(b, scale, q.dtype)
    return b.op("DequantizeLinear", q, scale, zero, dtype=scale.dtype, **attributes)


def _no_zero(b: Builder, scale: Val, dtype: D) -> Val:
    """Zeros of scale's shape: they tell the element type of the codes."""
    shape = b.type(scale).shape
    if all(isinstance(s, int) for s in shape):
        return b.const(np.zeros(shape), dtype)
    if dtype not in (D.INT8, D.UINT8):
        raise NoTranslation("")  # Expand takes no float8
    return b.expand(b.const(0, dtype), shape)


def _placed(
    b: Builder, x: Val, scale: Val, axis: int | None, group: int | None
) -> dict[str, int | None]:
    """Where the scales belong, as attributes of QuantizeLinear and DequantizeLinear."""
    wide = b.root.opset >= 19  # half-precision scales, codes of float8
    if scale.dtype != D.FLOAT and not (wide and scale.dtype == D.FLOAT16):
        raise NoTranslation("")
    if group is not None:
        if b.root.opset < 21:
            raise NoTranslation("")
        return {"axis": b.rank(x) - 1, "block_size": group}
    if axis is None:
        return {}
    return {"axis": axis % b.rank(x)}


@translates("dfc.linear_w4")
def linear_w4(
    b: Builder, x: Val, packed: Val, scale: Val, zero: Val | None, bias: Val | None, group: int,
    activations: str, call: Call,
) -> Val:  # fmt: skip
    """MatMulNBits, or in standard ops what becomes it; the decomposition is unpacked when loading.

    Why:  with float activations no standard form is both small and fast in ONNX Runtime: it
          unpacks codes in a DequantizeLinear at every call, and would round the rows to int8.
    """
    if activations == "int8" and not b.root.contrib:
        return blocked_linear(b, call, x, packed, scale, zero, bias, 4, group)
    n, groups = b.type(scale).shape
    if activations == "int8":
        blocks = _blocks4(b, packed, group)
        if blocks is None or (zero is not None and zero.const_value is None):
            raise NoTranslation("")
    else:
        blocks = b.reshape(packed, [n, groups, group // 2])
    return _matmul_nbits(b, x, blocks, scale, zero, bias, 4, group, activations)


def _blocks4(b: Builder, packed: Val, group: int) -> Val | None:
    """Packed rows cut into groups, as a constant: without one the kernel multiplies floats."""
    width = group // 2
    return b.derived(packed, "blocks", lambda t: t.reshape(t.shape[0], -1, width))


def _blocks8(b: Builder, weight: Val, group: int) -> Val | None:
    """int8 rows as bytes, filled up to whole groups and cut into them, as a constant."""

    def cut(t: Any) -> Any:
        import torch
        import torch.nn.functional as F

        more = -t.shape[1] % group
        return F.pad(t.view(torch.uint8) ^ _MIDDLE, (0, more), value=_MIDDLE).reshape(
            t.shape[0], -1, group
        )

    return b.derived(weight, "blocks", cut)


def _scales(b: Builder, scale: Val, activations: str) -> Val:
    """float32 scales; constant ones where the kernel gives zeros for what it could not pack."""
    if scale.dtype == D.FLOAT and scale.const_value is not None:
        return scale
    made = b.derived(scale, "wide", lambda t: t.float()) if activations == "int8" else None
    return made or b.cast(scale, D.FLOAT)


def _matmul_nbits(
    b: Builder, x: Val, blocks: Val, scale: Val, zero: Val | None, bias: Val | None, bits: int,
    group: int, activations: str,
) -> Val:  # fmt: skip
    n, k = b.dim(scale, 0), b.dim(x, -1)
    half = x.dtype == D.FLOAT16  # with scales of its own type; rows that are rounded are float32
    floats = half or x.dtype == D.FLOAT
    if not b.root.contrib or not floats or b.rank(x) < 2 or group not in BLOCKS:
        raise NoTranslation("")
    if not isinstance(n, int) or not isinstance(k, int):
        raise NoTranslation("")
    scales = scale if half else _scales(b, scale, activations)
    found: Val = b.contrib(
        "MatMulNBits", x, blocks, scales, zero, None, bias,
        K=k, N=n, bits=bits, block_size=group,
        accuracy_level=4 if activations == "int8" else 1,
    )  # fmt: skip
    return found


@translates("dfc.linear_w8")
def linear_w8(
    b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None, group: int | None,
    activations: str, call: Call,
) -> Val:  # fmt: skip
    """MatMulNBits for groups, whole-number products for int8 rows; else the decomposition."""
    if group is not None and activations == "int8" and not b.root.contrib:
        return blocked_linear(b, call, x, weight, scale, None, bias, 8, group)
    if group is not None:
        return _groups_w8(b, x, weight, scale, bias, group, activations)
    if activations == "int8":
        return _rows_w8(b, x, weight, scale, bias)
    raise NoTranslation("")


def _groups_w8(
    b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None, group: int, activations: str
) -> Val:
    if not b.root.contrib:
        raise NoTranslation("")
    blocks = _blocks8(b, weight, group)
    if blocks is None and activations == "int8":
        raise NoTranslation("")
    if blocks is None:
        blocks = _computed_blocks8(b, weight, scale, group)
    return _matmul_nbits(b, x, blocks, scale, None, bias, 8, group, activations)


def _computed_blocks8(b: Builder, weight: Val, scale: Val, group: int) -> Val:
    n, groups = b.type(scale).shape
    k = b.dim(weight, 1)
    codes = _unsigned(b, weight)
    if isinstance(k, int) and groups_of(k, group) * group > k:
        more = groups_of(k, group) * group - k
        codes = b.op("Pad", codes, [0, 0, 0, more], b.const(_MIDDLE, D.UINT8))
    return b.reshape(codes, [n, groups, group])


def _rows_w8(b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None) -> Val:
    """Rows rounded to bytes around 128, times weights likewise: whole numbers, without error.

    Why:  ONNX Runtime's kernel for bytes times bytes never saturates; the one for bytes times int8
          does on processors without VNNI, and the one for int8 times int8 takes four times as long.
          One scale for each row is as fast as DynamicQuantizeMatMul's one for all, and nearer.
          Weights of which no pair saturates (`codes=pairs`) stay int8, a third faster, and all do
          where it is known that the processor has VNNI.
    """
    if x.dtype != D.FLOAT or b.rank(x) < 2:
        raise NoTranslation("")
    return _of_rounded_rows(b, *_rounded_rows(b, x), weight, scale, bias)


def _of_rounded_rows(
    b: Builder, codes: Val, steps: Val, weight: Val, scale: Val, bias: Val | None
) -> Val:
    signed = not b.root.saturates or _fits_pairs(b, weight)
    columns = b.transpose(weight if signed else _unsigned(b, weight), (1, 0))
    kind, zero = (D.INT8, 0) if signed else (D.UINT8, _MIDDLE)
    middle, scale = b.const(_MIDDLE, D.UINT8), b.cast(scale, D.FLOAT)
    n = b.dim(weight, 0)
    if b.root.contrib and isinstance(n, int):
        zeros = b.const(np.full(n, zero), kind)
        inputs = (codes, columns, b.const(1.0, D.FLOAT), scale, middle, zeros)
        dots = b.contrib("MatMulIntegerToFloat", *inputs)
        dots.dtype = D.FLOAT
        y = b.op("Mul", dots, steps, dtype=D.FLOAT)
    else:
        whole = b.op("MatMulInteger", codes, columns, middle, b.const(zero, kind), dtype=D.INT32)
        y = b.op("Mul", b.op("Mul", b.cast(whole, D.FLOAT), steps), scale)
    return y if bias is None else b.op("Add", y, bias)


def _fits_pairs(b: Builder, weight: Val) -> bool:
    """Whether products of these codes with bytes are added in 16 bits without saturating."""
    raw: Any = getattr(weight.const_value, "raw", None)
    key = ("fits pairs", id(weight))
    if type(raw).__module__.partition(".")[0] != "torch":
        return False
    found = b.lookup(key)
    if found is None:
        found = b.shared[key] = fit_pairs(raw)
    return bool(found)


def _rounded_rows(b: Builder, x: Val) -> tuple[Val, Val]:
    """Codes of each row, and its scale [.., 1]; layers that read one value share them."""
    key = ("rounded rows", id(x))
    found = b.lookup(key)
    if found is None:
        one = b.const(1.0, D.FLOAT)
        peaks = _peaks(b, x)
        steps = b.op("Div", peaks, b.const(127.0, D.FLOAT))
        steps = b.op("Where", b.op("Equal", peaks, b.const(0.0, D.FLOAT)), one, steps)
        middle = b.const(_MIDDLE, D.UINT8)
        codes = b.op("QuantizeLinear", b.op("Div", x, steps), one, middle, dtype=D.UINT8)
        found = b.shared[key] = (codes, steps)
    codes, steps = found
    return codes, steps


def _peaks(b: Builder, x: Val) -> Val:
    size = b.op("Abs", x)
    if b.root.opset < 18:
        return b.op("ReduceMax", size, axes=[-1], keepdims=1)
    return b.op("ReduceMax", size, [-1], keepdims=1)


def _unsigned(b: Builder, codes: Val) -> Val:
    """int8 codes as bytes, 128 more; ONNX Runtime computes those of constants when it loads."""
    key = ("unsigned", id(codes))
    found = b.lookup(key)
    if found is None:
        wide = b.op("Add", b.cast(codes, D.INT32), b.const(_MIDDLE, D.INT32))
        found = b.shared[key] = b.cast(wide, D.UINT8)
    assert isinstance(found, Val)
    return found


@translates("dfc.grouped_linear_w4")
def grouped_linear_w4(b: Builder, x: Val, ends: Val, packed: Val, scale: Val, zero: Val | None,
                      call: Call) -> Val:  # fmt: skip
    return _experts(b, call, "dfc.linear_w4", x, ends, packed, scale, zero)


@translates("dfc.grouped_linear_w8")
def grouped_linear_w8(
    b: Builder, x: Val, ends: Val, weight: Val, scale: Val, group: int | None, activations: str,
    call: Call,
) -> Val:  # fmt: skip
    """Rows are rounded before they are parted.

    Why:  ONNX Runtime's ReduceMax of no rows of K numbers has K columns, not one.
    """
    if group is not None or activations != "int8":
        return _experts(b, call, "dfc.linear_w8", x, ends, weight, scale)
    experts, n = _sizes_of(b, weight)
    if x.dtype != D.FLOAT:
        raise NoTranslation("")
    codes, steps = _rounded_rows(b, x)

    def product(e: int, own: Callable[[Val], Val]) -> Val:
        of_e = _of_expert(b, weight, e), _of_expert(b, scale, e)
        return _of_rounded_rows(b, own(codes), own(steps), *of_e, None)

    return by_group(b, x, ends, experts, n, product)


def _experts(b: Builder, call: Call, layer: str, x: Val, ends: Val, *weights: Val | None) -> Val:
    """A linear layer for each expert, as it is written for any other; without rows it costs little,
    and with constants of its own the runtime packs each once.
    """
    from dfc.emit.onnx_nodes import emit

    assert weights[0] is not None
    experts, n = _sizes_of(b, weights[0])

    def product(e: int, own: Callable[[Val], Val]) -> Val:
        count, rows = symbol(b.root.claim("rows_of_expert")), own(x)
        b.retype(rows, b.type(x).with_shape((count, *b.type(x).shape[1:])))
        b.sizes.bind_dim(count, rows, 0)
        of_e = [None if w is None else _of_expert(b, w, e) for w in weights]
        type = call.result.with_shape((count, n))
        inner = Call(
            layer, (rows, *of_e, None), call.attributes, (type,), call.loc, call.graph_node
        )
        (y,) = emit(b, inner, b.root.ranges)
        assert y is not None
        return y

    return by_group(b, x, ends, experts, n, product)


def _sizes_of(b: Builder, weight: Val) -> tuple[int, int]:
    """How many experts, and outputs of each."""
    experts, n = b.type(weight).shape[:2]
    if not isinstance(experts, int) or not isinstance(n, int):
        raise NoTranslation("")
    return experts, n


def _of_expert(b: Builder, weight: Val, e: int) -> Val:
    found = b.derived(weight, f"expert{e}", lambda t: t[e].contiguous())
    if found is None:
        type = b.type(weight)
        found = b.retype(b.op("Gather", weight, e, axis=0), type.with_shape(type.shape[1:]))
    return found


@translates("dfc.embedding_w8")
def embedding_w8(
    b: Builder, x: Val, table: Val, scale: Val, group: int | None, dtype: str, call: Call
) -> Val:
    """Rows are looked up as codes, then scaled: the table stays as small as it is."""
    width = b.dim(table, 1)
    target = ONNX_DTYPES[dtype]
    if not isinstance(width, int) or (group is not None and width % group):
        raise NoTranslation("")
    tied = b.root.contrib and _is_tied(call, "dfc.linear_w8")
    blocks = _blocks8(b, table, group) if group and tied else None
    if blocks is None:
        rows = b.cast(b.op("Gather", table, x, axis=0), target)
    else:
        bytes_ = b.op("Gather", blocks, x, axis=0)
        rows = b.op("Sub", b.cast(bytes_, target), b.const(float(_MIDDLE), target))
    return _scaled(b, rows, scale, x, group, width, target, "float" if blocks is None else "int8")


@translates("dfc.embedding_w4")
def embedding_w4(
    b: Builder, x: Val, packed: Val, scale: Val, zero: Val | None, group: int, width: int | None,
    dtype: str, call: Call,
) -> Val:  # fmt: skip
    """Rows are looked up packed, then unpacked and scaled."""
    bytes_ = b.dim(packed, 1)
    if zero is not None or not isinstance(bytes_, int) or width not in (None, 2 * bytes_):
        raise NoTranslation("")
    target = ONNX_DTYPES[dtype]
    tied = b.root.contrib and _is_tied(call, "dfc.linear_w4")
    blocks = _blocks4(b, packed, group) if tied else None
    rows = b.op("Gather", packed if blocks is None else blocks, x, axis=0)
    high = shifted(b, rows, 4, "RIGHT")
    low = b.op("BitwiseAnd", rows, b.const(15, D.UINT8))
    pairs = b.op("Concat", b.unsqueeze(low, -1), b.unsqueeze(high, -1), axis=-1)
    codes = b.op("Sub", b.cast(pairs, target), b.const(float(OFFSET), target))
    return _scaled(b, codes, scale, x, group, 2 * bytes_, target, "int8" if blocks else "float")


def _is_tied(call: Call, op: str) -> bool:
    """Whether the table is the constant of a layer with int8 activations as well."""
    node = call.graph_node
    return node is not None and any(
        u.op == op and u.attributes["activations"] == "int8" for u in node.inputs[1].users
    )


def _scaled(
    b: Builder, codes: Val, scale: Val, x: Val, group: int | None, width: int, target: D,
    activations: str,
) -> Val:  # fmt: skip
    """Looked-up codes times the scales that lie beside them."""
    rows = b.type(x).shape
    wide = _scales(b, scale, activations) if group is not None else scale
    scales = b.cast(b.op("Gather", wide, x, axis=0), target)
    if group is None:
        return b.op("Mul", b.reshape(codes, [*rows, width]), b.unsqueeze(scales, -1))
    cut = b.reshape(codes, [*rows, width // group, group])
    return b.reshape(b.op("Mul", cut, b.unsqueeze(scales, -1)), [*rows, width])
