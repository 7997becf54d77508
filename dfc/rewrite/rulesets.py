"""Where rules come from: the files in passes/rules, and files that the user names.

A rule is proved before it is put to use: `proved_rules` is what passes ask for.

R008  no rule or set has this name        R009  two sets of one name
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.rewrite.proofs import problems_of, rules_folder
from dfc.rewrite.read_rules import load_rules
from dfc.rewrite.rule import Rule, RuleSet

_loaded: dict[str, RuleSet] = {}
_as_they_are: set[str] = set()  # sets whose rules are taken without proof


@cache
def shipped_sets() -> Mapping[str, RuleSet]:
    """The rule sets of `passes/rules`, by name."""
    return {p.stem: load_rules(p) for p in sorted(rules_folder().glob("*.dfc"))}


def add_set(rules: RuleSet) -> None:
    """Make a user's rules known by the name of their file.

    Raises:  DfcError R009 when another file has brought a set of this name.
    """
    known = _loaded.get(rules.name) or shipped_sets().get(rules.name)
    if known is not None and is_another(known, rules):
        raise DfcError(
            "R009",
            f"the rule set `{rules.name}` of {rules.source.file} exists already",
            help=f"rename the file: the other one is {known.source.file}",
        )
    _loaded[rules.name] = rules


def is_another(known: RuleSet, rules: RuleSet) -> bool:
    """Whether two sets of one name are two: neither the same rules, nor the same file edited."""
    return known.source.text != rules.source.text and known.source.file != rules.source.file


@contextmanager
def instead(rules: RuleSet) -> Iterator[None]:
    """Rules that stand for the user's set of that name for a while, as they are: not proved."""
    before = _loaded.get(rules.name)
    _loaded[rules.name] = rules
    _as_they_are.add(rules.name)
    try:
        yield
    finally:
        del _loaded[rules.name]
        _as_they_are.discard(rules.name)
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


@dataclass(frozen=True)
class Proved:
    """Rules that hold, and those of dfc's own that do not with this version of torch."""

    rules: tuple[Rule, ...]
    left_out: Mapping[str, tuple[Diagnostic, ...]]


def proved_rules(names: Iterable[str], say: Callable[[str], None] | None = None) -> Proved:
    """The rules of these names, proved. `say` is told of each that has to be proved now.

    Raises:  DfcError R008; R020..R026 with every rule that is wrong, if it is the user's or was
             asked for by its own name: rules that dfc ships are left out instead. R030..R033 for
             rules of the user's that do not go together.
    """
    wanted = list(names)
    rules = select_rules(wanted)
    unsure = [r for r in rules if r.set not in _as_they_are]
    problems = {name: found for name, found in problems_of(unsure, say).items() if found}
    shipped = shipped_sets()
    left_out = {}
    wrong: list[Diagnostic] = []
    for r in rules:
        found = problems.get(r.full_name, ())
        if found and r.set in shipped and not {r.name, r.full_name} & set(wanted):
            left_out[r.full_name] = found
        else:
            wrong += found
    wrong = wrong or _set_errors([r for r in unsure if r.set not in shipped])
    if wrong:
        raise DfcError.of(wrong)
    return Proved(tuple(r for r in rules if r.full_name not in left_out), left_out)


_fitting: set[frozenset[str]] = set()  # digests of rules that were seen to go together


def _set_errors(rules: Sequence[Rule]) -> list[Diagnostic]:
    """What is wrong with the user's rules as a set: that they loop, grow or hide each other."""
    from dfc.rewrite.lint import lint

    key = frozenset(r.digest for r in rules)
    if key in _fitting:
        return []
    found = [x.problem for x in lint(rules) if not x.warning]
    if not found:
        _fitting.add(key)
    return found


def _is(rule: Rule, rules: RuleSet, name: str) -> bool:
    return name in (rules.name, rule.full_name, rule.name)
