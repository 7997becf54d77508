"""Symbolic scalars: canonical integer polynomials over named symbols, and calls on them.

A size is a plain ``int`` when it is known and an ``Expr`` when it is not. Every constructor
returns the canonical form, so equal sizes are equal objects: ``B*S == S*B``.

Integer sums and products are polynomials. Everything else (division, minimum, comparison,
float arithmetic) is a ``Call``: an atom with a name of a closed list, never re-associated, so that
evaluating it gives bit for bit what Python gave while tracing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

Scalar = Union[int, float, bool, "Expr"]
Size = Union[int, "Expr"]
Atom = Union[str, "Call"]
Monomial = tuple[tuple[Atom, int], ...]  # sorted (atom, power) pairs; () is the constant


MAX_BITS = 4096  # of a number that a power or a shift may make: text must not fill the memory


def _int_pow(a: int, b: int) -> int | float:
    if abs(a).bit_length() * b > MAX_BITS:
        raise OverflowError(f"{a} to the power {b} has too many digits")
    result: int | float = a**b
    return result


def _shift_left(a: int, b: int) -> int:
    if b > MAX_BITS:
        raise OverflowError(f"{a} shifted by {b} has too many digits")
    return a << b


# The closed list of what a Call may be; text can name nothing else.
FUNCTIONS: dict[str, Callable[..., int | float | bool]] = {
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "pow": _int_pow,
    "and_bits": operator.and_,
    "or_bits": operator.or_,
    "xor_bits": operator.xor,
    "shl": _shift_left,
    "shr": operator.rshift,
    "where": lambda c, a, b: a if c else b,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "and": lambda *xs: all(xs),
    "or": lambda *xs: any(xs),
    "not": operator.not_,
    "float": float,
    "truediv": operator.truediv,
    "fadd": lambda *xs: math.fsum(xs) if len(xs) > 2 else operator.add(*xs),
    "fmul": lambda *xs: math.prod(xs),
    "fpow": lambda a, b: float(a) ** b,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "tanh": math.tanh,
    "abs": abs,
}
_FLOAT = {
    "float", "truediv", "fadd", "fmul", "fpow", "sqrt", "exp", "log", "log2",
    "sin", "cos", "tan", "tanh",
}  # fmt: skip
_BOOL = {"eq", "ne", "lt", "le", "and", "or", "not"}


@dataclass(frozen=True)
class Call:
    """A function of the closed list applied to scalars."""

    name: str
    args: tuple[Scalar, ...]

    @cached_property
    def key(self) -> tuple[object, ...]:
        return (1, self.name, *(_key(a) for a in self.args))


def _atom_key(atom: Atom) -> tuple[object, ...]:
    return (0, atom) if isinstance(atom, str) else atom.key


def _key(x: Scalar) -> tuple[object, ...]:
    """A total order over scalars: by kind first, so that 1, 1.0 and True differ."""
    if isinstance(x, Expr):
        return (3, tuple((tuple((_atom_key(a), p) for a, p in m), c) for m, c in x.terms))
    return (0 if isinstance(x, bool) else 1 if isinstance(x, int) else 2, repr(x))


@dataclass(frozen=True, eq=False)
class Expr:
    """A polynomial with integer coefficients: at least one symbol or call occurs in it.

    C1:  terms are sorted by monomial, coefficients are non-zero.
    C2:  a polynomial that is constant is an ``int``, never an ``Expr``.
    """

    terms: tuple[tuple[Monomial, int], ...]

    @cached_property
    def key(self) -> tuple[object, ...]:
        return _key(self)

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Expr) and self._hash == other._hash and self.key == other.key
        )

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for monomial, c in _terms(other):
            terms[monomial] = terms.get(monomial, 0) + c
        return _polynomial(terms)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return _polynomial({m: -c for m, c in self.terms})

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: int) -> Size:
        return (-self) + other

    def __mul__(self, other: Size) -> Size:
        terms: dict[Monomial, int] = {}
        for ma, ca in self.terms:
            for mb, cb in _terms(other):
                monomial = _times(ma, mb)
                terms[monomial] = terms.get(monomial, 0) + ca * cb
        return _polynomial(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Scalar:
        return call("floordiv", self, other)

    def __rfloordiv__(self, other: int) -> Scalar:
        return call("floordiv", other, self)

    def __mod__(self, other: Size) -> Scalar:
        return call("mod", self, other)

    def __rmod__(self, other: int) -> Scalar:
        return call("mod", other, self)

    @cached_property
    def symbols(self) -> frozenset[str]:
        """Every symbol that occurs, inside calls too."""
        return frozenset(self._symbols())

    def _symbols(self) -> Iterator[str]:
        for monomial, _ in self.terms:
            for atom, _ in monomial:
                if isinstance(atom, str):
                    yield atom
                else:
                    for arg in atom.args:
                        yield from symbols(arg)

    @property
    def symbol(self) -> str | None:
        """The symbol's name when the expression is that symbol alone."""
        if len(self.terms) == 1:
            monomial, c = self.terms[0]
            if c == 1 and len(monomial) == 1 and monomial[0][1] == 1:
                atom = monomial[0][0]
                return atom if isinstance(atom, str) else None
        return None

    @property
    def call(self) -> Call | None:
        """The call when the expression is that call alone."""
        if len(self.terms) == 1:
            monomial, c = self.terms[0]
            if c == 1 and len(monomial) == 1 and monomial[0][1] == 1:
                atom = monomial[0][0]
                return None if isinstance(atom, str) else atom
        return None

    @property
    def kind(self) -> str:
        """``"int"``, ``"float"`` or ``"bool"``: what evaluating gives."""
        inner = self.call
        if inner is None:
            return symbol_kind(self.symbol or "")
        if inner.name == "where":
            return _kind(inner.args[1])
        return "float" if inner.name in _FLOAT else "bool" if inner.name in _BOOL else "int"

    def __str__(self) -> str:
        return _show(self, 0)

    def __repr__(self) -> str:
        return f"Expr({self})"


_UNBACKED = re.compile(r"u([fb]?)[0-9]+\Z")


def symbol_kind(name: str) -> str:
    """What a symbol stands for: `uf0` a float, `ub0` a bool, every other name an int.

    `u0`, `uf0`, `ub0` are bound by the node that computes them; other symbols by the inputs.
    """
    found = _UNBACKED.match(name)
    return {"f": "float", "b": "bool"}.get(found[1], "int") if found else "int"


def _kind(x: Scalar) -> str:
    if isinstance(x, Expr):
        return x.kind
    return "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"


def _terms(x: Size) -> Iterable[tuple[Monomial, int]]:
    return x.terms if isinstance(x, Expr) else (((), int(x)),)


def _times(a: Monomial, b: Monomial) -> Monomial:
    powers: dict[Atom, int] = dict(a)
    for atom, p in b:
        powers[atom] = powers.get(atom, 0) + p
    return tuple(sorted(powers.items(), key=lambda item: _atom_key(item[0])))


def _monomial_key(monomial: Monomial) -> tuple[object, ...]:
    degree = sum(p for _, p in monomial)
    return (-degree, tuple((_atom_key(a), -p) for a, p in monomial))


def _polynomial(terms: Mapping[Monomial, int]) -> Size:
    kept = {m: c for m, c in terms.items() if c != 0}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Expr(tuple(sorted(kept.items(), key=lambda item: _monomial_key(item[0]))))


def symbol(name: str) -> Expr:
    """The expression that is this symbol alone."""
    return Expr(((((name, 1),), 1),))


def affine(x: object) -> tuple[str, int, int] | None:
    """The symbol x, a and b of the size `a*x + b`; else None."""
    if not isinstance(x, Expr) or len(x.symbols) != 1:
        return None
    terms = dict(x.terms)
    rest = terms.pop((), 0)
    (name,) = x.symbols
    factor = terms.pop(((name, 1),), 0)
    return (name, factor, rest) if factor and not terms else None


def symbols(x: object) -> frozenset[str]:
    """The symbols of a scalar; none for a number."""
    return x.symbols if isinstance(x, Expr) else frozenset()


def call(name: str, *args: Scalar) -> Scalar:
    """Apply a function of the closed list, folded and in canonical form.

    Raises:  KeyError for a name that is not in ``FUNCTIONS``.
    """
    function = FUNCTIONS[name]
    if not any(isinstance(a, Expr) for a in args):
        return function(*args)
    if name in ("min", "max"):
        return _extremum(name, args)
    if name in ("floordiv", "mod") and len(args) == 2 and isinstance(args[1], int):
        return _divide(name, args[0], args[1])
    if name == "floordiv" and args[0] == args[1]:
        return 1
    if name == "floordiv" and isinstance(args[0], Expr) and isinstance(args[1], Expr):
        exact = _exact_quotient(args[0], args[1])
        if exact is not None:
            return exact
    if name in ("eq", "le") and args[0] == args[1]:
        return True
    if name in ("ne", "lt") and args[0] == args[1]:
        return False
    if name in ("eq", "ne"):
        args = tuple(sorted(args, key=_key))
    if name == "not" and isinstance(args[0], Expr) and args[0].call:
        inner = args[0].call
        opposite = {"eq": "ne", "ne": "eq"}.get(inner.name)
        if opposite:
            return call(opposite, *inner.args)
        if inner.name == "not":
            return inner.args[0]
    return Expr((((((Call(name, tuple(args)), 1),)), 1),))


def _extremum(name: str, args: Iterable[Scalar]) -> Scalar:
    """Flatten, drop duplicates, keep one number, and settle operands that differ by a constant."""
    pick = min if name == "min" else max
    flat: list[Scalar] = []
    for arg in args:
        inner = arg.call if isinstance(arg, Expr) else None
        flat.extend(inner.args if inner and inner.name == name else (arg,))
    kept: list[Scalar] = []
    a: Any
    b: Any
    for a in flat:
        beaten = False
        left: list[Scalar] = []
        for b in kept:
            gap = a - b if _kind(a) == _kind(b) == "int" else None
            sign = None if gap is None else _sign(gap)
            if sign is None or pick(sign, 0) != sign:
                left.append(b)
                beaten |= sign is not None
        kept = left if beaten else [*left, a]
    if len(kept) == 1:
        return kept[0]
    return Expr(((((Call(name, tuple(sorted(kept, key=_key))), 1),), 1),))


def _sign(x: Scalar) -> int | None:
    """-1, 0 or 1 where it is the same for all sizes, which are never negative; else None.

    A weak sign: 0 is allowed for either.
    """
    if not isinstance(x, Expr):
        return (x > 0) - (x < 0)
    for monomial, _ in x.terms:
        if any(not isinstance(a, str) or _UNBACKED.match(a) for a, _ in monomial):
            return None
    if all(c > 0 for _, c in x.terms):
        return 1
    return -1 if all(c < 0 for _, c in x.terms) else None


def _divide(name: str, a: Scalar, k: int) -> Scalar:
    """Move the multiples of k out of ``a // k``; drop them from ``a % k``."""
    if k == 0:
        raise ZeroDivisionError(f"{a} {name} 0")
    if not isinstance(a, Expr):
        return FUNCTIONS[name](a, k)
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, c in a.terms:
        # Only for k > 0 does Python's remainder lie in [0, k), which makes the split canonical.
        quotient, remainder = divmod(c, k) if k > 0 else (0, c)
        whole[monomial], rest[monomial] = quotient, remainder
    r, q = _polynomial(rest), _polynomial(whole)
    if isinstance(r, int):
        return q + r // k if name == "floordiv" else r % k
    atom = Expr(((((Call(name, (r, k)), 1),), 1),))
    return q + atom if name == "floordiv" else atom


def _exact_quotient(a: Expr, b: Expr) -> Size | None:
    """a / b when b is one monomial that divides every term of a."""
    if len(b.terms) != 1:
        return None
    (divisor, k) = b.terms[0]
    out: dict[Monomial, int] = {}
    for monomial, c in a.terms:
        powers = dict(monomial)
        for atom, p in divisor:
            powers[atom] = powers.get(atom, 0) - p
        if c % k or any(p < 0 for p in powers.values()):
            return None
        kept = ((x, p) for x, p in powers.items() if p)
        out[tuple(sorted(kept, key=lambda item: _atom_key(item[0])))] = c // k
    return _polynomial(out)


def evaluate(x: Scalar, bindings: Mapping[str, Scalar]) -> Scalar:
    """The value under ``bindings``; with partial bindings, the simplified expression.

    Bindings may be numbers, expressions, or anything with arithmetic (torch's SymInt).
    """
    if not isinstance(x, Expr) or x.symbols.isdisjoint(bindings):
        return x
    total: Any = 0
    for monomial, c in x.terms:
        term: Any = c
        first = c == 1
        for atom, p in monomial:
            if isinstance(atom, str):
                value = bindings.get(atom)
                factor = symbol(atom) if value is None else value
            else:
                factor = call(atom.name, *(evaluate(a, bindings) for a in atom.args))
            for _ in range(p):
                term = factor if first else term * factor
                first = False
        total = term if len(x.terms) == 1 else total + term
    result: Scalar = total
    return result


def free(x: Scalar) -> bool:
    """Whether symbols occur."""
    return isinstance(x, Expr)


_INFIX = {"floordiv": "//", "mod": "%"}


def _show(x: Scalar, level: int) -> str:
    """Text with few brackets: level 0 is a sum, 1 a product, 2 an operand."""
    if not isinstance(x, Expr):
        return format_number(x)
    parts: list[str] = []
    for monomial, c in x.terms:
        factors = [_show_atom(atom) for atom, p in monomial for _ in range(p)]
        if not factors or abs(c) != 1:
            factors.insert(0, str(abs(c)))
        text = "*".join(factors)
        sign = "-" if c < 0 else "+"
        parts.append((f" {sign} " if parts else "-" if c < 0 else "") + text)
    text = "".join(parts)
    bracket = (level and len(x.terms) > 1) or (level > 1 and ("*" in text or "-" in text))
    return f"({text})" if bracket else text


def _show_atom(atom: Atom) -> str:
    if isinstance(atom, str):
        return atom
    if atom.name in _INFIX:
        a, b = atom.args
        return f"({_show(a, 2)} {_INFIX[atom.name]} {_show(b, 2)})"
    return f"{atom.name}({', '.join(_show(a, 0) for a in atom.args)})"


def format_number(x: int | float | bool) -> str:
    """Text that reads back to the same bits: decimal where it does, never `1` for `1.0`."""
    if isinstance(x, bool):
        return "True" if x else "False"
    if isinstance(x, int):
        return str(x)
    return repr(x)  # Python's repr is the shortest decimal that reads back bit for bit
