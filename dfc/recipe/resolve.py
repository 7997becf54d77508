"""A recipe as written to a plan: everything looked up, everything checked, every error told.

Q001  an unknown pass           Q013  an unknown word, quantity or name
Q002  an unknown option         Q014  a name or label that stands for two things
Q010  an unknown unit           Q015  sides of a comparison that measure different things
Q011  no such recipe            Q016  a step where it cannot stand
Q012  a value of a wrong type   Q017  a target that lacks what a step needs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.recipe import plan as p
from dfc.recipe.imports import Reader
from dfc.recipe.names import Enough, Names, Problems
from dfc.recipe.order import check_order
from dfc.recipe.settings import apply_settings
from dfc.recipe.steps import Resolver
from dfc.recipe.targets import check_needs, target_of


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
    found, problems = resolve_all(source, name=name, target=target, settings=settings)
    if problems:
        raise DfcError.of(problems)
    assert found is not None
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
    found = None
    try:
        reader = Reader()
        main = reader.text(source)
        extra = reader.text(target) if target is not None else None
        problems.add(reader.problems)
        names = Names(main, problems, extra)
        found = _plan(names, name, settings or {})
    except Enough:
        pass
    return found, problems.in_order()


def preset(name: str, settings: Mapping[str, str] | None = None) -> p.Plan:
    """A shipped recipe by name, such as `simplify` or `o2`.

    Raises:  DfcError Q011.
    """
    return resolve(Source("dfc 1\n", f"<{name}>"), name=name, settings=settings)


def check_on(plan: p.Plan, graph: Any) -> list[Diagnostic]:
    """Selectors of the plan that match nothing in a captured graph."""
    from dfc.lang.selectors import Selector

    problems: list[Diagnostic] = []
    for step in plan.passes():
        for value in step.options.values():
            for choice in value.choices if isinstance(value, p.Hole) else (value,):
                if isinstance(choice, Selector):
                    try:
                        choice.nodes(graph)
                    except DfcError as e:
                        problems += [replace(d, span=d.span or step.span) for d in e.diagnostics]
    return problems


def _plan(names: Names, name: str | None, settings: Mapping[str, str]) -> p.Plan | None:
    own = [(e, f.source) for f in names.own for e in f.document.entries if isinstance(e, s.Recipe)]
    resolver = Resolver(names)
    chosen = _chosen(names, name)
    for e, where in own:  # the others are checked as well
        if chosen is None or e is not chosen[0]:
            names.target = target_of(e, where, names)
            steps, _ = resolver.recipe(e, where)
            check_order(steps, names.problems)
            check_needs(p.passes_of(steps), names.target, names.problems)
    metrics = tuple(names.metric(m, src) for m, src in names.metrics.values())
    if chosen is None:
        return None
    recipe, source = chosen
    names.target = target_of(recipe, source, names)
    steps, scope = resolver.recipe(recipe, source)
    steps = apply_settings(steps, settings, names)
    check_order(steps, names.problems)
    check_needs(p.passes_of(steps), names.target, names.problems)
    return p.Plan(
        recipe.name.name, steps, tuple(scope.goals), tuple(scope.requirements), names.target,
        tuple(names.data), metrics, tuple(names.unused_data()),
    )  # fmt: skip


def _chosen(names: Names, name: str | None) -> tuple[s.Recipe, Source] | None:
    """The recipe that is wanted: by name, or the only one of the main file."""
    own = [e for e in names.main.document.entries if isinstance(e, s.Recipe)]
    if name is None and len(own) == 1:
        return own[0], names.main.source
    if name is None:
        listed = ", ".join(f"`{e.name.name}`" for e in own)
        message = f"the file has {len(own)} recipes: {listed}" if own else "the file has no recipe"
        advice = "say which: --recipe NAME" if own else "write `recipe NAME { ... }`"
        if not names.problems.found:
            place = names.main.source.span(0)
            names.problems.add([Diagnostic("Q011", message, place, advice)])
        return None
    if name not in names.recipes:
        help = did_you_mean(name, [*names.recipes])
        message = f"there is no recipe `{name}`"
        names.problems.add([Diagnostic("Q011", message, None, help)])
        return None
    return names.recipes[name]
