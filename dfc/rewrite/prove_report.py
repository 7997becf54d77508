"""A counterexample in words: where the rule stands, the inputs that break it, both results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dfc.errors import Diagnostic
from dfc.ir.graph import Graph, Parameter, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import EXACT
from dfc.rewrite.prove_judge import Disagreement

if TYPE_CHECKING:
    from dfc.rewrite.prove import Trial

MAX_SHOWN = 12  # elements of an input that are printed in full


def counterexample(
    trial: Trial, difference: Disagreement | None = None, failure: str = ""
) -> Diagnostic:
    """The error for a rule that is wrong on one set of inputs."""
    rule = trial.rule
    claim = "exact" if rule.claim == EXACT else f"within {rule.claim.rtol:g}"
    message = f"rule `{rule.name}` is not `{claim}`: {_kind(trial)}"
    notes = [*_given(trial)]
    if failure:
        notes.append(f"the right side fails: {failure}")
    elif difference is not None:
        notes += _results(trial, difference)
    notes += [f"left:  {line}" for line in _nodes(trial.left.graph)]
    if trial.right is not None:
        notes += [f"right: {line}" for line in _nodes(trial.right)]
    return Diagnostic(
        "R022", message, rule.source.span(*rule.at), _help(trial, difference), tuple(notes)
    )


def _kind(trial: Trial) -> str:
    """The kind of input: `x = NaN everywhere, with x changed to f16`."""
    return trial.plan.label + (f", with {trial.variation}" if trial.variation else "")


def _given(trial: Trial) -> list[str]:
    used = {v.name for v in trial.left.graph.inputs} | set(trial.left.graph.parameters)
    values: dict[str, Any] = dict(trial.inputs)
    for name, p in trial.left.graph.parameters.items():
        values[name] = p.data.tensor() if p.data is not None else None
    found = []
    for name, x in values.items():
        if name in used:
            mark = " constant" if name in trial.left.graph.parameters else ""
            found.append(f"{name}: {TensorType.of(x)}{mark}{_numbers(x)}")
    numbers = {k: v for k, v in trial.case.items() if k in trial.left.used and _is_plain(v)}
    found += [f"{name} = {value}" for name, value in numbers.items()]
    return found


def _is_plain(x: Any) -> bool:
    from dfc.rewrite.prove_sample import Spec

    return not isinstance(x, Spec)


def _numbers(x: torch.Tensor) -> str:
    if not x.numel():
        return ""
    if x.numel() <= MAX_SHOWN:
        return f" = {_list(x.tolist())}"
    first = ", ".join(_number(v) for v in x.reshape(-1)[:4].tolist())
    return f" = [{first}, ...]"


def _list(x: Any) -> str:
    return "[" + ", ".join(map(_list, x)) + "]" if isinstance(x, list) else _number(x)


def _number(x: Any) -> str:
    return f"{x:.9g}" if isinstance(x, float) else str(x)


def _results(trial: Trial, d: Disagreement) -> list[str]:
    name = _output_name(trial, d.output)
    if d.left is None and not d.index:
        return [f"{name}: {d.reason}"]
    at = f"{name}[{', '.join(map(str, d.index))}]" if d.index else name
    found = [f"{at}: left {_number(d.left)}, right {_number(d.right)}"]
    if d.witness is not None:
        found[0] += f", in float64 {_number(d.witness)}"
    shape = trial.left.graph.outputs[d.output].type
    for given, x in trial.inputs.items():  # what stands at the same place
        if x.numel() > MAX_SHOWN and d.index and str(TensorType.of(x)) == str(shape):
            found[0] += f", where {given} is {_number(x[d.index].item())}"
    if d.error != float("inf") and d.allowed:
        found.append(f"{d.reason}: error {d.error:.3g}, allowed {d.allowed:.3g}")
    elif d.reason != "the sides differ":
        found.append(d.reason)
    return found


def _output_name(trial: Trial, i: int) -> str:
    value = trial.left.graph.outputs[i]
    return next((n for n, v in trial.left.roots.items() if v is value), value.name)


def _nodes(graph: Graph) -> list[str]:
    """The graph's nodes, in the words of rules."""
    lines = []
    for node in graph.nodes:
        given = [_operand(x) for x in node.inputs]
        info = {o.name for o in node.info.operands}
        named = [f"{k}={_attribute(v)}" for k, v in node.attributes.items() if _told(node, k, info)]
        text = ", ".join([*(g for g in given if g is not None), *named])
        names = ", ".join(r.name for r in node.results)
        lines.append(f"{names} = {node.op.removeprefix('aten.')}({text})")
    outputs = ", ".join(v.name for v in graph.outputs)
    if len(lines) > 10:
        lines = [*lines[:4], f"... {len(lines) - 8} more ...", *lines[-4:]]
    return lines or [f"{outputs} as it is given"]


def _operand(x: Any) -> str | None:
    if isinstance(x, tuple):
        return "[" + ", ".join(str(_operand(v)) for v in x) + "]"
    if isinstance(x, Parameter):
        return f"!{x.name}"
    return x.name if isinstance(x, Value) else None


def _told(node: Any, name: str, operands: set[str]) -> bool:
    if name in operands:
        return True
    default: Mapping[str, Any] = {a.name: a.default for a in node.info.attributes}
    return bool(node.attributes[name] != default.get(name))


def _attribute(x: Any) -> str:
    return "[" + ", ".join(map(_attribute, x)) + "]" if isinstance(x, tuple) else str(x)


def _help(trial: Trial, d: Disagreement | None) -> str:
    """What to try, from what the input was."""
    names = [n for n, k in trial.plan.kinds.items()]
    if d is not None and trial.rule.claim.kind == "close" and d.relative < 1e-2:
        return (
            f"claim what holds, `within {_rounded_up(d.relative)}`, or say in `where` when it does"
        )
    if d is not None and trial.rule.claim == EXACT and 0 < d.relative < 1e-2:
        return f"it rounds otherwise: claim `within {_rounded_up(d.relative)}`"
    if d is not None and d.reason.endswith("sign of zero"):
        return "it keeps all but the sign of zero: claim `within 0.0`"
    if not trial.plan.finite:
        who = names[0] if names else next(iter(trial.inputs), "x")
        return (
            f"ask for it in `where`: `finite({who})`, or write a right side that keeps NaN and inf"
        )
    if trial.variation:
        return f"say in `where` that it does not hold with {trial.variation}"
    return "the two sides mean different things: look at both above"


def _rounded_up(x: float) -> str:
    import math

    if not x or not math.isfinite(x):
        return "1e-6"
    power = math.ceil(math.log10(x))
    return f"1e{power}"
