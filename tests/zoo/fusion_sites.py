"""Where a model's dataflow has an attention, a norm, an activation or an MLP, whole or spelled out.

No rule, journal or name of a module is asked.

attention   A softmax whose operand comes from a product of two activations (the scores), through
            anything done to them on the way (scale, mask, bias, cap, cast, view, sinks), and whose
            result goes, through views, casts, dropouts and masks, into a product with a third
            activation (the values). Whole: scaled_dot_product_attention, and any op named
            `*_attention`. No sites: linear attention and state spaces (no softmax), additive and
            pooling attention (the scores are no product of activations), routers (no values).
norm        Whole: layer, rms, group, batch and instance norm, and any op named so
            (`skip_layer_norm`). Spelled out: a mean of squares, a variance or a standard
            deviation, whose inverse root, through casts, views and the weight, multiplies (or
            whose root divides) the same tensor that it was taken of, centred or not. A variance
            that is a buffer is a frozen batch norm. No sites: division by a norm that is a sum
            (`normalize`), weight norm, statistics that only come out as results.
activation  Whole: the ops of `ACTIVATIONS`, and any op with one of them in its name
            (`linear_gelu`). Spelled out: erf or tanh plus 1, times the operand (gelu); the operand
            times its own sigmoid (silu, quick gelu), times the tanh of its softplus (mish), times
            its own clamped sum (hardswish). No sites: sigmoid and tanh by themselves, which are
            gates more often, and a gate's sigmoid times something else.
mlp         An activation whose operand comes, through views, casts, halves and added parameters,
            from a linear (a product with a parameter), and whose result goes, through those,
            dropouts and the product with a gate, into a linear. Whole: the activation is whole
            and, if there is a gate, gate and operand come from one linear. Experts held in one
            tensor and selected by index are no linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dfc.ir.graph import Graph, Node, Parameter, Value

ACTIVATIONS = frozenset(
    """relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish hardswish hardtanh glu
    swiglu geglu""".split()  # noqa: SIM905
)
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_CASTS = frozenset("_to_copy to type_as float half double clone contiguous alias detach".split())  # noqa: SIM905
_VIEWS = _CASTS | frozenset(
    """view reshape _unsafe_view flatten unflatten transpose permute movedim t mT numpy_T squeeze
    unsqueeze expand broadcast_to select slice narrow repeat repeat_interleave constant_pad_nd pad
    split chunk split_with_sizes unbind tensor_split lift_fresh_copy""".split()  # noqa: SIM905
)
_PRODUCTS = frozenset("matmul bmm mm einsum baddbmm linear dot mv".split())  # noqa: SIM905
# What may lie between the product of queries and keys and the softmax.
_ON_SCORES = _VIEWS | frozenset(
    """mul div add sub rsub where masked_fill tanh clamp clamp_min clamp_max minimum maximum cat
    masked_fill_ softcap amax max gather index index_select as_strided nan_to_num copy dropout
    slice_scatter select_scatter fill abs exp""".split()  # noqa: SIM905
)
# What may lie between the softmax and the product with the values.
_ON_WEIGHTS = _VIEWS | frozenset(
    "dropout native_dropout feature_dropout where masked_fill mul nan_to_num".split()  # noqa: SIM905
)
_BETWEEN_LINEARS = _VIEWS | frozenset("dropout native_dropout add mul".split())  # noqa: SIM905


@dataclass(frozen=True)
class Site:
    """One place of a kind: the node that marks it, and whether it is one op."""

    kind: str
    form: str
    node: Node
    whole: bool
    around: str = ""

    @property
    def module(self) -> str:
        return self.node.loc.module if self.node.loc else ""


# the sites of a graph


def sites(graph: Graph) -> list[Site]:
    """Every site, nested graphs included, in the order of the nodes that mark them."""
    found: list[Site] = []
    for node in graph.walk():
        for find in (_attention, _norm, _activation):
            site = find(node)
            if site is not None:
                found.append(site)
                if site.kind == "activation":
                    mlp = _mlp(site)
                    found += [mlp] if mlp else []
    return found


def base(node: Node | None) -> str:
    """The op's name without namespace and overload: `softmax` for `aten._softmax.default`."""
    return node.op.split(".")[1].lstrip("_") if node is not None else ""


def _in(node: Node | None, names: frozenset[str]) -> bool:
    return node is not None and (base(node) in names or "_" + base(node) in names)


def _peel(value: Value | None, names: frozenset[str] = _VIEWS) -> Value | None:
    """What a value was before views and casts."""
    while value is not None and _in(value.node, names):
        value = next(value.node.operands, None)  # type: ignore[union-attr]
    return value


def _behind(start: Value, through: frozenset[str]) -> Iterator[Value]:
    """The values that `start` is made from by ops of these names, itself first, ends included."""
    pending, seen = [start], {start}
    while pending:
        value = pending.pop()
        yield value
        if _in(value.node, through):
            for x in value.node.operands:  # type: ignore[union-attr]
                if x not in seen:
                    seen.add(x)
                    pending.append(x)


def _ahead(start: Value, through: frozenset[str]) -> Iterator[tuple[Node, Value]]:
    """The nodes that read what ops of these names make of `start`, and the value each reads."""
    pending, seen = [start], {start}
    while pending:
        value = pending.pop()
        for user in value.users:
            yield user, value
            if _in(user, through) and (base(user) != "add" or _lone(user, value)):
                for r in user.results:
                    if r not in seen:
                        seen.add(r)
                        pending.append(r)


def _lone(node: Node, value: Value) -> bool:
    """Whether nothing but constants joins the value."""
    return all(v is value or _constant(v) for v in node.operands)


def _constant(value: Value | None) -> bool:
    """A parameter, or what only parameters and numbers make."""
    pending = [value] if value is not None else []
    for _ in range(64):
        if not pending:
            return True
        x = pending.pop()
        if isinstance(x, Parameter):
            continue
        if x.node is None:
            return False
        pending += x.node.operands
    return False


def _number(node: Node) -> float | None:
    """The number that an op adds, multiplies by or raises to."""
    for name in ("other", "exponent", "value"):
        if isinstance(node.attributes.get(name), (int, float)):
            return float(node.attributes[name])
    return None


# attention


def _product(node: Node | None) -> list[Value]:
    """The factors of a product of two activations, else nothing.

    A learned query is one of them, too: a constant of three dimensions, as no weight has.
    """
    if node is None or base(node) not in _PRODUCTS - {"linear"}:
        return []
    factors = list(node.operands)[1:] if base(node) == "baddbmm" else list(node.operands)[:2]
    steady = [v for v in factors if _constant(v)]
    if len(factors) != 2 or len(steady) == 2 or any(v.tensor_type.rank < 3 for v in steady):
        return []
    return factors


def _attention(node: Node) -> Site | None:
    name = base(node)
    if name.endswith("_attention"):
        return Site("attention", name, node, whole=True)
    if name not in ("softmax", "safe_softmax") or not node.results:
        return None
    scores = next(node.operands)
    if not any(_product(v.node) for v in _behind(scores, _ON_SCORES)):
        return None
    for user, weights in _ahead(node.results[0], _ON_WEIGHTS):
        if weights in _product(user):
            return Site("attention", f"softmax, {base(user)}", node, False, _around(node))
    return None


# norms


def _norm(node: Node) -> Site | None:
    name = base(node)
    if node.op.startswith(("aten.", "dfc.")) and any(n in name for n in _NORMS):
        return Site("norm", name, node, whole=True)
    found = _root(node)
    if found is None:
        return None
    inverse, root, under = found
    stat = _statistic(under)
    if stat is None:
        return None
    form, of = stat
    for user, scale in _ahead(root, _VIEWS | {"add", "clamp", "clamp_min", "mul", "reciprocal"}):
        operands = list(user.operands)
        if base(user) not in ("mul", "div", "addcmul", "sub") or len(operands) < 2:
            continue
        others = [v for v in operands if v is not scale]
        if base(user) == "div" and (inverse or operands[1] is not scale):
            continue
        if base(user) == "sub":  # x * s - mean * s
            continue
        for other in others:
            if of is None or of & _origins(other):
                return Site("norm", form, node, False, _around(node))
    return None


def _root(node: Node) -> tuple[bool, Value, Value] | None:
    """Whether the node is an inverse root, its result, and what is under the root."""
    name, operands = base(node), list(node.operands)
    if not operands or not node.results:
        return None
    if name == "rsqrt" or (name == "pow" and _number(node) == -0.5):
        return True, node.results[0], operands[0]
    if name == "sqrt" or (name == "pow" and _number(node) == 0.5):
        return False, node.results[0], operands[0]
    if name in ("std", "std_mean"):
        return False, node.results[0], node.results[0]
    return None


def _statistic(under: Value) -> tuple[str, set[Value] | None] | None:
    """The kind of norm, and the values that the statistic was taken of (None: a buffer)."""
    value: Value | None = under
    for _ in range(8):  # + eps, clamp, casts, in any order
        node = value.node if value is not None else None
        if not _in(node, _CASTS | {"add", "clamp", "clamp_min", "maximum", "view", "unsqueeze"}):
            break
        operands = [v for v in node.operands if not _constant(v)]  # type: ignore[union-attr]
        if len(operands) > 1:
            break
        value = operands[0] if operands else next(node.operands)  # type: ignore[union-attr]
    if value is None:
        return None
    if isinstance(value, Parameter):
        return ("frozen batch norm", None) if "var" in value.name else None
    node = value.node
    name = base(node)
    if node is None:
        return None
    if name in ("var", "var_mean", "std", "std_mean"):
        return f"layer norm by {name}", _origins(next(node.operands))
    if name == "sub":  # E[x^2] - E[x]^2
        node = next(node.operands).node
        name = base(node)
    if name in ("div", "mul") and node is not None:  # sum / n
        node = next(node.operands).node
        name = base(node)
        if name not in ("sum", "mean"):
            return None
    elif name != "mean":
        return None
    assert node is not None
    squared = _peel(next(node.operands))
    square = squared.node if squared is not None else None
    if square is None or not (
        (base(square) == "pow" and _number(square) == 2)
        or base(square) == "square"
        or (base(square) == "mul" and len({*square.operands}) == 1 and len(square.inputs) == 2)
    ):
        return None
    of = _origins(next(square.operands))
    centred = any(base(v.node) == "sub" for v in of)
    return ("layer norm" if centred else "rms norm"), of


def _origins(value: Value) -> set[Value]:
    """The value before views and casts and, where a mean was taken off it, before that."""
    found: set[Value] = set()
    x = _peel(value)
    while x is not None and x not in found:
        found.add(x)
        if base(x.node) != "sub":
            break
        x = _peel(next(x.node.operands))  # type: ignore[union-attr]
    return found


# activations


def _activation(node: Node) -> Site | None:
    name = base(node)
    if node.op.startswith(("aten.", "dfc.")) and (
        name in ACTIVATIONS or (node.op.startswith("dfc.") and ACTIVATIONS & {*name.split("_")})
    ):
        return Site("activation", name, node, whole=True)
    if name not in ("erf", "tanh", "sigmoid", "hardsigmoid", "clamp") or not node.results:
        return None
    source = next(node.operands)
    form = {"erf": "gelu by erf", "sigmoid": "silu", "hardsigmoid": "hardswish"}.get(name, "")
    if name == "tanh":
        inside = _peel(source)
        inside_node = inside.node if inside is not None else None
        if base(inside_node) == "softplus" or _is_log_exp(inside_node):
            form, source = "mish", next(inside_node.operands)  # type: ignore[union-attr]
        else:
            form = "gelu by tanh"
    elif name == "clamp":  # x * clamp(x + 3, 0, 6) / 6
        if (node.attributes.get("min"), node.attributes.get("max")) != (0, 6):
            return None
        form = "hardswish"
    if form == "silu" and base(source.node) == "mul":
        form = "quick gelu"
    sources = _scaled_from(source, deep=form == "gelu by tanh")
    plus = form.startswith("gelu")
    for user, got in _ahead(node.results[0], _CASTS | {"mul", "div", "add"}):
        others = [v for v in user.operands if v is not got]
        if base(user) != "mul" or not others:
            continue
        if plus and not any(base(v.node) == "add" for v in _behind(got, _CASTS | {"mul", "div"})):
            continue
        if any(_scaled_from(v) & sources for v in others):
            return Site("activation", form, node, False, _around(node))
    return None


def _is_log_exp(node: Node | None) -> bool:
    if base(node) not in ("log", "log1p") or node is None:
        return False
    return any(base(v.node) == "exp" for v in _behind(next(node.operands), frozenset({"add"})))


def _scaled_from(value: Value, *, deep: bool = False) -> set[Value]:
    """The value, and what it is a multiple of; deep: what its polynomial is of."""
    through = _CASTS | {"mul", "div", "neg"} | ({"add", "pow"} if deep else set())
    found = set()
    for v in _behind(value, frozenset(through)):
        if not isinstance(v, Parameter):
            found.add(v)
    return found if deep else {v for v in found if _multiple(value, v)}


def _multiple(value: Value, of: Value) -> bool:
    """Whether a value is another one times numbers and constants."""
    while value is not of:
        node = value.node
        if not _in(node, _CASTS | {"mul", "div", "neg", "add"}) or node is None:
            return False
        if base(node) == "add" and _number(node) != 3:
            return False
        rest = [v for v in node.operands if not _constant(v)]
        if len(rest) != 1:
            return False
        value = rest[0]
    return True


# MLPs


def _linear(node: Node | None) -> Node | None:
    """The node if it is a product of an activation and a parameter."""
    if node is None or base(node).startswith("linear_"):
        return node
    if base(node) not in _PRODUCTS | {"addmm"}:
        return None
    factors = list(node.operands)[1:3] if base(node) == "addmm" else list(node.operands)[:2]
    return node if any(map(_constant, factors)) and not all(map(_constant, factors)) else None


def _linear_behind(value: Value) -> Node | None:
    """The linear that a value comes from through views, halves and an added parameter."""
    for _ in range(16):
        node = value.node
        if node is None:
            return None
        if _linear(node):
            return node
        rest = [v for v in node.operands if not _constant(v)]
        if not _in(node, _VIEWS | {"add", "clamp"}) or len(rest) != 1:
            return None
        value = rest[0]
    return None


def _mlp(site: Site) -> Site | None:
    node = site.node
    into = next((v for v in node.operands if not _constant(v)), None)
    if into is None or not node.results:
        return None
    first = node if base(node).startswith("linear_") else None
    for v in [] if first else _behind(into, _CASTS | {"mul", "div", "add", "pow", "neg"}):
        first = first or _linear_behind(v)
    if first is None:
        return None
    through = _BETWEEN_LINEARS if site.whole else _BETWEEN_LINEARS | {"div"}
    last, gates = None, []
    for user, got in _ahead(node.results[0], through):
        if base(user) == "mul":
            gates += [v for v in user.operands if v is not got and not _constant(v)]
        if _linear(user) and got is next(
            user.operands if base(user) != "addmm" else iter([*user.operands][1:])
        ):
            last = user
            break
    if last is None:
        return None
    others = [_linear_behind(v) for v in gates]
    if site.whole and None in others:
        return None
    linears = {first} | {g for g in others if g is not None}
    form = f"{site.form}{', gate' if len(linears) > 1 or (gates and site.whole) else ''}"
    return Site("mlp", form, node, site.whole and len(linears) == 1, _around(node))


def _around(node: Node) -> str:
    """The ops that lead to a node and follow it: the reason column until a tool can say more."""
    before: list[str] = []
    at: Node | None = node
    for _ in range(4):
        values = [v for v in at.operands if v.node is not None and not _constant(v)] if at else []
        at = values[0].node if values else None
        before += [base(at)] if at else []
    after: list[str] = []
    at = node
    for _ in range(4):
        at = next((u for u in at.users if u.op != "dfc.return"), None) if at else None
        after += [base(at)] if at else []
    return " ".join([*reversed(before), f"[{base(node)}]", *after])
