"""A plan from what a caller has at hand: text, a file, a preset's name, or a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang.source import Source
from dfc.recipe.plan import EmitStep, PassStep, Plan, PlanStep, WhenStep
from dfc.recipe.quantities import TIMED
from dfc.recipe.resolve import resolve

DEFAULT_RECIPE = "simplify"  # what `dfc.compile` does when nothing is asked for

Recipe = Any  # str, os.PathLike, Plan, or what has a `plan()`: dfc.recipe()


def plan_of(
    recipe: Recipe,
    *,
    name: str | None = None,
    target: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that a recipe stands for.

    A text has several lines, or begins with `dfc 1`; a word without `.dfc` is a preset; anything
    else is a file. `name`, or FILE.dfc:NAME, chooses among the recipes of a file.
    Raises:  DfcError with every error of the text; D050 for a file that cannot be read.
    """
    plan = _plan_of(recipe, name, target, settings)
    problems = [*_emit_problems(plan)]
    if problems:
        raise DfcError.of(problems)
    return plan


def _plan_of(
    recipe: Recipe,
    name: str | None,
    target: str | os.PathLike[str] | None,
    settings: Mapping[str, Any] | None,
) -> Plan:
    given = {k: v if isinstance(v, str) else _text(v) for k, v in (settings or {}).items()}
    if isinstance(recipe, Plan):
        if not given and target is None:
            return recipe
        recipe = str(recipe)
    elif hasattr(recipe, "plan") and not isinstance(recipe, (str, os.PathLike)):
        return _plan_of(recipe.plan(), name, target, settings)
    aim = None if target is None else source_of(target)
    if isinstance(recipe, str) and recipe.isidentifier():
        return resolve(Source("dfc 1\n"), name=recipe, target=aim, settings=given)
    if isinstance(recipe, str) and not is_text(recipe):
        recipe, last = split_name(recipe)
        name = name or last
    return resolve(source_of(recipe), name=name, target=aim, settings=given)


def _emit_problems(plan: Plan) -> Iterator[Diagnostic]:
    """Names of files that lie elsewhere than beside the package."""
    for step in _emits(plan.steps):
        file = step.options.get("file")
        if file is not None and (file in ("", ".", "..") or set(file) & set("/\\:\0")):
            message = f'`emit {step.format}`: "{file}" is no file name'
            yield Diagnostic("Q054", message, None, "it is written beside the package: give a name")


def _emits(steps: Sequence[PlanStep]) -> Iterator[EmitStep]:
    for step in steps:
        if isinstance(step, EmitStep):
            yield step
        elif isinstance(step, WhenStep):
            yield from _emits(step.then)
            yield from _emits(step.otherwise)


def chosen_plan(
    recipe: Recipe, passes: Any, target: Any, settings: Mapping[str, Any] | None
) -> tuple[Plan, bool]:
    """The plan, and whether dfc itself chose the steps, for speed: a preset, or a goal of speed."""
    if passes is not None:
        return plan_of_passes(passes), False
    plan = plan_of(recipe or DEFAULT_RECIPE, target=target, settings=settings)
    preset = recipe is None or (isinstance(recipe, str) and recipe.isidentifier())
    return plan, preset or (bool(plan.goals) and plan.goals[0].quantity.name in TIMED)


def source_of(text_or_path: str | os.PathLike[str]) -> Source:
    """The text itself, or the text of the file.

    Raises:  DfcError D050.
    """
    if isinstance(text_or_path, str) and is_text(text_or_path):
        return Source(text_or_path, "<recipe>")
    path = Path(text_or_path)
    try:
        return Source.of_file(path)
    except FileNotFoundError:
        folder = path.parent
        known = sorted(p.name for p in folder.glob("*.dfc")) if folder.is_dir() else []
        raise DfcError(
            "D050", f"there is no `{path}`", help=did_you_mean(path.name, known)
        ) from None
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise DfcError("D050", f"cannot read `{path}`: {reason}") from None


def split_name(path: str) -> tuple[str, str | None]:
    """FILE.dfc:NAME as the file and the name."""
    file, colon, last = path.rpartition(":")
    if colon and file.endswith(".dfc") and last.isidentifier():
        return file, last
    return path, None


def is_text(recipe: str) -> bool:
    return "\n" in recipe or recipe.lstrip().startswith("dfc ")


def _text(value: Any) -> str:
    from dfc.lang.wording import value_text

    return value_text(value)


@dataclass(frozen=True)
class ReadyStep(PassStep):
    """A step whose pass the caller made: it may be of a class that has no name in recipes."""

    ready: Any = field(default=None, compare=False)

    def build(self, chosen: Mapping[str, Any]) -> Any:
        return self.ready


def plan_of_passes(passes: Any) -> Plan:
    """A plan of passes in order: names, classes, or `Pass` objects."""
    from dfc.recipe.options import data_of
    from dfc.rewrite.pass_ import as_pass

    made: list[PassStep] = []
    seen: dict[str, int] = {}
    read: list[str] = []
    for p in passes:
        found = as_pass(p)
        read += data_of(type(found), _options(found))
        seen[found.name] = seen.get(found.name, 0) + 1
        label = found.name if seen[found.name] == 1 else f"{found.name}_{seen[found.name]}"
        made.append(ReadyStep(label, found.name, _options(found), ready=found))
    return Plan("main", tuple(made), data=tuple(dict.fromkeys(read)))


def _options(p: Any) -> dict[str, Any]:
    return {f.name: getattr(p, f.name) for f in fields(p) if getattr(p, f.name) != f.default}
