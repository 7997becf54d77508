"""`--set label.option=value`: options of a plan's steps, given from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang.source import Source
from dfc.recipe import plan as p
from dfc.recipe.names import Names
from dfc.recipe.options import BadValue, fields_of
from dfc.recipe.sentences import option_value
from dfc.rewrite.pass_ import pass_classes


def apply_settings(
    steps: tuple[p.PlanStep, ...], settings: Mapping[str, str], names: Names
) -> tuple[p.PlanStep, ...]:
    """The steps with options set by label, or by pass for all its steps; mistakes are told."""
    for key, text in settings.items():
        label, _, option = key.rpartition(".")
        chosen = _chosen(steps, label, names)
        if not chosen:
            continue
        cls = pass_classes()[chosen[0].name]
        fields = fields_of(cls)
        if option not in fields:
            help = did_you_mean(option, [*fields]) or (
                f"it has {', '.join(fields)}" if fields else "it has no options"
            )
            message = f"--set {key}: pass `{cls.name}` has no option `{option}`"
            names.problems.add([Diagnostic("Q002", message, None, help)])
            continue
        for step in chosen:
            value, problems = _value(cls, option, text, f"--set {key}", step.label, names)
            names.problems.add(problems)
            if not problems:
                steps = _set(steps, step.label, option, value)
    return steps


def _chosen(steps: Sequence[p.PlanStep], label: str, names: Names) -> list[p.PassStep]:
    every = list(p.passes_of(steps))
    chosen = [x for x in every if x.label == label] or [x for x in every if x.name == label]
    if not chosen:
        known = [x.label for x in every]
        help = did_you_mean(label, known) or f"steps: {', '.join(known[:12])}"
        message = f"--set: no step is called `{label}`"
        names.problems.add([Diagnostic("Q013", message, None, help)])
    return chosen


def _value(
    cls: Any, option: str, text: str, shown: str, label: str, names: Names
) -> tuple[Any, Sequence[Diagnostic]]:
    from dfc.lang.reader import parse_expression

    source = Source(text, shown)
    try:
        x = parse_expression(source)
        hint = fields_of(cls)[option]
        return option_value(cls, option, hint, x, label, source, names), ()
    except BadValue as e:
        place = source.span(*e.at)
        return None, [Diagnostic(e.code, f"`{option}`: {e.message}", place, e.help)]
    except DfcError as e:
        return None, e.diagnostics


def _set(
    steps: Sequence[p.PlanStep], label: str, option: str, value: Any
) -> tuple[p.PlanStep, ...]:
    made: list[p.PlanStep] = []
    for x in steps:
        if isinstance(x, p.PassStep) and x.label == label:
            x = replace(x, options={**x.options, option: value})
        elif isinstance(x, p.WhenStep):
            then = _set(x.then, label, option, value)
            x = replace(x, then=then, otherwise=_set(x.otherwise, label, option, value))
        made.append(x)
    return tuple(made)
