"""What the words of the language mean, from the things themselves: passes, ops, rules, units."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.lang.units import UNITS, amount_text


@dataclasses.dataclass(frozen=True)
class Info:
    """A word: what kind of thing it is, one line about it, and all about it in Markdown."""

    name: str
    kind: str
    detail: str
    text: str


KEYWORDS: Mapping[str, str] = {
    "dfc": "The first line: the version of the language, `dfc 1`.",
    "import": '`import "std/simplify.dfc"`: recipes, targets, rules of another file. '
    "It reaches `std/`, `rules/` and this file's folder.",
    "data": "`data calib, val`: names of data that the caller passes.",
    "metric": "`metric top1 on val, higher is better`: a number that the caller's function gives.",
    "target": "`target edge { ... }`: devices and the links between them.",
    "recipe": "`recipe NAME for TARGET extends BASE { ... }`: goals, requirements and steps.",
    "rule": "`rule NAME(x, w) { match ... rewrite ... }`: a local rewrite, proved on its samples.",
    "pattern": "`pattern rms(x) = ...`: a named piece of pattern, used like an op.",
    "for": "The target that a recipe is made for.",
    "extends": "The recipes whose steps and goals come first; a step of the same label replaces.",
    "minimize": "`minimize latency(p50)`: of the ways that meet every `require`, the smallest.",
    "maximize": "`maximize throughput`: of the ways that meet every `require`, the largest.",
    "require": "`require size <= 100MiB`: must hold in the end, or dfc ends with status 5.",
    "apply": "`apply simplify`, `apply rules(attention)`: a recipe or rule sets as a step.",
    "verify": "`verify each`, `verify end`, `verify none`: when steps are proved on probes.",
    "emit": "`emit onnx with opset=21`: what is written beside the package.",
    "revert": "`revert q`: go back to the graph before the step with that label.",
    "keep": "`keep q if faster`: measured against the version before, and reverted if not.",
    "when": "`when latency(q) > 20ms { ... } else { ... }`: steps that depend on a measurement.",
    "else": "The steps that are taken when the condition does not hold.",
    "with": "`with key=value, ...`: options of the step.",
    "if": "The condition of `keep`: `faster`, `smaller`, or a comparison.",
    "on": "The part of the model that a step works on; of a metric, its data.",
    "except": "The part of the model that a step leaves alone.",
    "using": "The data that a step reads.",
    "by": "How a step chooses.",
    "to": "What a step makes of it.",
    "from": "Where a step starts.",
    "into": "What a step writes.",
    "at": "Where a step cuts.",
    "device": "`device gpu0 : cuda(mem=16GiB, peak=60TFLOPS, bw=600GB/s)`",
    "link": "`link gpu0 <-> host : pcie(bw=25GB/s, latency=10us)`",
    "match": "`match y = gelu(linear(x, w, b))`: what the rule looks for. Several lines share "
    "their names. `?` marks an op that may be absent, `|` alternatives, `~=` a near constant.",
    "where": "`where rank(w) == 2 and constant(w)`: what must hold, decided for all sizes.",
    "rewrite": "`rewrite y = dfc.linear_gelu(x, w, b)`: what is put in its place. "
    "`name!(...)` is computed at compile time.",
    "exact": "The claim that no bit of the result changes.",
    "within": "`within 1e-5`: the claim that the result changes by rounding only.",
    "priority": "`priority 1`: which of two rules that overlap is tried first.",
    "applies": "A sample on which the rule must apply; both sides are run and compared.",
    "refuses": "A sample on which the rule must not apply.",
    "and": "Both hold.",
    "or": "One holds; in a selector, either part.",
    "not": "The opposite; of a selector, everything else.",
    "in": "`dtype(x) in [f16, bf16]`: one of several.",
    "higher": "Of this metric, more is better.",
    "lower": "Of this metric, less is better.",
    "is": "`higher is better`",
    "better": "`higher is better`",
    "tune": "`tune(0.1, 0.3, 0.5)`: the values are tried and the best by the goals is kept.",
    "auto": "The choices that the pass itself proposes are tried.",
    "rules": "`rules(attention, norms)`: rule sets, rules, or set.rule.",
    "faster": "Kept if it measures faster than the version before.",
    "smaller": "Kept if it takes fewer bytes than the version before.",
    "baseline": "The same quantity of the untransformed model.",
    "before": "The same quantity before the step.",
    "each": "Prove after every step; a wrong one is named and taken back.",
    "end": "Prove once, after the last step.",
    "none": "Prove nothing; as a value, no value.",
}
QUANTITIES: Mapping[str, str] = {
    "latency": "Time of one call; `latency(p50)`, `latency(p95)`, `latency(LABEL)`.",
    "throughput": "Calls or items a second.",
    "size": "Bytes of the weights and the graph as they are saved.",
    "peak_memory": "The most bytes that are in use at once; `peak_memory(DEVICE)`.",
    "error": "The largest relative difference from the original on the probes.",
    "p50": "The median.",
    "p95": "What 95 % of the calls stay below.",
    "p99": "What 99 % of the calls stay below.",
}
SELECTORS: Mapping[str, str] = {
    "op": "`op(softmax)`: the nodes of an op, in any overload.",
    "dtype": "`dtype(f32)`: the nodes whose result has this dtype.",
    "param": '`param("*.weight")`: the nodes that read parameters of such names.',
    "first": "`first(2)`: the first numbered blocks of the longest row.",
    "last": "`last(2)`: the last numbered blocks of the longest row.",
    "between": '`between("a", "b")`: from the first node of a to the last of b.',
    "worst": "`worst(3)`, `worst(10%)`: the layers that the step costs most, when it runs.",
}
CONDITIONS: Mapping[str, str] = {
    "constant": "x is known at compile time: a parameter, or made of some.",
    "dim": "`dim(x, -1)`: the size of a dimension.",
    "rank": "The number of dimensions.",
    "shape": "All sizes, as a list.",
    "dtype": "The dtype, as in `dtype(x) == f32`.",
    "floating": "x holds floating point numbers.",
    "value": "The number that a constant holds.",
    "users": "How many nodes read x.",
    "numel": "The number of elements.",
    "len": "The length of a list.",
    "absent": "The optional part was not there.",
    "present": "The optional part was there.",
    "shared": "An inner value that others may read as well.",
    "finite": "No element can be inf or NaN.",
    "op": "The op that made x: `op(x) == relu`.",
    "item": "`item(xs, 0)`: an element of a list.",
    "same": "Both stand for the same value.",
    "static": "No size of x is symbolic.",
    "broadcasts": "`broadcasts(a, b)`: a broadcasts to the shape of b.",
    "broadcast": "The shape that two broadcast to.",
    "float": "The number as a float.",
    "normal": "A number that is neither zero, tiny, inf nor NaN.",
    "default": "`default(x, 1.0)`: x, or the other where x is absent.",
    "leading": "`leading(x, 2)`: all sizes but the last two.",
    "open_rows": "Every row of a mask lets something through.",
    "min": "The smallest.",
    "max": "The largest.",
    "sqrt": "The square root.",
    "abs": "The absolute value.",
    "rsqrt": "One over the square root.",
}
DEVICE_FACTS: Mapping[str, str] = {
    "cores": "number of cores", "mem": "memory, such as 16GiB", "peak": "such as 60TFLOPS",
    "bw": "bandwidth, such as 600GB/s", "index": "which device of its kind",
    "latency": "such as 10us", "dtypes": "what it computes in: [f32, bf16]",
}  # fmt: skip


def keyword(name: str) -> Info | None:
    text = KEYWORDS.get(name)
    return Info(name, "keyword", _first(text), text) if text else None


# Passes


def pass_info(name: str) -> Info | None:
    from dfc.rewrite.pass_ import pass_classes

    cls = pass_classes().get(name)
    if cls is None:
        return None
    doc = inspect.cleandoc(cls.__doc__ or "")
    first, _, rest = doc.partition("\n")
    parts = [f"**{name}** · pass · {_numerics(cls)}", first, f"```text\n{rest.strip()}\n```"]
    if not rest.strip():
        parts.pop()
    rows = options(name)
    if rows:
        lines = ["| option | type | default | |", "|---|---|---|---|"]
        lines += [f"| `{o.name}` | {o.detail} | `{o.default}` | {o.text} |" for o in rows]
        parts.append("\n".join(lines))
    words = [f"`{w}` fills `{f}`" for w, f in cls.phrases.items() if w]
    if "" in cls.phrases:
        words.insert(0, f"operands fill `{cls.phrases['']}`")
    if words:
        parts.append("; ".join(words))
    return Info(name, "pass", first, "\n\n".join(parts))


def _numerics(cls: Any) -> str:
    return str(cls.numerics) if not isinstance(cls.numerics, property) else "as its rules claim"


@dataclasses.dataclass(frozen=True)
class Option(Info):
    """An option of a step: detail is its type in words, hint the type itself."""

    default: str = ""
    hint: Any = None


@cache
def options(name: str) -> tuple[Option, ...]:
    """The options of a pass, of `verify`, or of `emit`."""
    from dfc.lang.wording import value_text
    from dfc.recipe.options import fields_of, type_text
    from dfc.rewrite.pass_ import pass_classes

    built_in = _built_in_options(name)
    if built_in is not None:
        return tuple(Option(k, "option", type_text(h), "", "", h) for k, h in built_in.items())
    cls = pass_classes().get(name)
    if cls is None:
        return ()
    about = _comments(cls)
    found = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = fields_of(cls)[f.name]
        default = "" if f.default is dataclasses.MISSING else value_text(f.default)
        text = about.get(f.name, "").replace("|", "\\|")
        found.append(Option(f.name, "option", type_text(hint), text, default, hint))
    return tuple(found)


def _built_in_options(name: str) -> Mapping[str, Any] | None:
    from dfc.recipe import steps

    if name == "verify":
        return steps.VERIFY
    if name == "emit":
        return {k: h for known in steps.EMIT.values() for k, h in known.items()}
    return None


def emitted() -> Sequence[str]:
    """What `emit` can write."""
    from dfc.recipe import steps

    return [*steps.EMIT]


def _comments(cls: Any) -> Mapping[str, str]:
    """What the source of a pass says behind each field."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(?!noqa|type:)(.+)$", source, re.MULTILINE))


# Ops


@cache
def op_bases() -> tuple[str, ...]:
    """The names that a rule may call: ATen's without overload, and `dfc.*`."""
    import dfc.ops  # noqa: F401 - declares them
    from dfc.ir.op import declared_ops
    from dfc.ops.aten import _names

    aten = {n.split(".")[1] for n in _names() if n.startswith("aten.")}
    own = [op.name for op in declared_ops()]
    return (*sorted(b for b in aten if not b.endswith("_") or b.startswith("__")), *own)


def is_internal(op: str) -> bool:
    """Ops that PyTorch uses inside; offered only to those who begin to type them."""
    return op.startswith("_") or "_backward" in op


@cache
def op_names() -> tuple[str, ...]:
    """Every op with its overload, as graph text writes it."""
    import dfc.ops  # noqa: F401
    from dfc.ir.op import declared_ops
    from dfc.ops.aten import _names

    aten = (n for n in _names() if n.startswith("aten.") and not _writes(n))
    return (*aten, *(o.name for o in declared_ops()))


def _writes(name: str) -> bool:
    """In-place ops and those that write to an argument are no part of graphs."""
    _, base, overload = name.split(".", 2)
    inplace = base.endswith("_") and not base.startswith("__")
    return inplace or overload == "out" or overload.endswith("_out")


@cache
def op_info(name: str) -> Info | None:
    """An op: its schema in every overload, or the docstring of one of ours."""
    import dfc.ops  # noqa: F401

    declared = _declared(name)
    if declared is not None:
        doc = inspect.cleandoc(declared.cls.__doc__ or "")
        names = ", ".join(arguments_of(name))
        text = f"**{name}**({names}) · op\n\n```text\n{doc}\n```"
        return Info(name, "op", _first(doc), text)
    schemas = _schemas(name)
    if not schemas:
        return None
    text = "```python\n" + "\n".join(schemas) + "\n```"
    return Info(name, "op", schemas[0], f"**{name}** · ATen op\n\n{text}")


def _declared(name: str) -> Any:
    from dfc.ir.op import declared_ops

    return next((op for op in declared_ops() if op.name == name), None)


def _schemas(name: str) -> list[str]:
    import torch

    bare = name.removeprefix("aten.")
    base, _, overload = bare.partition(".")
    if not base.isidentifier():
        return []
    packet = getattr(torch.ops.aten, base, None)
    if packet is None:
        return []
    shown = [overload] if overload else packet.overloads()
    found = [str(getattr(packet, o)._schema) for o in shown if hasattr(packet, o)]
    return [text.replace("aten::", "", 1) for text in found if "!)" not in text]


@cache
def arguments_of(name: str) -> tuple[str, ...]:
    """The argument names of an op, in order; of a bare name, those of all its overloads."""
    from dfc.ir.op import lookup

    declared = _declared(name)
    if declared is not None:
        return tuple(o.name for o in (*declared.operands, *declared.attributes))
    import torch

    bare = name.removeprefix("aten.")
    base, _, overload = bare.partition(".")
    packet = getattr(torch.ops.aten, base, None) if base.isidentifier() else None
    if packet is None:
        return ()
    found: dict[str, None] = {}
    for o in [overload] if overload else packet.overloads():
        try:
            info = lookup(f"aten.{base}.{o}")
        except DfcError:
            continue
        found |= dict.fromkeys(a.name for a in getattr(info, "_arguments", ()))
    return tuple(name for name in found if name != "out")


# Rules


def rule_info(name: str, rules: Mapping[str, Any] | None = None) -> Info | None:
    """A rule or rule set by name."""
    from dfc.rewrite.rulesets import all_sets

    sets = {**all_sets(), **(rules or {})}
    if name in sets:
        listed = "\n".join(f"- `{r.name}`: {_first(r.doc)}" for r in sets[name].rules)
        count = len(sets[name].rules)
        return Info(
            name, "rule set", f"{counted(count, 'rule')}", f"**{name}** · rule set\n\n{listed}"
        )
    for rules_ in sets.values():
        for r in rules_.rules:
            if name in (r.name, r.full_name):
                text = f"**{r.full_name}** · rule\n\n{r.doc}\n\n```dfc\n{r.text}\n```"
                return Info(r.name, "rule", _first(r.doc), text)
    return None


# Numbers


def number_info(text: str) -> Info | None:
    """`12GiB`: what it is in the base unit."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)(.*)", text)
    if found is None or found[2] not in UNITS or not found[2]:
        return None
    dimension, factor = UNITS[found[2]]
    value = float(found[1]) * factor
    words = {"bytes": f"{value:,.0f} bytes", "time": f"{value:g} seconds",
             "bytes/s": f"{value:g} bytes a second", "flops/s": f"{value:g} operations a second",
             "share": f"a share of {value:g}", "points": f"a difference of {value:g} in a share",
             }  # fmt: skip
    meaning = words.get(dimension, amount_text(value, dimension))
    return Info(text, "number", dimension, f"**{text}** · {dimension}\n\n{meaning}")


def _first(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
