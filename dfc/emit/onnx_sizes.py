"""Size expressions as ONNX: symbols from the inputs' shapes, each computed once and shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxscript import ir

from dfc.errors import DfcError
from dfc.ir.expr import Call as SizeCall
from dfc.ir.expr import Expr, affine, evaluate, symbol

if TYPE_CHECKING:
    from dfc.emit.onnx_builder import Builder, Val

D = ir.DataType
_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual"}
_FLOAT_UNARY = {
    "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "tanh": "Tanh",
}  # fmt: skip


class Sizes:
    """Where each symbol comes from, and what has been computed of it.

    A symbol is known by an ONNX value (a number of its own) or by a tensor and an axis whose size
    is `scale * symbol + offset`.
    """

    def __init__(self, parent: Sizes | None = None) -> None:
        self.parent = parent
        self._sources: dict[str, tuple[Val, int, int, int]] = {}
        self._values: dict[Any, Val] = {}

    def nested(self) -> Sizes:
        return Sizes(self)

    def bind_value(self, name: str, value: Val) -> None:
        """A symbol is this number."""
        self._values[symbol(name)] = value

    def bind_dim(self, size: Any, tensor: Val, axis: int) -> None:
        """A tensor's axis has this size; remember the symbol that it fixes."""
        line = affine(size)
        if line is None:
            return
        name, scale, offset = line
        known = self._sources.get(name)
        if known is None or ((known[2], known[3]) != (1, 0) and (scale, offset) == (1, 0)):
            self._sources[name] = (tensor, axis, scale, offset)

    def knows(self, name: str) -> bool:
        return (
            name in self._sources
            or symbol(name) in self._values
            or (self.parent is not None and self.parent.knows(name))
        )

    def _found(self, key: Any) -> Val | None:
        scope: Sizes | None = self
        while scope is not None:
            if key in scope._values:
                return scope._values[key]
            scope = scope.parent
        return None

    def scalar(self, b: Builder, x: Any) -> Val:
        """A number or expression as a 0-d tensor: int64, float64 or bool."""
        if isinstance(x, ir.Value):
            return x
        if isinstance(x, bool):
            return b.array(np.array(x))
        if isinstance(x, int):
            return b.array(np.array(x, np.int64))
        if isinstance(x, float):
            return b.array(np.array(x, np.float64))
        found = self._found(x)
        if found is None:
            found = self._values[x] = self._compute(b, x)
        return found

    def vector(self, b: Builder, sizes: Sequence[Any]) -> Val:
        """Sizes as a 1-d int64 tensor."""
        if all(isinstance(s, int) for s in sizes):
            return b.array(np.array([int(s) for s in sizes], np.int64))
        key = ("vector", tuple(sizes))
        found = self._found(key)
        if found is None:
            parts: list[Val] = []
            run: list[int] = []
            for s in sizes:
                if isinstance(s, int):
                    run.append(int(s))
                    continue
                if run:
                    parts.append(b.array(np.array(run, np.int64)))
                    run = []
                parts.append(self._one(b, s))
            if run:
                parts.append(b.array(np.array(run, np.int64)))
            found = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=0)
            self._values[key] = found
        return found

    def _one(self, b: Builder, s: Any) -> Val:
        key = ("one", s)
        found = self._found(key)
        if found is None:
            name = s.symbol if isinstance(s, Expr) else None
            source = self._source(name) if name and self._found(s) is None else None
            if source and source[2:] == (1, 0):
                found = b.op("Shape", source[0], start=source[1], end=source[1] + 1)
            else:
                found = b.op("Reshape", self.scalar(b, s), [1])
            self._values[key] = found
        return found

    def _source(self, name: str) -> tuple[Val, int, int, int] | None:
        scope: Sizes | None = self
        while scope is not None:
            if name in scope._sources:
                return scope._sources[name]
            scope = scope.parent
        return None

    def _symbol(self, b: Builder, name: str) -> Val:
        found = self._found(symbol(name))
        if found is not None:
            return found
        source = self._source(name)
        if source is None:
            raise DfcError("X001", f"the size `{name}` is bound by nothing that ONNX can read")
        tensor, axis, scale, offset = source
        size: Val = b.op("Squeeze", b.op("Shape", tensor, start=axis, end=axis + 1), [0])
        if offset:
            size = b.op("Sub", size, offset)
        if scale != 1:
            size = b.op("Div", size, scale)
        self._values[symbol(name)] = size
        return size

    def _compute(self, b: Builder, x: Expr) -> Val:
        total: Val | None = None
        for monomial, c in x.terms:
            factors = [
                self._symbol(b, atom) if isinstance(atom, str) else self._call(b, atom)
                for atom, p in monomial
                for _ in range(p)
            ]
            if abs(c) != 1 or not factors:
                factors.append(self.scalar(b, abs(c)))
            term = factors[0]
            for f in factors[1:]:
                term = b.op("Mul", term, f)
            if total is None:
                total = b.op("Neg", term) if c < 0 else term
            else:
                total = b.op("Sub" if c < 0 else "Add", total, term)
        assert total is not None
        return total

    def _call(self, b: Builder, call: SizeCall) -> Val:
        name = call.name
        args = [self.scalar(b, a) for a in call.args]
        if name == "floordiv":
            return _floordiv(b, args)
        if name == "mod":
            return b.op("Mod", *args)  # of integers: the sign of the divisor, as in Python
        if name in ("min", "max"):
            return b.op(name.capitalize(), *_common(b, args))
        if name in _COMPARE:
            return b.op(_COMPARE[name], *_common(b, args))
        if name == "ne":
            return b.op("Not", b.op("Equal", *_common(b, args)))
        if name in ("and", "or"):
            total = args[0]
            for a in args[1:]:
                total = b.op(name.capitalize(), total, a)
            return total
        if name == "not":
            return b.op("Not", args[0])
        if name == "where":
            return b.op("Where", args[0], *_common(b, args[1:]))
        if name in ("and_bits", "or_bits", "xor_bits"):
            return b.op("Bitwise" + name.removesuffix("_bits").capitalize(), *args)
        if name in ("shl", "shr"):
            power = b.op("Pow", 2, args[1])
            return b.op("Mul", args[0], power) if name == "shl" else _floor_div(b, args[0], power)
        if name == "abs":
            return b.op("Abs", args[0])
        if name == "pow":
            return b.op("Pow", *_common(b, args))
        floats = [b.cast(a, D.DOUBLE) for a in args]
        if name == "float":
            return floats[0]
        if name == "truediv":
            return b.op("Div", *floats)
        if name in ("fadd", "fmul"):
            total = floats[0]
            for a in floats[1:]:
                total = b.op("Add" if name == "fadd" else "Mul", total, a)
            return total
        if name == "fpow":
            return b.op("Pow", *floats)
        if name == "trunc":
            return b.cast(floats[0], D.INT64)
        if name in ("floor", "ceil", "round"):
            return b.cast(b.op(name.capitalize(), floats[0]), D.INT64)
        if name == "log2":
            return b.op("Div", b.op("Log", floats[0]), b.const(float(np.log(2.0)), D.DOUBLE))
        if name in _FLOAT_UNARY:
            return b.op(_FLOAT_UNARY[name], floats[0])
        raise DfcError("X001", f"the size function `{name}` has no ONNX translation")


def _floordiv(b: Builder, args: Sequence[Val]) -> Val:
    if args[0].dtype == D.DOUBLE or args[1].dtype == D.DOUBLE:
        return b.op("Floor", b.op("Div", *_common(b, list(args))))
    return _floor_div(b, args[0], args[1])


def _floor_div(b: Builder, x: Val, y: Val) -> Val:
    """Python's integer division: ONNX truncates, so take the remainder off first."""
    return b.op("Div", b.op("Sub", x, b.op("Mod", x, y)), y)


def _common(b: Builder, args: list[Val]) -> list[Val]:
    """Numbers in one element type: float64 when any is."""
    if any(a.dtype == D.DOUBLE for a in args):
        return [b.cast(a, D.DOUBLE) for a in args]
    if any(a.dtype == D.INT64 for a in args):
        return [b.cast(a, D.INT64) for a in args]
    return args


def resolve(value: Any, bindings: Mapping[str, Any]) -> Any:
    """An attribute with some symbols replaced."""
    if isinstance(value, tuple):
        return tuple(resolve(v, bindings) for v in value)
    return evaluate(value, bindings) if isinstance(value, Expr) else value
