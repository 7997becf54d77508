"""Between dfc's size expressions and torch's SymInts (sympy): both directions, in one place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.expr import Expr, Scalar, call, evaluate, symbol, symbols
from dfc.ir.types import BOOL, FLOAT, INT, NONE, TensorType, Type, dtype_of

if TYPE_CHECKING:
    import sympy

# Sizes used where any number will do: primes, so that no two dimensions agree by accident.
_PRIMES = (
    11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97,
    101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181,
)  # fmt: skip


def sample_sizes(
    ranges: Mapping[str, tuple[int, int | None]],
    requires: Sequence[Scalar] = (),
    avoid: Iterable[int] = (),
) -> dict[str, int]:
    """A number for each symbol, within its range and different from the others where possible.

    With `requires`, numbers that satisfy every condition, if a short search finds some. `avoid` are
    the fixed sizes around: a symbol that equals one by accident would hide a mistake.
    """
    chosen = _primes_in(ranges, avoid)
    if all(evaluate(r, chosen) is not False for r in requires):
        return chosen
    free = sorted(set().union(*(symbols(r) for r in requires)) & set(chosen))
    random = Random(0)
    for _ in range(2000):
        trial = dict(chosen)
        for name in free:
            low, high = ranges[name]
            size = random.choice((1, 2, 4, 8, 16)) * random.randint(1, 24)
            trial[name] = min(max(size, low), high if high is not None else size)
        if all(evaluate(r, trial) is not False for r in requires):
            return trial
    return chosen


def _primes_in(
    ranges: Mapping[str, tuple[int, int | None]], avoid: Iterable[int] = ()
) -> dict[str, int]:
    chosen: dict[str, int] = {}
    taken: set[int] = set(avoid)
    for name, (low, high) in ranges.items():
        start = max(low, 2)
        small = sorted(range(start, start + 9), key=lambda n: n not in (7, 5))
        fits = [n for n in (*_PRIMES, *small) if n >= low and (high is None or n <= high)]
        value = next((n for n in fits if n not in taken), fits[0] if fits else low)
        taken.add(value)
        chosen[name] = value
    return chosen


class SymbolTable:
    """The symbols of one inference: names to SymInts, and sympy expressions back to ours."""

    def __init__(self, bounds: Mapping[str, tuple[int, int | None]], dynamic: bool = True) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.env = ShapeEnv() if dynamic else None
        self._by_name: dict[str, Any] = {}
        self._names: dict[Any, Scalar] = {}
        for name, size in sample_sizes(bounds).items():
            self._add(name, size)

    def _add(self, name: str, size: int) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        assert self.env is not None
        source = ConstantSource(f"__dfc_{name}")
        made = self.env.create_symbol(
            size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        self._by_name[name] = self.env.create_symintnode(made, hint=size, source=source)
        self._names[made] = symbol(name)

    def add_unbacked(self, name: str) -> None:
        """A size that data decide: any number from 0 on.

        Needs:   a table of dynamic sizes.
        """
        assert self.env is not None
        with self.env.ignore_fresh_unbacked_symbols():  # no operator of the trace makes it
            made = self.env.create_unbacked_symint()
        self._by_name[name] = made
        self._names[made.node.expr] = symbol(name)

    @property
    def known(self) -> Mapping[Any, Scalar]:
        """torch's symbols, by our names."""
        return self._names

    def concrete(self, size: Scalar) -> Any:
        return evaluate(size, self._by_name)

    def concrete_deep(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return [self.concrete_deep(v) for v in value]
        return self.concrete(value) if isinstance(value, Expr) else value

    def type_of(self, result: Any, binds: tuple[str, ...] = ()) -> Type:
        """The type of a fake result; symbols that it invented take the names in `binds`."""
        import torch

        if result is None:
            return NONE
        if isinstance(result, torch.Tensor):
            shape = tuple(self._size(s, binds) for s in result.shape)
            return TensorType(dtype_of(result.dtype), shape)
        if isinstance(result, (bool, torch.SymBool)):
            return BOOL
        if isinstance(result, (int, torch.SymInt)):
            return INT
        if isinstance(result, (float, torch.SymFloat)):
            return FLOAT
        raise TypeError(f"an op cannot return a {type(result).__name__}")

    def _size(self, s: Any, binds: tuple[str, ...]) -> Any:
        if isinstance(s, int):
            return s
        expression = s.node.expr
        unknown = [x for x in sorted(expression.free_symbols, key=str) if x not in self._names]
        for x in unknown:
            taken = {str(n) for n in self._names.values()}
            name = next((b for b in binds if b not in taken), None)
            self._names[x] = symbol(name or f"u{len(self._names)}")
        return from_sympy(expression, self._names)


_CALLS = {
    "FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod", "PythonMod": "mod",
    "Max": "max", "Min": "min", "IntTrueDiv": "truediv", "FloatTrueDiv": "truediv",
    "ToFloat": "float", "TruncToInt": "trunc", "TruncToFloat": "trunc", "CeilToInt": "ceil",
    "ceiling": "ceil", "FloorToInt": "floor", "floor": "floor", "RoundToInt": "round",
    "FloatPow": "fpow", "PowByNatural": "pow", "OpaqueUnaryFn_sqrt": "sqrt",
    "OpaqueUnaryFn_exp": "exp", "OpaqueUnaryFn_log": "log", "OpaqueUnaryFn_log2": "log2",
    "OpaqueUnaryFn_sin": "sin", "OpaqueUnaryFn_cos": "cos", "OpaqueUnaryFn_tan": "tan",
    "OpaqueUnaryFn_tanh": "tanh", "Abs": "abs", "Not": "not", "And": "and", "Or": "or",
    "BitwiseFn_bitwise_and": "and_bits", "BitwiseFn_bitwise_or": "or_bits",
    "BitwiseFn_bitwise_xor": "xor_bits", "LShift": "shl", "RShift": "shr", "Where": "where",
    "sqrt": "sqrt", "exp": "exp", "log": "log",
}  # fmt: skip
_COMPARE = {
    "Equality": ("eq", False), "Unequality": ("ne", False),
    "StrictLessThan": ("lt", False), "LessThan": ("le", False),
    "StrictGreaterThan": ("lt", True), "GreaterThan": ("le", True),
}  # fmt: skip


def from_sympy(x: sympy.Basic, names: Mapping[Any, Scalar]) -> Scalar:
    """torch's expression as ours.

    Raises:  DfcError T020 for a symbol or function that has no counterpart.
    """
    import sympy

    if x in names:
        return names[x]
    if isinstance(x, sympy.logic.boolalg.BooleanAtom):
        return bool(x)
    if x.is_Integer:
        return int(x)
    if x.is_Rational:
        return call("truediv", int(x.p), int(x.q))
    if x.is_Float:
        return float(x)
    if isinstance(x, sympy.Symbol):
        raise DfcError("T020", f"the size `{x}` is not bound by any input")
    kind = type(x).__name__
    if kind == "Identity":
        return from_sympy(x.args[0], names)
    if kind == "Piecewise":
        branches = [(from_sympy(e, names), from_sympy(c, names)) for e, c in x.args]
        value = branches[-1][0]
        for e, c in reversed(branches[:-1]):
            value = call("where", c, e, value)
        return value
    args = [from_sympy(a, names) for a in x.args]
    if kind == "Add" or kind == "Mul":
        return _arithmetic(kind, args)
    if kind == "Pow":
        return _power(args[0], args[1])
    if kind == "ModularIndexing":
        return call("mod", call("floordiv", args[0], args[1]), args[2])
    if kind in _COMPARE:
        name, swap = _COMPARE[kind]
        return call(name, args[1], args[0]) if swap else call(name, *args)
    if kind in _CALLS:
        return call(_CALLS[kind], *args)
    raise DfcError("T020", f"the size `{x}` uses `{kind}`, which dfc has no counterpart for")


def _is_int(x: Scalar) -> bool:
    return x.kind == "int" if isinstance(x, Expr) else isinstance(x, int)


def _arithmetic(kind: str, args: list[Scalar]) -> Scalar:
    if not all(map(_is_int, args)):
        return call("fadd" if kind == "Add" else "fmul", *args)
    total: Any = args[0]
    for a in args[1:]:
        total = total + a if kind == "Add" else total * a
    result: Scalar = total
    return result


def _power(base: Scalar, exponent: Scalar) -> Scalar:
    if _is_int(base) and isinstance(exponent, int) and 0 <= exponent <= 16:
        return _arithmetic("Mul", [1, *[base] * exponent])
    if exponent == -1:
        return call("truediv", 1.0, base)
    return call("pow" if _is_int(base) and _is_int(exponent) else "fpow", base, exponent)


_SAFE = re.compile(r"[^A-Za-z0-9_]")


def identifier(wish: str) -> str:
    """A name that text can hold: letters, digits and underscores, not starting with a digit."""
    name = _SAFE.sub("_", wish)
    return name if name and not name[0].isdigit() else f"_{name}"
