"""Run in 16 bits what gains from it, and keep in f32 what needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dfc.compress.casting import F32, choose_half, is_cast_up, is_f32, takes_part
from dfc.compress.magnitudes import largest_magnitudes
from dfc.compress.processor import declared, processor_of
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Input, Node, Parameter, Value
from dfc.ir.op import Precision
from dfc.ir.types import DTYPES, DType, TensorType
from dfc.ir.verify import infer_types
from dfc.ir.weights import TensorData
from dfc.lang.selectors import Selector
from dfc.ops.precision import precision_of
from dfc.rewrite.pass_ import KEPT, Context, Data, Pass, Quota, close

# What rounding to 16 bits may do to a result, as a share of its largest element: 16 units in the
# last place of the half type, as everywhere (dfc.rewrite.agree).
_RTOL = {"bf16": 16 * 2.0**-7, "f16": 16 * 2.0**-10}
_LARGEST = {"bf16": 3.3895313892515355e38, "f16": 65504.0}
_SMALLEST = {"bf16": 1.1754943508222875e-38, "f16": 2.0**-14}  # normal numbers
_SMALLEST_STORED = 1024  # smaller weights gain nothing by another type
_HEADROOM = 2.0  # data that nobody has seen may be this much larger
# op -> the operand that is added to scores: what is below the range means "look away", and may be
# any very negative number
_MASKS = {
    "aten.scaled_dot_product_attention.default": 3,
    "dfc.multi_head_attention": 3,
}
_CAST = "aten._to_copy.default"
_NUMBERS = frozenset({"other", "value", "min", "max", "alpha", "beta"})  # that meet elements


@dataclass(frozen=True)
class Autocast(Pass):
    """Cast to bf16 or f16 where that halves the bytes that move; weights are cast once, and stored.

    Needs:    a valid graph; for f16 data or an example, to see which values overflow.
    Ensures:  what multiplies matrices runs in the half type; casts move as few bytes as can be, and
              none undoes another.
    Keeps:    the types of inputs and outputs; integer layers; in f32, with a reason: softmax,
              norms, exponentials, long sums, what `except` names, what is too large or too small.
    Why:      with `only_weights`, files shrink as well, and engines without 16-bit kernels lose
              nothing: they cast once, when they load. Run it last: folding constants undoes it.
    Cost:     one maximum flow; for f16 the graph is run once for each batch of the data.
    Raises:   DfcError Q021 for a selector that matches nothing; D for data that does not fit.
    """

    name = "autocast"
    numerics = close(_RTOL["bf16"])

    phrases = {"": "dtype", "on": "select", "using": "calib", "except": "exclude"}  # noqa: RUF012

    dtype: Literal["bf16", "f16"] = "bf16"
    calib: Data | None = None  # f16 overflows beyond 65 504: data that shows where
    select: Selector | None = None  # cast this part of the model alone
    exclude: Selector | None = None  # keep this part in f32
    only_weights: bool = False  # store weights in the half type, compute in f32 all the same
    limit: int | None = None  # cast at most this many nodes; bisects a miscompile
    skip: tuple[int, ...] = ()  # nodes by number that are left out: those found to be wrong

    def needs(self, target: object) -> str | None:
        device = declared(target)
        if self.only_weights or device is None or device.computes(self.dtype):
            return None
        return f"{device}; `only_weights=yes` stores weights in {self.dtype}, and pays everywhere"

    def __post_init__(self) -> None:
        object.__setattr__(self, "numerics", close(_RTOL[self.dtype]))

    def run(self, graph: Graph, ctx: Context) -> int:
        half = DTYPES[self.dtype]
        if self.only_weights:
            return _Stored(graph, half, self, ctx).run()
        device = processor_of(ctx.target)
        if not device.computes(self.dtype):
            ctx.note(f"autocast: {device}, not in {self.dtype}: it may be slower, so measure it")
        taking = [n for n in graph.nodes if takes_part(n)]
        found = _Reasons(graph, taking, self, ctx)
        chosen = choose_half(graph, found.wishes)
        quota = Quota(self.limit, self.skip)
        caster = _Caster(graph, half)
        for node in list(graph.nodes):
            if node in chosen and quota.allows(node) and not caster.lower(node):
                quota.failed(node)
                found.reasons[node] = f"`{node.op}` is not there in {half}"
            elif node in chosen and caster.is_half(node):
                ctx.decided(node, "cast", f"runs in {half}: {found.reasons[node]}")
                continue
            caster.raise_operands(node)
            if node in found.wishes and node.op != _CAST:
                ctx.decided(node, KEPT, _kept(found, node))
        caster.finish()
        return quota.done


def _kept(found: _Reasons, node: Node) -> str:
    if found.wishes[node] == "follow":
        return "stays in f32: running in 16 bits would need more casts"
    return f"stays in f32: {found.reasons[node]}"


class _Reasons:
    """What each node may run in, and why."""

    def __init__(self, graph: Graph, taking: list[Node], p: Autocast, ctx: Context) -> None:
        self.wishes: dict[Node, Precision] = {}
        self.reasons: dict[Node, str] = {}
        self.dtype = p.dtype
        for node in taking:
            self.wishes[node], self.reasons[node] = precision_of(node)
            if self.wishes[node] != "f32":
                self._pin(node, self._odd(node))
        self._select(graph, p)
        if any(w == "half" for w in self.wishes.values()):
            self._guard(graph, p, ctx)

    def _pin(self, node: Node, reason: str | None) -> None:
        if reason is not None:
            self.wishes[node], self.reasons[node] = "f32", reason

    def _select(self, graph: Graph, p: Autocast) -> None:
        if p.exclude is not None:
            for node in p.exclude.nodes_left(graph):
                if node in self.wishes:
                    self._pin(node, f"`except {p.exclude}` names it")
        if p.select is not None:
            inside = set(p.select.nodes_left(graph))
            for node in self.wishes:
                if node not in inside:
                    self._pin(node, f"it lies outside of {p.select}")

    def _odd(self, node: Node) -> str | None:
        """Why a node cannot run in the half type whatever the data: its own numbers forbid it."""
        if any(map(_was_rounded, node.operands)):
            return "it reads codes, which engines multiply as whole numbers"
        if not any(map(is_f32, node.operands)):
            return "it makes f32 from what is not"
        if any(isinstance(r.type, TensorType) and r.type.dtype != F32 for r in node.results):
            return "its result has another type"
        for name, value in node.attributes.items():
            if isinstance(value, DType):
                return f"`{name}={value}` fixes its type"
            number = isinstance(value, float) or (name in _NUMBERS and isinstance(value, int))
            if number and math.isfinite(value) and not self._fits(value):
                return f"`{name}={value:g}` does not fit into {self.dtype}"
        return None

    def _fits(self, value: float) -> bool:
        size = abs(value)
        return not size or _SMALLEST[self.dtype] <= size <= _LARGEST[self.dtype]

    def _guard(self, graph: Graph, p: Autocast, ctx: Context) -> None:
        """Keep in f32 the nodes that read or make numbers that the half type has not."""
        limit = _LARGEST[self.dtype]
        seen: Mapping[Value, float] = {}
        where = ""
        if self.dtype == "f16":
            seen, where = largest_magnitudes(graph, ctx, p.calib)
        pinned: list[str] = []
        for node in [n for n, wish in self.wishes.items() if wish != "f32"]:
            reason = _too_large(node, seen, limit, where, self.dtype)
            if reason is not None:
                self._pin(node, reason)
                pinned.append(reason)
        if pinned:
            more = len(set(pinned)) - 1
            verb = "does" if more == 1 else "do"
            others = f"; {counted(more, 'other value')} {verb} not fit either" if more else ""
            stay = "stays" if len(pinned) == 1 else "stay"
            ctx.note(f"autocast: {counted(len(pinned), 'node')} {stay} in f32: {pinned[0]}{others}")


def _was_rounded(v: Value) -> bool:
    """Whether a value was computed, quantized and is only written as a float again."""
    if v.node is None or v.node.op != "dfc.dequantize":
        return False
    codes = next(v.node.operands)
    return codes.node is not None and codes.node.op == "dfc.quantize"


def _too_large(
    node: Node, seen: Mapping[Value, float], limit: float, where: str, dtype: str
) -> str | None:
    mask = _MASKS.get(node.op)
    spared = node.inputs[mask] if mask is not None and len(node.inputs) > mask else None
    for v in (*node.operands, *node.results):
        if v is spared or not is_f32(v):
            continue
        if isinstance(v, Parameter):
            size = _magnitude(v)
            if size > limit:
                return f"!{v.name} holds {size:.3g}: {dtype} ends at {limit:.5g}"
            if 0 < size < _SMALLEST[dtype]:
                return f"!{v.name} is at most {size:.3g}: {dtype} has few digits there"
        elif seen.get(v, 0.0) * _HEADROOM > limit:
            return f"%{v.name} reaches {seen[v]:.3g} {where}: {dtype} ends at {limit:.5g}"
    return None


def _magnitude(p: Parameter) -> float:
    data = p.data.tensor() if p.data is not None else None
    return float(data.abs().max()) if data is not None and data.numel() else 0.0


class _Stored:
    """Weights stored in the half type, and cast back to f32 where they are read."""

    def __init__(self, graph: Graph, half: DType, p: Autocast, ctx: Context) -> None:
        self.graph, self.half, self.p, self.ctx = graph, half, p, ctx
        self.caster = _Caster(graph, half)
        self.excluded = set(p.exclude.nodes_left(graph)) if p.exclude else set()
        self.included = set(p.select.nodes_left(graph)) if p.select else None

    def run(self) -> int:
        quota = Quota(self.p.limit, self.p.skip)
        for p in list(self.graph.parameters.values()):
            if not is_f32(p) or not p.users or self._is_small(p):
                continue
            reason = self._why_not(p)
            if reason is not None:
                self.ctx.decided(p, KEPT, f"stays in f32: {reason}")
            elif quota.allows(next(n for n in p.users)):
                self._store(p)
                self.ctx.decided(p, "cast", f"stored in {self.half}, computed with in f32")
        return quota.done

    def _is_small(self, p: Parameter) -> bool:
        numel = p.tensor_type.numel
        return not isinstance(numel, int) or numel < _SMALLEST_STORED

    def _why_not(self, p: Parameter) -> str | None:
        if p in self.caster.written or self.graph.result in p.users:
            return "the model writes to it, or gives it away"
        if any(not n.op.startswith("aten.") for n in p.users):
            return "an op reads it that has a form of its own for weights"
        if self.excluded & set(p.users):
            return f"`except {self.p.exclude}` names what reads it"
        if self.included is not None and not self.included & set(p.users):
            return f"it lies outside of {self.p.select}"
        size = _magnitude(p)
        if size > _LARGEST[self.half.name] or 0 < size < _SMALLEST[self.half.name]:
            return f"it reaches {size:.3g}, which {self.half} has not, or not well"
        return None

    def _store(self, p: Parameter) -> None:
        stored = self.caster.half_parameter(p, False, [])
        first = next(n for n in self.graph.nodes if n in p.users)
        wide = self.caster.add(
            first, _CAST, stored, TensorType(F32, p.tensor_type.shape), "f32", dtype=F32
        )
        self.graph.replace_uses(p, wide)
        self.graph.drop_parameter(p.name)
        self.graph.rename(stored, p.name)
        stored.aliases = p.aliases


class _Caster:
    """Changes nodes to the half type and back; each value is cast once in each direction."""

    def __init__(self, graph: Graph, half: DType) -> None:
        self.graph, self.half = graph, half
        self.low: dict[tuple[Value, bool], Value] = {}
        self.high: dict[Value, Value] = {}
        self.written = {m.target for m in graph.mutations}
        self.changed: set[Value] = set()
        self.stored: dict[Parameter, Parameter] = {}

    def is_half(self, node: Node) -> bool:
        return any(r in self.changed for r in node.results)

    def lower(self, node: Node) -> bool:
        """Let a node run in the half type; False where the op has no such form."""
        mask = _MASKS.get(node.op)
        old = node.inputs
        new: list[Input] = []
        made: list[Value] = []

        def one(v: Value | None, saturate: bool) -> Value | None:
            return v if v is None or not is_f32(v) else self._down(v, node, saturate, made)

        for i, x in enumerate(old):
            new.append(
                tuple(one(v, False) for v in x) if isinstance(x, tuple) else one(x, i == mask)
            )
        self.graph.set_inputs_of(node, new)
        try:
            types = infer_types(node)
        except DfcError:
            types = ()
        if not any(isinstance(t, TensorType) and t.dtype == self.half for t in types):
            self.graph.set_inputs_of(node, old)
            self._forget(made)
            return False
        for r, t in zip(node.results, types, strict=True):
            if r.type != t:
                self.graph.set_type(r, t)
                self.changed.add(r)
        return True

    def _forget(self, made: list[Value]) -> None:
        """Take back casts that were made for a node in vain."""
        for v in reversed(made):
            for key in [k for k, x in self.low.items() if x is v]:
                del self.low[key]
            if isinstance(v, Parameter):
                self.stored = {p: x for p, x in self.stored.items() if x is not v}
                self.graph.drop_parameter(v.name)
            elif v.node is not None:
                self.graph.erase(v.node)

    def _down(self, v: Value, node: Node, saturate: bool, made: list[Value]) -> Value:
        """A value in the half type."""
        if (v, saturate) not in self.low:
            if is_cast_up(v) and next(v.node.operands).type.dtype == self.half:  # type: ignore[union-attr]
                self.low[v, saturate] = next(v.node.operands)  # type: ignore[union-attr]
            elif isinstance(v, Parameter) and v not in self.written:
                self.low[v, saturate] = self.half_parameter(v, saturate, made)
            else:
                self.low[v, saturate] = self._cast(v, node, saturate, made)
        return self.low[v, saturate]

    def _cast(self, v: Value, node: Node, saturate: bool, made: list[Value]) -> Value:
        x, wide = v, v.tensor_type
        if saturate:
            limit = _LARGEST[self.half.name]
            x = self.add(node, "aten.clamp.default", x, wide, "clamped", min=-limit, max=limit)
            made.append(x)
        type, name = TensorType(self.half, wide.shape), self.half.name
        x = self.add(node, _CAST, x, type, name, dtype=self.half)
        made.append(x)
        return x

    def add(
        self, before: Node | None, op: str, x: Value, type: TensorType, suffix: str,
        **attributes: object,
    ) -> Value:  # fmt: skip
        near = before or x.node
        added = self.graph.add(
            op, [x], attributes, types=[type], names=[f"{x.name}_{suffix}"], before=before,
            loc=near.loc if near else None, stage=near.stage if near else None,
        )  # fmt: skip
        return added.result

    def half_parameter(self, p: Parameter, saturate: bool, made: list[Value]) -> Parameter:
        """A weight in the half type: another parameter, with its numbers cast now."""
        name, n = f"{p.name}.{self.half}", 1
        while name in self.graph.parameters:
            name, n = f"{p.name}.{self.half}.{n}", n + 1
        type = TensorType(self.half, p.tensor_type.shape)
        found = self.graph.add_parameter(name, type, p.kind, self._rounded(p, saturate))
        made.append(found)
        self.stored[p] = found
        return found

    def _rounded(self, p: Parameter, saturate: bool) -> TensorData | None:
        if p.data is None:
            return None
        wide, limit = p.data.tensor(), _LARGEST[self.half.name]
        wide = wide.clamp(-limit, limit) if saturate else wide
        return TensorData(p.name, wide.to(self.half.to_torch()))

    def raise_operands(self, node: Node) -> None:
        """Give a node that runs in f32 its operands in f32."""

        def one(v: Value | None) -> Value | None:
            return v if v is None or v not in self.changed else self._up(v, node)

        if any(v in self.changed for v in node.operands):
            new = [tuple(map(one, x)) if isinstance(x, tuple) else one(x) for x in node.inputs]
            self.graph.set_inputs_of(node, new)

    def _up(self, v: Value, node: Node) -> Value:
        if v not in self.high:
            type = TensorType(F32, v.tensor_type.shape)
            anchor = None if node is self.graph.result else node
            self.high[v] = self.add(anchor, _CAST, v, type, "f32", dtype=F32)
        return self.high[v]

    def finish(self) -> None:
        """Outputs as they were; weights that only half types read have their old names."""
        self.raise_operands(self.graph.result)
        for p, stored in self.stored.items():
            if not p.users and p not in self.written:
                self.graph.drop_parameter(p.name)
                self.graph.rename(stored, p.name)
                stored.aliases = p.aliases
