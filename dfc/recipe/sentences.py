"""A step's sentence as the options of its pass: operands, phrases and what stands behind `with`."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dfc.errors import DfcError, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.wording import expression_text
from dfc.recipe import plan as p
from dfc.recipe.names import Names
from dfc.recipe.options import BadValue, convert, fields_of, kind_text, part_field
from dfc.rewrite.pass_ import EXACT, missing_options


def options_of(x: s.Step, cls: Any, label: str, source: Source, names: Names) -> dict[str, Any]:
    """The options that a sentence gives; what is wrong with them is told."""
    fields = fields_of(cls)
    made: dict[str, Any] = {}
    given = _given(x, cls, fields, source, names)
    for d in missing_options(cls, given):
        names.problems.say(source, d.code, d.message, x.at, d.help)
    for name, value in given.items():
        try:
            made[name] = option_value(cls, name, fields[name], value, label, source, names)
        except BadValue as e:
            help = e.help or f"`{name}` is {kind_text(fields[name])}"
            names.problems.say(source, e.code, f"`{name}`: {e.message}", e.at, help)
    _check_worst(cls, made, x, source, names)
    if cls.name == "fuse":
        _check_rules(made.get("rules", ()), x, source, names)
    return made


def option_value(
    cls: Any, name: str, hint: Any, x: s.Expr, label: str, source: Source, names: Names
) -> Any:
    """The value of one option, or a hole.

    Raises:  BadValue.
    """
    hole = f"{label}.{name}"
    if isinstance(x, s.Call) and x.name.name == "tune":
        if not x.arguments or x.keywords:
            raise BadValue("`tune` takes the values to try", x.at, "tune(0.1, 0.3, 0.5)")
        values = [convert(hint, a, source, [*names.data], name) for a in x.arguments]
        return p.Hole(hole, tuple(values))
    if isinstance(x, s.Word) and x.name == "auto":
        choices = cls.auto.get(name)
        if not choices and x.name in typing.get_args(hint):
            return x.name
        if not choices:
            raise BadValue(f"`{cls.name}` has no choices of its own for it", x.at, "tune(a, b)")
        return p.Hole(hole, tuple(choices))
    if isinstance(x, s.Word) and x.name in names.data:
        names.used.add(x.name)
    return convert(hint, x, source, [*names.data], name)


# The least value of options of `verify` and `emit`.
_LEAST = {"samples": 1, "atol": 0, "rtol": 0, "stages": 1}


def plain_options(
    x: s.Step, known: Mapping[str, Any], what: str, source: Source, names: Names
) -> dict[str, Any]:
    """The options of `verify` and `emit`, which are no passes."""
    made: dict[str, Any] = {}
    for f in x.phrases:
        names.problems.say(source, "Q002", f"`{what}` takes no `{f.word}`", f.at)
    for k in x.options:
        name = k.name.name
        hint = known.get(name)
        if hint is None:
            help = did_you_mean(name, [*known]) or f"it has {', '.join(known)}"
            names.problems.say(source, "Q002", f"`{what}` has no option `{name}`", k.name.at, help)
        elif name in made:
            names.problems.say(source, "Q002", f"`{name}` is given twice", k.name.at)
        else:
            try:
                made[name] = _in_bounds(name, convert(hint, k.value, source, name=name), k.value)
            except BadValue as e:
                help = e.help or f"`{name}` is {kind_text(hint)}"
                names.problems.say(source, e.code, f"`{name}`: {e.message}", e.at, help)
    return made


def _in_bounds(name: str, value: Any, x: s.Expr) -> Any:
    """The value of an option.

    Raises:  BadValue where no value of this size is any good.
    """
    least = _LEAST.get(name)
    if least is not None and not isinstance(value, str) and value < least:
        raise BadValue(f"`{expression_text(x)}` is less than {least}", x.at)
    if name == "opset":
        from dfc.emit.onnx import require_opset

        try:
            require_opset(value)
        except DfcError as e:
            raise BadValue(e.message, x.at, e.diagnostics[0].help) from None
    return value


def _given(
    x: s.Step, cls: Any, fields: Mapping[str, Any], source: Source, names: Names
) -> dict[str, s.Expr]:
    """The expression for each field that the sentence fills."""
    given: dict[str, s.Expr] = {}
    for word, operands, at in _phrases(x):
        name = cls.phrases.get(word)
        if name is None:
            can = ", ".join(f"`{w}`" for w in cls.phrases if w)
            what = f"`{word}`" if word else f"operand `{expression_text(operands[0])}`"
            help = f"it takes {can}" if can else "options stand behind `with`"
            if word == "on" and "" in cls.phrases:
                shown = ", ".join(map(expression_text, operands))
                help = f"what it works on stands behind its name: `{cls.name} {shown}`"
            names.problems.say(source, "Q002", f"`{cls.name}` takes no {what}", at, help)
        elif name in given:
            names.problems.say(source, "Q002", f"a second `{word or 'operand'}`", at)
        else:
            given[name] = joined(operands, fields[name])
    for k in x.options:
        name = k.name.name
        if name not in fields:
            help = did_you_mean(name, [*fields]) or (
                f"it has {', '.join(fields)}" if fields else "it has no options"
            )
            message = f"pass `{cls.name}` has no option `{name}`"
            names.problems.say(source, "Q002", message, k.name.at, help)
        elif name in given:
            names.problems.say(source, "Q002", f"`{name}` is given twice", k.name.at)
        else:
            given[name] = k.value
    return given


def _phrases(x: s.Step) -> Iterator[tuple[str, Sequence[s.Expr], s.At]]:
    if x.operands:
        yield "", x.operands, x.operands[0].at
    for f in x.phrases:
        yield f.word, f.operands, f.at


def joined(operands: Sequence[s.Expr], hint: Any) -> s.Expr:
    """Several operands as one value: a list, or selectors joined by `|`."""
    from dfc.lang.selectors import is_selector

    first = operands[0]
    if "Selector" in str(hint) and all(map(is_selector, operands)):
        return _either(operands)
    if len(operands) == 1 and not str(hint).startswith("tuple"):
        return first
    return s.Several((first.at[0], operands[-1].at[1]), tuple(operands))


def _either(operands: Sequence[s.Expr]) -> s.Expr:
    """`a | b | c`, as flat as it can be: half of them on each side."""
    if len(operands) == 1:
        return operands[0]
    half = len(operands) // 2
    a, b = _either(operands[:half]), _either(operands[half:])
    return s.Binary((a.at[0], b.at[1]), "|", a, b, depth=1 + max(a.depth, b.depth))


def _check_rules(names_: Any, x: s.Step, source: Source, names: Names) -> None:
    """Tell rules and sets that do not exist."""
    sets = names.known_sets()
    known = [*sets, *(n for q in sets.values() for r in q.rules for n in (r.name, r.full_name))]
    choices = names_.choices if isinstance(names_, p.Hole) else (names_,)
    for name in dict.fromkeys(n for choice in choices for n in choice):
        if name not in known:
            help = did_you_mean(name, known) or f"sets: {', '.join(sets)}"
            at = next((o.at for o in x.operands if getattr(o, "name", None) == name), x.at)
            message = f"no rule or set is called `{name}`"
            names.problems.say(source, "R008", message, at, help)


def _check_worst(
    cls: Any, made: Mapping[str, Any], x: s.Step, source: Source, names: Names
) -> None:
    """`worst(...)` is measured by doing the step to one layer alone: not every pass can."""
    from dfc.lang.selectors import Selector, worst_of

    claims = cls.numerics  # a property where rules claim it: they are right for all values
    measurable = part_field(cls) is not None and not (
        isinstance(claims, property) or claims == EXACT
    )
    for value in made.values():
        for choice in value.choices if isinstance(value, p.Hole) else (value,):
            found = worst_of(choice.what) if isinstance(choice, Selector) else []
            if found and not measurable:
                message = f"`{cls.name}` cannot be measured layer by layer, as `worst` wants"
                names.problems.say(source, "Q020", message, found[0].at)
