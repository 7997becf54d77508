"""The graph that a rule's match lines describe, written down for the types of one sample.

A pattern stands for many graphs: optional ops are there or not, alternatives are taken in turn,
tails have lengths, `_` and `~=` leave room. `Choices` says which graph is meant;
prove_choices.py walks through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfc.errors import DfcError
from dfc.ir.graph import Argument, Graph, Node, Parameter, Range, Value, attribute_key
from dfc.ir.op import REQUIRED, OpInfo, OpRefused, lookup
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.weights import TensorData
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.ops.aten import AtenOp
from dfc.rewrite.construct import _bound, overloads
from dfc.rewrite.deciding import NEAR
from dfc.rewrite.patterns import commutes, signature
from dfc.rewrite.prove_run import RunBuilder, element_count
from dfc.rewrite.prove_sample import Case, Refused, Spec, Unbuildable
from dfc.rewrite.rule import CONSTANTS, Rule, is_scoped

MAX_RESULT = 5_000_000  # elements of what an op may give
TAILS = (2, 0, 1, 3)  # how many operands `...rest` stands for


class Choices:
    """Which graph of a pattern is meant: an option at each place where there are several.

    A place that `wanted` does not name takes its first option; `seen` collects all places.
    """

    def __init__(self, wanted: Mapping[str, int] | None = None) -> None:
        self.wanted = dict(wanted or {})
        self.seen: dict[str, int] = {}

    def take(self, place: str, options: int) -> int:
        self.seen[place] = max(options, self.seen.get(place, 0))
        return min(self.wanted.get(place, 0), options - 1)


@dataclass
class Left:
    """A left side as a graph: `roots` are its outputs, `given` the sample's names in it."""

    graph: Graph
    roots: dict[str, Value]
    given: dict[str, Any]
    used: frozenset[str]


def build_left(
    rule: Rule,
    case: Case,
    choices: Choices,
    data: Mapping[str, torch.Tensor],
    ranges: Mapping[str, Range] | None = None,
    strict: bool = False,
) -> Left:
    """Write the match lines as a graph. `data` has the numbers of constants.

    With `strict`, an op that does not run on zeros of small size is refused at once.

    Raises:  Unbuildable.
    """
    writer = _Writer(rule, case, choices, data, dict(ranges or {}))
    writer.builder.strict = strict
    return writer.left()


class _Writer:
    def __init__(
        self,
        rule: Rule,
        case: Case,
        choices: Choices,
        data: Mapping[str, torch.Tensor],
        ranges: dict[str, Range],
    ) -> None:
        self.rule, self.case, self.choices, self.data = rule, case, choices, data
        self.graph = Graph("left", ranges=ranges)
        self.builder = RunBuilder(self.graph)
        self.env: dict[str, Any] = {}
        self.written: dict[object, Node] = {}
        self.used: set[str] = set()

    def left(self) -> Left:
        for name, given in self.case.items():  # sizes come first, in the sample's order
            if isinstance(given, Spec) and not given.constant:
                self.env[name] = self.tensor(name, given)
        if self.rule.in_order is None:
            raise Unbuildable("the match lines read each other's results in a circle")
        for i, m in enumerate(self.rule.in_order):
            value = self.value(m.pattern, f"{i}")
            if not isinstance(value, Value) or value.node is None:
                raise Unbuildable("the pattern is no op with these choices")
            results = value.node.results
            if len(results) < len(m.names):
                raise Unbuildable(f"`{value.node.op}` gives {len(results)} results")
            self.env |= dict(zip((w.name for w in m.names), results, strict=False))
        roots = {name: self.env[name] for name in self.rule.roots}
        shown = dict.fromkeys(roots.values())
        self.graph.set_outputs(list(shown))
        self.drop_unused()
        self.graph.arguments = tuple(Argument(v.name, LEAF) for v in self.graph.inputs)
        return Left(self.graph, roots, self.env, frozenset(self.used))

    def drop_unused(self) -> None:
        """Forget the inputs that this graph does not read, so that it is what it says."""
        self.graph._inputs = [
            v for v in self.graph._inputs if v.use_count or v.name in self.needed_for_sizes()
        ]

    def needed_for_sizes(self) -> frozenset[str]:
        """Inputs whose shape alone is read: a symbol that attributes mention."""
        wanted = frozenset().union(*(n.symbols for n in self.graph.nodes), *[frozenset[str]()])
        return frozenset(v.name for v in self.graph._inputs if v.type.symbols & wanted)

    def tensor(self, name: str, spec: Spec) -> Value:
        if spec.mark in ("halves", "pairs"):
            return self.twice(name, spec)
        if not spec.constant:
            value = self.graph.add_input(self.graph.fresh_name(name), spec.type)
            return self.moderate(value) if spec.mark == "moderate" else value
        data = self.data.get(name)
        if data is None:
            raise Unbuildable(f"`{name}` is constant and has no data")
        kept = TensorData(name, data)
        return self.graph.add_parameter(name, spec.type, "parameter", kept)

    def moderate(self, x: Value) -> Value:
        """Any input made finite and small: what is made of it cannot overflow."""
        if not x.tensor_type.dtype.is_float:
            return x
        return self.builder("aten.tanh.default", self.builder("aten.nan_to_num.default", x))

    def twice(self, name: str, spec: Spec) -> Value:
        """A tensor whose last dimension is two copies of an input."""
        *lead, last = spec.type.shape or (None,)
        if not isinstance(last, int) or last % 2:
            raise Unbuildable(f"`{name}` is {spec.type}: its last dimension is not even")
        once = spec.type.with_shape((*lead, last // 2))
        x = self.graph.add_input(self.graph.fresh_name(name), once)
        if spec.mark == "halves":
            return self.builder("aten.cat.default", [x, x], dim=-1)
        pairs = self.builder("aten.stack.default", [x, x], dim=-1)
        return self.builder("aten.view.default", pairs, size=spec.type.shape)

    # Expressions

    def value(self, x: s.Expr, place: str) -> Any:
        """What an expression of a pattern stands for; `Free` where anything may stand."""
        if isinstance(x, s.Word):
            return self.word(x)
        if isinstance(x, s.Number | s.Text):
            return x.value
        if isinstance(x, s.Unary) and isinstance(x.operand, s.Number):
            return self.near(x.operand.value, place)
        if isinstance(x, s.Several):
            return self.items(x, place)
        if isinstance(x, s.Binary) and x.op == "|":
            options = _options(x)
            i = self.choices.take(f"{place}|", len(options))
            return self.value(options[i], f"{place}|{i}")
        if isinstance(x, s.Call):
            if x.mark == "?" and self.choices.take(f"{place}?", 2):
                return self.value(x.arguments[0], f"{place}.0")
            return self.apply(x, place)
        raise Unbuildable(f"`{expression_text(x)}` is no pattern")

    def word(self, x: s.Word) -> Any:
        name = x.name
        if name == "_":
            return Free("_")
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in self.case:
            self.used.add(name)
        if name in self.env:
            return self.env[name]
        if name in self.case:
            given = self.case[name]
            self.env[name] = self.tensor(name, given) if isinstance(given, Spec) else given
            return self.env[name]
        return Free(name)

    def near(self, value: float, place: str) -> float:
        """A constant as written, or as far from it as `~=` allows."""
        shift = (0.0, 0.9 * NEAR, -0.9 * NEAR)[self.choices.take(f"{place}~", 3)]
        return value * (1 + shift) if shift else value

    def items(self, x: s.Several, place: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for i, item in enumerate(x.items):
            if isinstance(item, s.Tail):
                found += self.tail(item.name, place)
            else:
                found.append(self.value(item, f"{place}[{i}]"))
        if any(isinstance(v, Free) for v in found):
            raise Unbuildable(
                f"the sample does not say what stands in `{expression_text(x)}`; "
                "in a list, `_` needs a name that the sample gives"
            )
        return tuple(found)

    def tail(self, name: str, place: str) -> tuple[Any, ...]:
        if name in self.env and isinstance(self.env[name], tuple):
            return tuple(self.env[name])
        given = self.case.get(name)
        if given is None:
            made: tuple[Any, ...] = ()
        elif isinstance(given, Spec):
            known = self.env.pop(name, None)
            count = TAILS[self.choices.take(f"{place}...", len(TAILS))]
            self.used |= {name} if count else set()
            if isinstance(known, Value):
                self.graph._inputs.remove(known)
                self.graph._release(known.name)
            made = tuple(self.tensor(f"{name}_{i}", given) for i in range(count))
        else:
            self.used.add(name)
            made = given if isinstance(given, tuple) else (given,)
        self.env[name] = made
        return made

    # Ops

    def apply(self, x: s.Call, place: str) -> Value:
        """The first result of an op on what its arguments stand for.

        Raises:  Unbuildable, Refused when the op has such arguments and refuses their types.
        """
        given = [self.value(a, f"{place}.{i}") for i, a in enumerate(x.arguments)]
        named = {k.name.name: self.value(k.value, f"{place}.{k.name.name}") for k in x.keywords}
        bare = x.name.name.removeprefix("aten.")
        values = len(given) > 1 and all(isinstance(v, Value) for v in given[:2])
        if values and commutes(bare, named.get("alpha")) and self.choices.take("swap", 2):
            given[:2] = given[1::-1]
        reasons: list[str] = []
        for bound in self.bindings(x.name.name if "." in bare else bare, given, named, place):
            try:
                return self.written_once(*bound).results[0]
            except (DfcError, OpRefused) as e:
                reasons.append(e.message if isinstance(e, DfcError) else str(e))
        if reasons:
            raise Refused(reasons[0])
        shown = ", ".join([*map(_shown, given), *(f"{k}={_shown(v)}" for k, v in named.items())])
        raise Unbuildable(f"no `{x.name.name}` takes ({shown})")

    def bindings(
        self, name: str, given: Sequence[Any], named: Mapping[str, Any], place: str
    ) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
        """The ways to call an op of this name, the one that is meant first."""
        candidates = (name,) if "." in name else overloads(name)
        placed = []
        if any(isinstance(v, int | float) for v in (*given, *named.values())):
            placed = [b for op in candidates if (b := self.bind(op, given, named, place, True))]
        form = self.choices.take("number", 3) if placed else 0
        if form == 2:
            yield from (self.with_constants(*b) for b in placed)
        elif form == 1:
            yield from placed
        for op in candidates:
            strict = self.bind(op, given, named, place, False)
            if strict is not None:
                yield strict
        yield from placed

    def bind(
        self, op: str, given: Sequence[Any], named: Mapping[str, Any], place: str, numbers: bool
    ) -> tuple[str, list[Any], dict[str, Any]] | None:
        """Operands and attributes; with `numbers`, a number may stand in a tensor's place."""
        info, sig = lookup(op), signature(op)
        taken = sig.names[: len(given)]
        if len(given) > len(sig.names) or set(named) - set(sig.names) or set(named) & set(taken):
            return None
        values = dict(zip(taken, given, strict=True)) | dict(named)
        first = next((v for v in values.values() if isinstance(v, Value)), None)
        for name, v in values.items():
            if isinstance(v, Free):
                values[name] = self.free(info, name, v, first, f"{place}.{name}")
        placed: dict[str, Any] = {}
        for o in info.operands:
            v = values.get(o.name)
            if numbers and isinstance(v, int | float) and not isinstance(v, bool) and first:
                placed[o.name] = v
                values[o.name] = first
        if numbers and not placed:
            return None
        found = _bound(op, (), values)
        if found is None:
            return None
        operands, attributes = found
        for i, o in enumerate(info.operands):
            if o.name in placed:
                operands[i] = None
        return op, operands, attributes | placed

    def with_constants(
        self, op: str, operands: list[Any], attributes: dict[str, Any]
    ) -> tuple[str, list[Any], dict[str, Any]]:
        """Numbers in a tensor's place as constants of one element."""
        operands, attributes = [*operands], dict(attributes)
        for i, o in enumerate(lookup(op).operands):
            if o.name in attributes and operands[i] is None:
                operands[i] = self.number(attributes.pop(o.name))
        return op, operands, attributes

    def number(self, value: float) -> Parameter:
        name = f"number_{attribute_key(float(value))[0].hex()}"  # type: ignore[index]
        found = self.graph.parameters.get(name)
        if found is None:
            data = torch.tensor(float(value))
            type_ = TensorType(DTYPES["f32"], ())
            found = self.graph.add_parameter(name, type_, "constant", TensorData(name, data))
        return found

    def written_once(self, op: str, operands: list[Any], attributes: dict[str, Any]) -> Node:
        """Equal ops on equal operands are one node, as after `cse`."""
        key = (op, tuple(operands), attribute_key(tuple(sorted(attributes.items()))))
        node = self.written.get(key)
        if node is None:
            node = self.builder.node(op, *operands, **attributes)
            for r in node.results:
                if isinstance(r.type, TensorType) and element_count(r.type) > MAX_RESULT:
                    raise Unbuildable(f"`{op}` gives {r.type}, too much to try")
            self.written[key] = node
        return node

    def free(self, info: OpInfo, name: str, x: Free, first: Value | None, place: str) -> Any:
        """Something for a place where anything may stand, or for a name without a sample."""
        if x.name != "_" and x.name in self.env:
            return self.env[x.name]
        operand = next((o for o in info.operands if o.name == name), None)
        if x.name != "_" and not is_scoped(x.name):
            default = next((a.default for a in info.attributes if a.name == name), REQUIRED)
            if operand is not None and operand.optional:
                return None
            if operand is not None or default is REQUIRED:
                raise Unbuildable(f"the sample gives no `{x.name}`")
            return tuple(default) if isinstance(default, list) else default
        if operand is not None:
            if operand.optional and not self.choices.take(f"{place}_", 2):
                return None
            type_ = first.type if first else TensorType(DTYPES["f32"], (2, 3))
            found: Any = self.graph.add_input(self.graph.fresh_name(f"any_{name}"), type_)
        else:
            options = _fillings(info, name)
            if not options:
                raise Unbuildable(f"nothing says what `{name}` of `{info.name}` may be")
            found = options[self.choices.take(f"{place}_", len(options))]
        if x.name != "_":
            self.env[x.name] = found
        return found


@dataclass(frozen=True)
class Free:
    """A place that a pattern leaves open: `_`, or a name that the sample does not give."""

    name: str


def _options(x: s.Expr) -> list[s.Expr]:
    if isinstance(x, s.Binary) and x.op == "|":
        return [*_options(x.left), *_options(x.right)]
    return [x]


def _fillings(info: OpInfo, name: str) -> list[Any]:
    """What an attribute may be: its default, then others of its kind."""
    default = next(a.default for a in info.attributes if a.name == name)
    found: list[Any] = []
    if default is not REQUIRED:
        found.append(tuple(default) if isinstance(default, list) else default)
    if isinstance(info, AtenOp):
        schema = next(a for a in info.overload._schema.arguments if a.name == name)
        found += _OF_KIND.get(str(schema.real_type).removeprefix("Optional[").rstrip("]"), ())
    unique = {attribute_key(v): v for v in found}
    return [*unique.values()]


_OF_KIND: Mapping[str, tuple[Any, ...]] = {
    "bool": (False, True),
    "int": (0, 1, -1),
    "float": (0.5, 0.0, 1.0),
    "number": (1, 0.5, 0),
    "ScalarType": (DTYPES["f32"], DTYPES["f64"], DTYPES["f16"]),
}


def _shown(x: Any) -> str:
    if isinstance(x, Value):
        return str(x.type)
    if isinstance(x, tuple):
        return "[" + ", ".join(map(_shown, x)) + "]"
    return "_" if isinstance(x, Free) else str(x)
