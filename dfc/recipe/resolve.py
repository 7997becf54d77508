"""A recipe as written to a plan: everything looked up, everything checked, every error told.

Q001  an unknown pass           Q013  an unknown word, quantity or name
Q002  an unknown option         Q014  a name or label that stands for two things
Q010  an unknown unit           Q015  sides of a comparison that measure different things
Q011  no such recipe            Q016  a step where it cannot stand
Q012  a value of a wrong type   Q017  a target that lacks what a step needs
Q018  a comparison that always or never holds
Q019  data that is not used: a warning
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.selectors import Selector
from dfc.lang.source import Source
from dfc.recipe import plan as p
from dfc.recipe.imports import Reader
from dfc.recipe.names import Enough, Names, Problems
from dfc.recipe.order import check_order
from dfc.recipe.settings import apply_settings
from dfc.recipe.steps import Resolver
from dfc.recipe.targets import check_needs, made_target, target_of
from dfc.rewrite.rulesets import add_set

if TYPE_CHECKING:
    from dfc.ir.graph import Graph


def resolve(
    source: Source,
    *,
    name: str | None = None,
    target: Source | None = None,
    settings: Mapping[str, str] | None = None,
) -> p.Plan:
    """The plan that a recipe file describes: the recipe of this name, or the only one.

    `settings` are `label.option` or `verb.option` with the text of a value.
    Raises:  DfcError with every error of the file, of what it imports, and of the settings.
    """
    problems = Problems()
    found, names = _resolve(source, name, target, settings, problems)
    if problems.found:
        raise DfcError.of(problems.in_order())
    assert found is not None and names is not None
    for rules in names.sets.values():
        add_set(rules)  # the steps know them by name
    return found


def resolve_all(
    source: Source,
    *,
    name: str | None = None,
    target: Source | None = None,
    settings: Mapping[str, str] | None = None,
) -> tuple[p.Plan | None, list[Diagnostic]]:
    """The plan, as far as it can be made, and all that is wrong; never raises for bad text."""
    problems = Problems()
    found, _ = _resolve(source, name, target, settings, problems)
    return found, problems.in_order()


def _resolve(
    source: Source,
    name: str | None,
    target: Source | None,
    settings: Mapping[str, str] | None,
    problems: Problems,
) -> tuple[p.Plan | None, Names | None]:
    found = names = None
    try:
        names = _names(source, target, problems)
        chosen = _chosen(names, name)
        _plans(names)  # the others are checked as well
        if chosen is not None:
            (found,) = _made(names, [chosen], settings or {})
    except Enough:
        pass
    return found, names


def preset(name: str, settings: Mapping[str, str] | None = None) -> p.Plan:
    """A shipped recipe by name, such as `simplify` or `o2`.

    Raises:  DfcError Q011.
    """
    return resolve(Source("dfc 1\n", f"<{name}>"), name=name, settings=settings)


def check_source(
    source: Source, graph: Graph | None = None
) -> tuple[list[Diagnostic], list[Diagnostic]]:
    """Errors and warnings of a file of recipes, targets and rules, and of what it imports.

    With a captured graph, what no selector finds in it is an error as well.
    """
    problems = Problems()
    warnings: list[Diagnostic] = []
    try:
        names = _names(source, None, problems)
        plans = _plans(names)
        warnings = names.unused_data()
        if graph is not None and not problems.found:
            for plan in plans:
                problems.add(check_on(plan, graph))
    except Enough:
        pass
    return problems.in_order(), warnings


def check_on(plan: p.Plan, graph: Graph) -> list[Diagnostic]:
    """Selectors of the plan that match nothing in a captured graph."""
    problems: list[Diagnostic] = []
    for step in plan.passes():
        for selector in _selectors(step):
            try:
                selector.nodes(graph)
            except DfcError as e:
                problems += [replace(d, span=d.span or step.span) for d in e.diagnostics]
    return problems


def _selectors(step: p.PassStep) -> Iterator[Selector]:
    for value in step.options.values():
        for choice in value.choices if isinstance(value, p.Hole) else (value,):
            if isinstance(choice, Selector):
                yield choice


def _names(source: Source, target: Source | None, problems: Problems) -> Names:
    reader = Reader()
    main = reader.text(source)
    extra = reader.text(target) if target is not None else None
    problems.add(reader.problems)
    return Names(main, problems, extra)


def _plans(names: Names) -> list[p.Plan]:
    """The plans of every recipe that is not shipped; all targets are checked."""
    for t, where in names.targets.values():
        made_target(t, where, names.problems)
    own = [(e, f.source) for f in names.own for e in f.document.entries if isinstance(e, s.Recipe)]
    return _made(names, own, {})


def _made(
    names: Names, recipes: Sequence[tuple[s.Recipe, Source]], settings: Mapping[str, str]
) -> list[p.Plan]:
    """Plans of recipes. What the file declares is looked at once, however many recipes it has."""
    resolver = Resolver(names)
    metrics = tuple(names.metric(m, where) for m, where in names.metrics.values())
    bare = [_plan(resolver, e, where, settings) for e, where in recipes]
    data = tuple(names.data)
    warnings = tuple(f"{d.span}: {d.message}" for d in names.unused_data())
    return [replace(x, data=data, metrics=metrics, warnings=warnings) for x in bare]


def _plan(
    resolver: Resolver, recipe: s.Recipe, source: Source, settings: Mapping[str, str]
) -> p.Plan:
    """The plan of one recipe, without what the whole file declares."""
    names = resolver.names
    names.target = target_of(recipe, source, names)
    steps, scope = resolver.recipe(recipe, source)
    steps = apply_settings(steps, settings, names)
    check_order(steps, names.problems)
    check_needs(p.passes_of(steps), names.target, names.problems)
    return p.Plan(
        recipe.name.name, steps, tuple(scope.goals), tuple(scope.requirements), names.target,
    )  # fmt: skip


def _chosen(names: Names, name: str | None) -> tuple[s.Recipe, Source] | None:
    """The recipe that is wanted: by name, or the only one of the main file."""
    own = [e for e in names.main.document.entries if isinstance(e, s.Recipe)]
    if name is None and len(own) == 1:
        return own[0], names.main.source
    if name is not None and name in names.recipes:
        return names.recipes[name]
    if name is not None:
        own_names = ", ".join(e.name.name for e in own)
        presets = f"write FILE.dfc, or one of {', '.join(sorted(names.recipes))}"
        help = did_you_mean(name, [*names.recipes])
        help = help or (f"the file has {own_names}" if own_names else presets)
        names.problems.add([Diagnostic("Q011", f"there is no recipe `{name}`", None, help)])
    elif not names.problems.found:
        listed = ", ".join(f"`{e.name.name}`" for e in own)
        message = f"the file has {len(own)} recipes: {listed}" if own else "the file has no recipe"
        advice = "say which: FILE.dfc:NAME" if own else "write `recipe NAME { ... }`"
        place = names.main.source.span(0)
        names.problems.add([Diagnostic("Q011", message, place, advice)])
    return None
