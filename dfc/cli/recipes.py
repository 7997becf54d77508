"""What the command line says of a recipe: which one, its settings, the data and the metrics.

A recipe never names code: data and metrics come from the user's own Python files, which are named
here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.recipe.plan import Plan

RecipeFile = Annotated[
    str | None,
    typer.Option(
        "-r", "--recipe", metavar="FILE|PRESET", help="What to do: a .dfc file, or a preset's name."
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--name", help="Which recipe, where the file has several.")
]
TargetFile = Annotated[
    str | None,
    typer.Option("-t", "--target", metavar="FILE", help="The .dfc file of the target."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Another value for a step's option."),
]
Level = Annotated[
    int | None,
    typer.Option(
        "-O", min=0, max=3, metavar="0..3", help="A preset, as in -O2: from nothing to everything."
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        "-p", "--passes", metavar="STEPS", help="Passes in order, as in 'cse{limit=3},dce'."
    ),
]


@dataclass(frozen=True)
class Chosen:
    """The plan, and what `dfc.compile` is given for it: presets stay names, as dfc's own choice."""

    plan: Plan
    recipe: Any
    settings: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None


def choose_recipe(
    recipe: str | None,
    name: str | None,
    level: int | None,
    passes: str | None,
    target: str | None,
    settings: Sequence[str] | None,
) -> Chosen:
    """The recipe that the options name, resolved; the default preset without any.

    Raises:  DfcError D054 for options that exclude each other, D057 for a setting that is none,
             and every error of the text.
    """
    from dfc.recipe.sources import DEFAULT_RECIPE, plan_of

    given = [o for o, x in (("-r", recipe), ("-O", level), ("-p", passes)) if x is not None]
    if len(given) > 1:
        raise DfcError("D054", f"{' and '.join(given)} both name the steps", help="give one")
    values = dict(_pairs("--set", settings, "STEP.OPTION=VALUE"))
    if name is not None and recipe is None:
        raise DfcError("Q006", "--name is for a file of recipes", help="name it: -r FILE")
    if passes is not None:
        from dfc.cli.steps import parse_pipeline

        plan = plan_of(parse_pipeline(passes), target=target, settings=values)
        return Chosen(plan, plan)
    wanted: Any = recipe if recipe is not None else f"O{level}" if level is not None else None
    plan = plan_of(wanted or DEFAULT_RECIPE, name=name, target=target, settings=values)
    if wanted is None or wanted.isidentifier():
        return Chosen(plan, wanted, values, target)
    return Chosen(plan, plan)


@dataclass(frozen=True)
class _Yielded:
    """What a generator function yields, begun anew each time that it is read."""

    function: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.function()


def named_data(given: Sequence[str] | None) -> dict[str, Any]:
    """`val=FILE.py:FUNCTION`: what the functions return or yield, by name.

    Raises:  DfcError D057, D050, D051; K040 (status 8) when the user's code raises.
    """
    from dfc.origin import failure_of

    made: dict[str, Any] = {}
    for name, place in _pairs("--data", given, "NAME=FILE.py:FUNCTION"):
        function, file = _function("--data", place)
        if inspect.isgeneratorfunction(function):  # batch after batch: none is kept
            made[name] = _Yielded(function)
            continue
        try:
            made[name] = function()
        except DfcError:
            raise
        except (Exception, SystemExit) as e:
            raise failure_of(e, f"data `{name}`", file) from e
    return made


def check_given(
    plan: Plan, data: Sequence[str] | None, metrics: Sequence[str] | None,
    functions: Sequence[str] | None,
) -> None:  # fmt: skip
    """Refuse what no line of the recipe names, since most of it is misspelled, and what is missing,
    before a model is loaded.

    Raises:  DfcError Q051.
    """
    from dfc.recipe.metrics import missing, missing_functions

    read = {v for step in plan.passes() for v in step.options.values() if isinstance(v, str)}
    known = {
        "data": [*plan.data, *read], "metric": [m.name for m in plan.metrics],
        "function": sorted(read),
    }  # fmt: skip
    for kind, given in (("data", data), ("metric", metrics), ("function", functions)):
        for text in given or ():
            name = text.partition("=")[0].strip()
            if name and name not in known[kind]:
                help = did_you_mean(name, known[kind]) or f"leave out --{kind} {name}"
                raise DfcError("Q051", f"the recipe names no {kind} `{name}`", help=help)
    of_metrics, of_data, of_functions = (
        [text.partition("=")[0].strip() for text in given or ()]
        for given in (metrics, data, functions)
    )
    problems = [*missing(plan, of_metrics, of_data), *missing_functions(plan, of_functions)]
    if problems:
        raise DfcError.of(problems)


def named_metrics(given: Sequence[str] | None) -> dict[str, Callable[..., Any]]:
    """The metrics of the command line; see `named_functions`."""
    return named_functions("--metric", given)


def named_functions(option: str, given: Sequence[str] | None) -> dict[str, Callable[..., Any]]:
    """`top1=FILE.py:FUNCTION`: the functions by name.

    Raises:  DfcError D057, D050, D051.
    """
    pairs = _pairs(option, given, "NAME=FILE.py:FUNCTION")
    return {name: _function(option, place)[0] for name, place in pairs}


def _pairs(option: str, given: Sequence[str] | None, form: str) -> list[tuple[str, str]]:
    """`NAME=VALUE` of an option, each name once.

    Raises:  DfcError D057.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, value = _pair(option, text, form)
        if name in found:
            message = f"{option}: `{name}` is given twice, as {found[name]} and as {value}"
            raise DfcError("D057", message, help="give one")
        found[name] = value
    return [*found.items()]


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals or not value:
        raise DfcError("D057", f"{option}: `{text}` cannot be read", help=f"write {form}")
    return name, value


def _function(option: str, text: str) -> tuple[Callable[..., Any], str]:
    from dfc.cli.sources import load_module, no_function

    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise DfcError("D057", f"{option}: `{text}` names no function", help="write FILE.py:NAME")
    module, file = load_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        raise no_function(module, place, name)
    return found, file


def emit_paths(plan: Plan, output: str | None) -> list[tuple[str, str, bool]]:
    """What the plan may write beside the package: by which line, where, and whether a folder."""
    from dfc.compiled import emitted_path
    from dfc.recipe.plan import EmitStep, WhenStep

    if output is None:
        return []

    def inside(steps: Sequence[Any]) -> list[tuple[str, str, bool]]:
        found: list[tuple[str, str, bool]] = []
        for step in steps:
            if isinstance(step, EmitStep):
                path = emitted_path(stem_of(output), step.format, step.options)
                found.append((f"emit {step.format}", path, "stages" in step.options))
            elif isinstance(step, WhenStep):
                found += [*inside(step.then), *inside(step.otherwise)]
        return found

    return inside(plan.steps)


def stem_of(output: str) -> Path:
    """Where what is emitted lies: beside the package, under its name without `.dfcpkg`."""
    path = Path(output)
    return path.with_suffix("") if path.suffix == ".dfcpkg" else path
