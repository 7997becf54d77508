"""Steps that may not follow each other."""

from __future__ import annotations

from collections.abc import Sequence

from dfc.errors import Diagnostic
from dfc.recipe import plan as p
from dfc.recipe.names import Problems
from dfc.rewrite.pass_ import pass_classes


def check_order(steps: Sequence[p.PlanStep], problems: Problems) -> None:
    """Tell passes that come after one which they must not follow."""
    _walk(steps, [], problems)
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
