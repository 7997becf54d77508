"""How much of the zoo is fused, as a table: `python -m tests.zoo.fusion [NAME...]` writes it.

Sites are found in the dataflow alone; no rule, journal or name of a module is asked. They are
counted twice: in the captured graph after `SIMPLIFY`, passes that neither fuse nor fold (so that
dead and duplicate code is no site), and in the graph after the passes in question. Whether results
stay right is not asked here: `tests.zoo.coverage` does, and a rewrite that a proof takes back is a
failure there.

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

A site is `whole` from the start, `fused` by the passes, or `left`: still spelled out, or gone
without one more whole op in its place. A batch norm is fused when it is gone, too: into the
convolution before it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfc.ir.graph import Graph, Node, Parameter, Value
from tests.zoo import Case, cases

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "fusion.md"
KINDS = ("attention", "norm", "activation", "mlp")
SIMPLIFY = ("canonicalize", "remove_noops", "cse", "dce")
# What is counted: the default passes (dead code goes last: what nobody reads must not keep
# a value alive that a rule would do without), all rules that dfc ships, and cleaning up.
PASSES = (
    "canonicalize", "remove_noops", "fold_constants", "fold_batch_norm", "remove_noops",
    "cse", "dce", "fuse", "remove_noops", "cse", "dce",
)  # fmt: skip
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


# counting


@dataclass
class Count:
    """The sites of one kind in one model."""

    whole: int = 0
    fused: int = 0
    left: int = 0

    @property
    def sites(self) -> int:
        return self.whole + self.fused + self.left

    def __str__(self) -> str:
        return f"{self.whole}/{self.fused}/{self.left}" if self.sites else ""

    @classmethod
    def parse(cls, text: str) -> Count:
        return cls(*map(int, text.split("/"))) if text else cls()


@dataclass
class Left:
    """Sites of one form that are left in one model."""

    name: str
    kind: str
    form: str
    count: int
    module: str
    reason: str


@dataclass
class Row:
    """One model's sites; `unsited` are modules whose class promises a site that was not found."""

    name: str
    family: str
    counts: dict[str, Count] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    unsited: list[str] = field(default_factory=list)


def compare(name: str, family: str, before: Graph, after: Graph) -> Row:
    """What became of the sites of a simplified graph once passes have made `after` of it."""
    row = Row(name, family)
    old, new = sites(before), sites(after)
    for kind in KINDS:
        was = [s for s in old if s.kind == kind]
        still = [s for s in new if s.kind == kind and not s.whole]
        spelled = [s for s in was if not s.whole]
        grown = _steady(new, kind) - _steady(old, kind)
        frozen = sum(s.form == "frozen batch norm" for s in spelled) - sum(
            s.form == "frozen batch norm" for s in still
        )
        gone = len(spelled) - len(still)
        fused = max(min(gone, max(grown, 0) + max(frozen, 0)), 0)
        lost = max(gone - fused, 0)
        whole = len(was) - len(spelled)
        row.counts[kind] = Count(whole, fused, len(still) + lost)
        row.left += _grouped(name, kind, still)
        if lost:
            gone = "gone, nothing in its place"
            row.left.append(Left(name, kind, spelled[0].form, lost, "", gone))
    return row


def _steady(found: Sequence[Site], kind: str) -> int:
    """Whole ops of a kind, without batch norms, which folding takes away."""
    return sum(s.kind == kind and s.whole and s.form != "batch_norm" for s in found)


def _grouped(name: str, kind: str, left: Sequence[Site]) -> list[Left]:
    groups: dict[tuple[str, str], list[Site]] = {}
    for s in left:
        groups.setdefault((s.form, s.around), []).append(s)
    return [
        Left(name, kind, form, len(group), group[0].module, f"`{around}`")
        for (form, around), group in groups.items()
    ]


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


_PROMISES = {
    "attention": re.compile(r"(Attention|Attn)(?!.*(Output|Intermediate|Layer|Block|Embed))"),
    "norm": re.compile(r"Norm(?!.*(Gate|alize|Conv|Linear))"),
}


def unsited(model: Any, before: Graph) -> list[str]:
    """The cross-check: modules that ran, are called attention or norm, and have no such site."""
    ran = {n.loc.module for n in before.walk() if n.loc and n.loc.module}
    found = {k: {s.module for s in sites(before) if s.kind == k} for k in _PROMISES}
    missing: Counter[str] = Counter()
    for path, module in model.named_modules():
        cls = type(module).__name__
        for kind, promise in _PROMISES.items():
            below = path + "."
            if (
                not path
                or not promise.search(cls)
                or not any(r == path or r.startswith(below) for r in ran)
            ):
                continue
            if not any(f == path or f.startswith(below) for f in found[kind]):
                missing[cls] += 1
    return [f"{n} {cls}" for cls, n in missing.items()]


def examine(case: Case, passes: Sequence[Any] | None = None) -> Row | None:
    """Count one case's sites before and after the passes (default: `PASSES`).

    None for a model that cannot be captured: `docs/coverage.md` says why.
    """
    import dfc
    from dfc.rewrite.driver import run_passes
    from dfc.rewrite.pass_ import find_pass

    built = case.build()
    try:
        graph = dfc.trace(built.model, built.args, built.kwargs, built.dynamic_shapes)
    except dfc.DfcError:
        return None
    before = run_passes(graph, [find_pass(p) for p in SIMPLIFY], mode="none").graph
    chosen = [find_pass(p) if isinstance(p, str) else p for p in passes or PASSES]
    after = run_passes(graph, chosen, mode="none").graph
    row = compare(case.name, case.family, before, after)
    row.unsited = unsited(built.model, before)
    return row


# the document

_TITLES = {"attention": "attention", "norm": "norm", "activation": "activation", "mlp": "MLP"}


def document(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    shown = [r for r in rows if any(c.sites for c in r.counts.values())]
    total = {k: [sum(getattr(r.counts[k], f) for r in rows) for f in ("whole", "fused", "left")]
             for k in KINDS}  # fmt: skip
    lines = [
        "# What is fused in the models of the zoo",
        "",
        "Written by `python -m tests.zoo.fusion`, which says what counts as a site; do not edit.",
        "",
        f"{len(shown)} of the {len(rows)} models that are captured have a site.",
        "",
        "| sites | all | whole from the start | fused by passes | left | whole or fused |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (whole, fused, left) in total.items():
        all_ = whole + fused + left
        share = f"{(whole + fused) / all_:.1%}" if all_ else ""
        lines.append(f"| {_TITLES[kind]} | {all_} | {whole} | {fused} | {left} | {share} |")
    lines += [
        "",
        "## By model: whole from the start / fused by passes / left",
        "",
        f"| model | family | {' | '.join(_TITLES.values())} |",
        "|---|---|---|---|---|---|",
    ]
    for r in shown:
        lines.append(f"| {r.name} | {r.family} | {' | '.join(str(r.counts[k]) for k in KINDS)} |")
    lines += [
        "",
        "## Sites that are left",
        "",
        "The reason is the operators around the site, along its first operand and first user.",
        "",
        "| model | sites | form | first module | reason |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        for x in r.left:
            cells = (r.name, f"{x.count} {_TITLES[x.kind]}", x.form, x.module, x.reason)
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Modules named like attention or norm in which no site was found",
        "",
        "| model | modules |",
        "|---|---|",
    ]
    lines += [f"| {r.name} | {', '.join(r.unsited)} |" for r in rows if r.unsited]
    bare = [r.name for r in rows if r not in shown]
    lines += ["", "## Models without a site", "", ", ".join(bare)]
    return "\n".join(lines) + "\n"


def recorded() -> dict[str, Row]:
    """The rows of the document as it was last written."""
    rows: dict[str, Row] = {}
    kinds = {title: kind for kind, title in _TITLES.items()}
    section = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if section == "## Models without a site" and line and not line.startswith("#"):
            rows.update({n: Row(n, "", {k: Count() for k in KINDS}) for n in line.split(", ")})
        if not cells or cells[0] in ("model", "sites", "---"):
            continue
        if section.startswith("## By model"):
            counts = dict(zip(KINDS, map(Count.parse, cells[2:]), strict=True))
            rows[cells[0]] = Row(cells[0], cells[1], counts)
        elif section == "## Sites that are left":
            count, _, title = cells[1].partition(" ")
            left = Left(cells[0], kinds[title], cells[2], int(count), cells[3], cells[4])
            rows[cells[0]].left.append(left)
        elif section.startswith("## Modules"):
            row = rows.setdefault(cells[0], Row(cells[0], "", {k: Count() for k in KINDS}))
            row.unsited = cells[1].split(", ")
    return rows


def _one(name: str) -> tuple[str, Row | str | None]:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = next(c for c in cases() if c.name == name)
    try:
        return name, examine(case)
    except Exception as e:  # noqa: BLE001 - one model's failure is a finding, not the end
        return name, f"{type(e).__name__}: {str(e)[:500]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only models or families whose name contains one")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    chosen = [
        c.name
        for c in cases()
        if not options.names or any(n in c.name or n == c.family for n in options.names)
    ]
    rows = recorded() if options.names and DOCUMENT.exists() else {}
    failed = 0
    for i, (name, outcome) in enumerate(_stream(chosen, options.jobs), 1):
        rows.pop(name, None)
        if isinstance(outcome, Row):
            rows[name] = outcome
        failed += isinstance(outcome, str)
        told = outcome if isinstance(outcome, str) else _brief(outcome)
        print(f"{i:>4}/{len(chosen)} {name:32} {told}", file=sys.stderr, flush=True)
    ordered = [rows[c.name] for c in cases() if c.name in rows]
    DOCUMENT.write_text(document(ordered), encoding="utf-8")
    print("\n".join(document(ordered).splitlines()[4:12]))
    return 1 if failed else 0


def _brief(row: Row | None) -> str:
    if row is None:
        return "not captured"
    return "  ".join(f"{k} {c}" for k, c in row.counts.items() if c.sites) or "no site"


def _stream(names: Sequence[str], jobs: int) -> Iterator[tuple[str, Row | str | None]]:
    """Outcomes in order, from processes that are replaced before their memory grows."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=40) as pool:
        yield from pool.imap(_one, names)


if __name__ == "__main__":
    sys.exit(main())
