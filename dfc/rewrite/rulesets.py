"""Where rules come from: the files in passes/rules, and files that the user names.

R008  no rule or set has this name        R009  two sets of one name
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dfc.errors import DfcError, did_you_mean
from dfc.rewrite.rule import Rule, RuleSet, load_rules

_loaded: dict[str, RuleSet] = {}


@cache
def shipped_sets() -> Mapping[str, RuleSet]:
    """The rule sets of `passes/rules`, by name."""
    import dfc.passes

    folder = Path(next(iter(dfc.passes.__path__))) / "rules"
    return {p.stem: load_rules(p) for p in sorted(folder.glob("*.dfc"))}


def add_set(rules: RuleSet) -> None:
    """Make a user's rules known by the name of their file.

    Raises:  DfcError R009 when another file has brought a set of this name.
    """
    known = _loaded.get(rules.name) or shipped_sets().get(rules.name)
    if known is not None and known.source.text != rules.source.text:
        raise DfcError(
            "R009",
            f"the rule set `{rules.name}` of {rules.source.file} exists already",
            help=f"rename the file: the other one is {known.source.file}",
        )
    _loaded[rules.name] = rules


@contextmanager
def instead(rules: RuleSet) -> Iterator[None]:
    """Rules that stand for the user's set of that name for a while, as they are: not proved."""
    before = _loaded.get(rules.name)
    _loaded[rules.name] = rules
    try:
        yield
    finally:
        del _loaded[rules.name]
        if before is not None:
            _loaded[rules.name] = before


@contextmanager
def kept_apart() -> Iterator[None]:
    """What is added inside is forgotten afterwards: for texts that are looked at, not used."""
    before = dict(_loaded)
    try:
        yield
    finally:
        _loaded.clear()
        _loaded.update(before)


def all_sets() -> dict[str, RuleSet]:
    return {**shipped_sets(), **_loaded}


def select_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules by set, by rule or by set.rule; all that dfc ships when no name is given.

    Raises:  DfcError R008 for a name that nothing has.
    """
    wanted = list(names)
    if not wanted:
        return tuple(r for rules in shipped_sets().values() for r in rules.rules)
    sets = all_sets()
    found: dict[str, Rule] = {}
    for name in wanted:
        some = [r for rules in sets.values() for r in rules.rules if _is(r, rules, name)]
        if not some:
            known = [*sets, *(r.full_name for x in sets.values() for r in x.rules)]
            known += [r.name for x in sets.values() for r in x.rules]
            raise DfcError(
                "R008",
                f"no rule or set is called `{name}`",
                help=did_you_mean(name, known) or f"sets: {', '.join(sets)}",
            )
        found |= {r.full_name: r for r in some}
    return tuple(found.values())


def _is(rule: Rule, rules: RuleSet, name: str) -> bool:
    return name in (rules.name, rule.full_name, rule.name)
