"""Targets: devices and links with facts of the right dimension; what a recipe's steps need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.ir.types import DTYPES
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.units import Amount, amount
from dfc.lang.wording import expression_text
from dfc.planning.catalogue import CATALOGUE
from dfc.recipe import plan as p
from dfc.recipe.names import Names, Problems

RATES = {
    "mem": "bytes", "bw": "bytes/s", "launch": "time",
    "peak": "flops/s", "peak_f16": "flops/s", "peak_bf16": "flops/s", "peak_i8": "flops/s",
    "peak_f64": "flops/s",
    "rate_conv": "flops/s", "rate_attention": "flops/s", "rate_math": "flops/s",
    "rate_gather": "flops/s",
    "launch_view": "time", "launch_matmul": "time", "launch_conv": "time",
    "launch_unfold": "time", "launch_attention": "time", "launch_norm": "time",
    "launch_reduce": "time", "launch_gather": "time", "launch_each": "time",
    "launch_product": "time", "grain": "number", "cache": "bytes", "bw_cache": "bytes/s",
    "bw_conv": "bytes/s", "bw_fresh": "bytes/s",
    "price": "number",
}  # fmt: skip
DEVICES: Mapping[str, Mapping[str, str]] = {
    "cpu": {"cores": "number", **RATES},
    "cuda": {"index": "number", **RATES},
}
LINK = {"bw": "bytes/s", "latency": "time"}
_AS_IN = {
    "bytes": "80GB", "bytes/s": "2TB/s", "flops/s": "60TFLOPS", "time": "5us", "number": "8",
}  # fmt: skip


def target_of(recipe: s.Recipe, source: Source, names: Names) -> p.Target | None:
    """The target that a recipe is for: the one it or a base names, or the only one there is."""
    made = {name: made_target(t, src, names.problems) for name, (t, src) in names.targets.items()}
    wanted = _named(recipe, source, names)
    if wanted is None:
        return next(iter(made.values())) if len(made) == 1 else None
    w, where = wanted
    found = made.get(w.name)
    if found is None:
        help = did_you_mean(w.name, [*made]) or _listed(made)
        names.problems.say(where, "Q013", f"there is no target `{w.name}`", w.at, help)
    return found


def _named(recipe: s.Recipe, source: Source, names: Names) -> tuple[s.Word, Source] | None:
    """The target's name, the recipe's own or that of the last base that has one."""
    seen: set[str] = set()
    waiting = [(recipe, source)]
    while waiting:
        found, where = waiting.pop()
        if found.target is not None:
            return found.target, where
        for base in found.extends:
            if base.name in names.recipes and base.name not in seen:
                seen.add(base.name)
                waiting.append(names.recipes[base.name])
    return None


def _listed(known: Iterable[str]) -> str | None:
    names = ", ".join(known)
    return f"there are {names}" if names else "write `target NAME { device host : cpu(cores=8) }`"


def made_target(t: s.Target, source: Source, problems: Problems) -> p.Target:
    """A target as declared, its facts checked."""
    devices: dict[str, p.Device] = {}
    links: list[p.Link] = []
    linked: set[tuple[str, str]] = set()
    for part in t.parts:
        kind, facts = _made(part, source, problems)
        if isinstance(part, s.Device):
            if part.name.name in devices:
                message = f"a second device `{part.name.name}`"
                problems.say(source, "Q014", message, part.name.at)
            span = source.span(*part.name.at)
            devices[part.name.name] = p.Device(part.name.name, kind, facts, span)
            continue
        for end in (part.source, part.sink):
            if end.name not in devices:
                help = did_you_mean(end.name, [*devices])
                message = f"no device before this is called `{end.name}`"
                problems.say(source, "Q013", message, end.at, help)
        ends = (part.source.name, part.sink.name)
        ways = {ends, ends[::-1]} if part.both else {ends}
        if ways & linked:
            message = f"a second link from `{ends[0]}` to `{ends[1]}`"
            problems.say(source, "Q014", message, part.source.at)
        linked |= ways
        span = source.span(*part.source.at)
        links.append(p.Link(part.source.name, part.sink.name, part.both, kind, facts, span))
    return p.Target(t.name.name, tuple(devices.values()), tuple(links))


def _facts_of(kind: str) -> Mapping[str, str]:
    """The facts of a kind of device, or of one that the catalogue knows."""
    known = CATALOGUE.get(kind)
    return DEVICES.get(known.kind if known else kind, {})


def _made(
    part: s.Device | s.Link, source: Source, problems: Problems
) -> tuple[str, dict[str, Any]]:
    """`cuda(mem=16GiB)` as a kind and its facts."""
    x, device = part.what, isinstance(part, s.Device)
    kind = x.name.name if isinstance(x, s.Call) else getattr(x, "name", "")
    known = _facts_of(kind) if device else LINK
    if device and not known:
        help = did_you_mean(kind, [*DEVICES, *CATALOGUE]) or f"know: {', '.join(DEVICES)}"
        problems.say(source, "Q013", f"no kind of device is called `{kind}`", x.at, help)
    facts: dict[str, Any] = {}
    if not isinstance(x, s.Call):
        return kind, facts
    for a in x.arguments:
        problems.say(source, "Q012", "facts have names", a.at, "write mem=16GiB")
    for k in x.keywords:
        value = _fact(kind, k, known, source, problems)
        if value is not None:
            facts[k.name.name] = value
            if isinstance(value, Amount) and not _is_possible(k.name.name, value):
                message = f"{_called(part)} has an impossible `{k.name.name}`: {value}"
                problems.say(source, "N045", message, k.value.at)
    return kind, facts


def _called(part: s.Device | s.Link) -> str:
    if isinstance(part, s.Device):
        return f"device `{part.name.name}`"
    return f"the link from `{part.source.name}` to `{part.sink.name}`"


def _is_possible(fact: str, value: Amount) -> bool:
    """Sizes and rates are more than nothing; times and counts may be nothing."""
    may_be_zero = fact.startswith("launch") or fact in ("latency", "index", "grain")
    return isfinite(value.value) and (value.value > 0 or (may_be_zero and value.value == 0))


def _fact(
    kind: str, k: s.Keyword, known: Mapping[str, str], source: Source, problems: Problems
) -> Any:
    """The value of `mem=16GiB`, or None when it is wrong."""
    name = k.name.name
    if name == "dtypes" and known is not LINK:
        given = k.value.items if isinstance(k.value, s.Several) else (k.value,)
        for x in given:
            if expression_text(x) not in DTYPES:
                help = did_you_mean(expression_text(x), [*DTYPES])
                problems.say(source, "Q012", f"`{expression_text(x)}` is no dtype", x.at, help)
        return tuple(map(expression_text, given))
    if known and name not in known:
        every = [*known, "dtypes"] if known is not LINK else [*known]
        help = did_you_mean(name, every) or f"it has {', '.join(every)}"
        problems.say(source, "Q002", f"`{kind}` has no `{name}`", k.name.at, help)
        return None
    if not isinstance(k.value, s.Number):
        problems.say(source, "Q012", f"`{name}` is a number with a unit", k.value.at)
        return None
    found = amount(k.value, source)
    if not isinstance(found, Amount):
        problems.add([found])
        return None
    if known and found.dimension != known[name]:
        message = f"`{name}` is {known[name]}, got {found.dimension}"
        help = f"write it as in {name}={_AS_IN[known[name]]}"
        problems.say(source, "Q015", message, k.value.at, help)
        return None
    return found


def check_needs(steps: Iterable[p.PassStep], target: p.Target | None, problems: Problems) -> None:
    """Tell what a target lacks for a step."""
    if target is None:
        return
    for step in steps:
        try:
            lacks = step.build({}).needs(target)
        except DfcError:
            continue  # a wrong option has been told
        if lacks:
            message = f"`{step.label}` needs what target `{target.name}` lacks: {lacks}"
            problems.add([Diagnostic("Q017", message, step.span)])
