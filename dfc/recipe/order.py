"""Steps that may not follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dfc.errors import Diagnostic
from dfc.recipe import plan as p
from dfc.recipe.names import Problems
from dfc.rewrite.pass_ import pass_classes


def check_order(steps: Sequence[p.PlanStep], problems: Problems) -> None:
    """Tell passes that come after one which they must not follow, and that nothing follows which
    they are for."""
    _walk(steps, [], problems)
    _check_served(steps, problems)
    check_emits(steps, problems)


def _walk(
    steps: Sequence[p.PlanStep], before: list[p.PassStep], problems: Problems
) -> list[p.PassStep]:
    """What may have run when the steps are done: either branch of a `when`, without what is
    certainly taken back."""
    for step in steps:
        if isinstance(step, p.PassStep):
            _one(step, before, problems)
            before.append(step)
        elif isinstance(step, p.RevertStep):
            at = next((i for i, b in enumerate(before) if b.label == step.label), len(before))
            del before[at:]
        elif isinstance(step, p.WhenStep):
            then = _walk(step.then, [*before], problems)
            otherwise = _walk(step.otherwise, [*before], problems)
            before = then + [b for b in otherwise if all(b is not t for t in then)]
    return before


def _check_served(steps: Sequence[p.PlanStep], problems: Problems) -> None:
    behind: set[str] = set()
    for step in reversed(list(_passes(steps))):
        wanted = pass_classes()[step.name].serves
        if wanted and not behind.intersection(wanted):
            message = f"`{step.label}` does nothing without a `{wanted[0]}` behind it"
            problems.add([Diagnostic("Q016", message, step.span, f"add a step `{wanted[0]}`")])
        behind.add(step.name)


def _passes(steps: Sequence[p.PlanStep]) -> Iterator[p.PassStep]:
    for step in steps:
        if isinstance(step, p.PassStep):
            yield step
        elif isinstance(step, p.WhenStep):
            yield from _passes(step.then)
            yield from _passes(step.otherwise)


def check_emits(steps: Sequence[p.PlanStep], problems: Problems) -> None:
    """Tell two steps that write the same file."""
    seen: set[tuple[object, ...]] = set()
    for step in steps:
        if isinstance(step, p.EmitStep):
            file = step.options.get("file")
            key = (step.format, file, file is None and "stages" in step.options)
            if key in seen:
                message = f"a second `emit {step.format}` would replace the first"
                help = "give each a file: with file=..."
                problems.add([Diagnostic("Q014", message, step.span, help)])
            seen.add(key)
        elif isinstance(step, p.WhenStep):
            check_emits(step.then, problems)
            check_emits(step.otherwise, problems)


def _one(step: p.PassStep, before: Sequence[p.PassStep], problems: Problems) -> None:
    forbidden = pass_classes()[step.name].not_after
    met = [b for b in before if b.name in forbidden]
    if met:
        message = f"`{step.label}` cannot come after `{met[0].label}`"
        notes = tuple(f"`{b.label}` stands at {b.span}" for b in met if b.span)
        problems.add([Diagnostic("Q016", message, step.span, "change the order", notes=notes)])
