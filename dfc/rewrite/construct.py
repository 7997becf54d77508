"""Expressions of a rule as nodes: overloads chosen, defaults filled in, constants computed.

R010  no overload of the op takes these arguments     R012  an expression that is no value
R011  `!` on what is not known at compile time        R013  `!` gives infinity or NaN of numbers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph, Node, Parameter, Value, attribute_key
from dfc.ir.op import REQUIRED, lookup
from dfc.ir.types import TensorType
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.wording import expression_text
from dfc.ops.aten import AtenOp, _resolve
from dfc.ops.builder import Builder
from dfc.rewrite.conditions import evaluate
from dfc.rewrite.deciding import Env, Facts, Undecided
from dfc.rewrite.patterns import holds_value, signature
from dfc.rewrite.rule import ARITHMETIC, CONSTANTS, FUNCTIONS

# Tried in this order when several overloads of a bare name take the arguments.
_PREFERRED = ("default", "Tensor", "int", "dim", "Scalar", "Tensor_Scalar", "dim_IntList")


@dataclass
class Construction:
    """Where nodes are written, and what is remembered between expressions.

    `folded` holds the constants that were computed, so that equal ones are computed once.
    """

    builder: Builder
    facts: Facts
    source: Source | None = None
    folded: dict[object, Parameter] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.builder.graph


def construct(x: s.Expr, env: Env, to: Construction) -> Any:
    """The value, the several values, the number or the list that an expression stands for.

    Raises:  DfcError R010..R013 with the place; V020 when an op refuses its operands.
    """
    if isinstance(x, s.Call) and not _is_function(x, env):
        results = _apply(x, env, to)
        return results[0] if len(results) == 1 else results
    if isinstance(x, s.Several):
        found: list[Any] = []
        for item in x.items:
            if isinstance(item, s.Tail):
                found += env[item.name]
            else:
                found.append(construct(item, env, to))
        return tuple(found)
    if isinstance(x, s.Word):
        if x.name in env:
            return env[x.name]
        if x.name in CONSTANTS:
            return CONSTANTS[x.name]
        return None  # bound in a branch of `|` that was not taken
    try:
        return evaluate(x, env, to.facts)
    except Undecided as e:
        raise _error("R012", str(e), x, to) from None


def _is_function(x: s.Call, env: Env) -> bool:
    """`dim(x, 0)` computes a size; `sqrt` is an op where it is given a tensor."""
    name = x.name.name
    if name not in FUNCTIONS or x.mark:
        return False
    return name not in ARITHMETIC or not any(_is_tensor(a, env) for a in x.arguments)


def _is_tensor(x: s.Expr, env: Env) -> bool:
    if isinstance(x, s.Word):
        return isinstance(env.get(x.name), Value)
    if isinstance(x, s.Call):
        return x.name.name not in FUNCTIONS or (
            x.name.name in ARITHMETIC and any(_is_tensor(a, env) for a in x.arguments)
        )
    return False


def _apply(x: s.Call, env: Env, to: Construction) -> tuple[Value | None, ...]:
    if x.mark == "?" and any(_is_absent(a, env) for a in x.arguments):
        return (_what_is_there(x, env, to),)
    given = [construct(a, env, to) for a in x.arguments]
    if x.mark == "!" and given and _nothing(given[0]):
        return (None,)  # what is computed from an absent bias is absent
    named = {k.name.name: construct(k.value, env, to) for k in x.keywords}
    op, operands, attributes = _overload(x, given, named, to)
    if x.mark == "!":
        return (_folded(x, op, operands, attributes, to),)
    node = to.builder.node(op, *operands, **attributes)
    to.made.append(node)
    return node.results


def _is_absent(x: s.Expr, env: Env) -> bool:
    """Whether an argument has no value, an optional op none of whose operands has one included."""
    if isinstance(x, s.Word):
        return env.get(x.name) is None and x.name not in CONSTANTS
    if isinstance(x, s.Call) and x.mark == "?":
        return all(_is_absent(a, env) for a in x.arguments if isinstance(a, (s.Word, s.Call)))
    return False


def _what_is_there(x: s.Call, env: Env, to: Construction) -> Value | None:
    """`add?(a, b)` without b is a, without a is b: like the optional op that bound them."""
    for a in x.arguments:
        if isinstance(a, (s.Word, s.Call)) and not _is_absent(a, env):
            found = construct(a, env, to)
            if isinstance(found, Value):
                return found
    return None


def _nothing(x: Any) -> bool:
    """Whether an operand is absent, or a list of absent ones."""
    return x is None or (isinstance(x, tuple) and bool(x) and all(v is None for v in x))


def _folded(
    x: s.Call, op: str, operands: Sequence[Any], attributes: Mapping[str, Any], to: Construction
) -> Value:
    """A parameter with the value, computed now; without numbers where an operand has none."""
    from dfc.ir.interpret import run_constant
    from dfc.ir.weights import TensorData

    read = [v for o in operands for v in (o if isinstance(o, tuple) else (o,)) if v is not None]
    unknown = next((v for v in read if not isinstance(v, Parameter)), None)
    if unknown is not None:
        raise _error("R011", f"%{unknown.name} is not known at compile time", x, to)
    key = (op, tuple(map(_hashable, operands)), attribute_key(tuple(sorted(attributes.items()))))
    if key in to.folded and to.folded[key].name in to.graph.parameters:
        return to.folded[key]
    node = to.builder.node(op, *operands, **attributes)
    graph = to.graph
    base = f"{read[0].name}.{x.name.name}" if read else x.name.name
    name, n = base, 1
    while name in graph.parameters:
        name, n = f"{base}.{n}", n + 1
    result = node.result
    assert isinstance(result.type, TensorType)
    if any(p.data is None for p in read):
        made = graph.add_parameter(name, result.type, "constant")
    else:
        (value,) = run_constant(node)
        if _overflows(value, read):
            graph.erase(node)
            raise _error("R013", f"`{x.name.name}!` overflows", x, to)
        data = TensorData(name, value.detach().clone())
        made = graph.add_parameter(name, TensorType.of(value), "constant", data)
    graph.erase(node)
    to.folded[key] = made
    return made


def _overflows(value: Any, read: Sequence[Value]) -> bool:
    """Whether finite constants give what is not: the model, which computes in another order, need
    not overflow."""
    if not value.is_floating_point() or bool(value.isfinite().all()):
        return False
    data = [p.data.tensor() for p in read if isinstance(p, Parameter) and p.data is not None]
    return all(bool(d.isfinite().all()) for d in data if d.is_floating_point())


def _hashable(x: Any) -> object:
    return tuple(x) if isinstance(x, (list, tuple)) else x


def _overload(
    x: s.Call, given: Sequence[Any], named: Mapping[str, Any], to: Construction
) -> tuple[str, list[Any], dict[str, Any]]:
    name = x.name.name
    bare = name.removeprefix("aten.")
    candidates = (name,) if "." in bare else overloads(bare)
    for op in candidates:
        found = _bound(op, given, named)
        if found is not None:
            return op, *found
    shown = ", ".join([*map(_shown, given), *(f"{k}={_shown(v)}" for k, v in named.items())])
    help = f"it has {', '.join(signature(candidates[0]).names)}" if candidates else None
    raise _error("R010", f"no `{name}` takes ({shown})", x, to, help)


@cache
def overloads(base: str) -> tuple[str, ...]:
    """The overloads of an ATen op that return new values, the usual ones first."""
    import torch

    packet = getattr(torch.ops.aten, base)
    found = []
    for overload in packet.overloads():
        name = f"aten.{base}.{overload}"
        info = _resolve(name)  # None for TorchScript's own, on Python lists and numbers
        if isinstance(info, AtenOp) and not info.mutable and "out" not in overload.split("_"):
            found.append(name)

    def rank(name: str) -> tuple[int, str]:
        last = name.rpartition(".")[2]
        return (_PREFERRED.index(last) if last in _PREFERRED else len(_PREFERRED), name)

    return tuple(sorted(found, key=rank))


def _bound(
    op: str, given: Sequence[Any], named: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """Operands in order and attributes by name, or None when the op does not take these."""
    info = lookup(op)
    sig = signature(op)
    if len(given) > len(sig.names):
        return None
    values = dict(zip(sig.names, given, strict=False))
    if named.keys() - set(sig.names) or named.keys() & values.keys():
        return None
    values |= named
    operands: list[Any] = []
    attributes: dict[str, Any] = {}
    for o in info.operands:
        value = values.get(o.name)
        if value is None:
            if not o.optional:
                return None
        elif o.variadic:
            if not isinstance(value, tuple) or not all(
                v is None or isinstance(v, Value) for v in value
            ):
                return None
        elif not isinstance(value, Value):
            return None
        operands.append(value)
    for a in info.attributes:
        if a.name in values:
            value = values[a.name]
            if holds_value(value) or not _fits(info, a.name, value):
                return None
            attributes[a.name] = value
        elif a.default is REQUIRED:
            return None
    return operands, attributes


def _fits(info: Any, name: str, value: Any) -> bool:
    """Whether an attribute may be given this: a list where the schema has a list, and so on."""
    if not isinstance(info, AtenOp):
        return True
    argument = next(a for a in info.overload._schema.arguments if a.name == name)
    kind = str(argument.real_type)
    if value is None:
        return "Optional" in kind or kind.startswith("NoneType")
    if "List" in kind:
        return isinstance(value, tuple) or (isinstance(value, int) and "[1]" in kind)
    if isinstance(value, tuple):
        return False
    if isinstance(value, bool):
        return "bool" in kind or "number" in kind or "Scalar" in kind
    if isinstance(value, str):
        return "str" in kind
    if isinstance(value, float):
        return "float" in kind or "number" in kind or "Scalar" in kind
    if isinstance(value, (int, Expr)):
        return any(k in kind for k in ("int", "float", "number", "Scalar", "SymInt"))
    return True


def _shown(x: Any) -> str:
    if isinstance(x, Value):
        return str(x.type)
    if isinstance(x, tuple):
        return "[" + ", ".join(map(_shown, x)) + "]"
    return str(x)


def _error(
    code: str, message: str, x: s.Expr, to: Construction, help: str | None = None
) -> DfcError:
    if to.source is None:
        return DfcError(code, f"{message} in `{expression_text(x)}`", help=help)
    return DfcError(code, message, span=to.source.span(*x.at), help=help)
