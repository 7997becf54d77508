"""What the files of a recipe declare, by name, and the problems that are found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import Diagnostic, Span, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.recipe import plan as p
from dfc.recipe.imports import File, std_files
from dfc.rewrite.read_rules import read_rules
from dfc.rewrite.rule import RuleSet
from dfc.rewrite.rulesets import all_sets, is_another, shipped_sets

MAX_PROBLEMS = 100  # what nobody reads is not looked for


class Enough(Exception):
    """So much is wrong that the rest can wait."""


class Problems:
    """Everything that is wrong, each thing once."""

    def __init__(self, found: Sequence[Diagnostic] = ()) -> None:
        self.found: list[Diagnostic] = []
        self.add(found)

    def add(self, problems: Sequence[Diagnostic]) -> None:
        """Take problems.

        Raises:  Enough.
        """
        self.found += [d for d in dict.fromkeys(problems) if d not in self.found]
        if len(self.found) >= MAX_PROBLEMS:
            raise Enough

    def say(
        self, source: Source, code: str, message: str, at: s.At, help: str | None = None
    ) -> None:
        self.add([Diagnostic(code, message, source.span(*at), help)])

    def in_order(self) -> list[Diagnostic]:
        """By place; what has no place comes first."""
        return sorted(self.found, key=lambda d: _place(d.span))


def _place(span: Span | None) -> tuple[str, int, int]:
    return (span.file, span.line, span.col) if span else ("", 0, 0)


class Names:
    """Recipes, targets, metrics and data of all files; shipped ones give way to the user's."""

    def __init__(self, main: File, problems: Problems, extra: File | None = None) -> None:
        self.main = main
        self.problems = problems
        self.recipes: dict[str, tuple[s.Recipe, Source]] = {}
        self.targets: dict[str, tuple[s.Target, Source]] = {}
        self.metrics: dict[str, tuple[s.Metric, Source]] = {}
        self.data: dict[str, tuple[s.Word, Source]] = {}
        self.sets: dict[str, RuleSet] = {}  # of rules that stand in the user's files
        self.used: set[str] = set()
        self.target: p.Target | None = None  # of the recipe at hand
        files = [*std_files(), *(extra.all() if extra else ()), *main.all()]
        self.own = [f for f in files if not f.shipped]
        for file in {id(f): f for f in files}.values():
            self._collect(file)

    def recipe(self, w: s.Word, source: Source) -> tuple[s.Recipe, Source] | None:
        """A recipe by name; an unknown one is told."""
        found = self.recipes.get(w.name)
        if found is None:
            help = did_you_mean(w.name, [*self.recipes]) or _some([*self.recipes])
            self.problems.say(source, "Q011", f"there is no recipe `{w.name}`", w.at, help)
        return found

    def unused_data(self) -> list[Diagnostic]:
        return [
            Diagnostic("Q019", f"data `{name}` is not used", source.span(*word.at))
            for name, (word, source) in self.data.items()
            if name not in self.used
        ]

    def metric(self, m: s.Metric, source: Source) -> p.Metric:
        data = m.data.name if m.data else None
        if m.data is not None:
            self.used.add(m.data.name)
            if data not in self.data:
                help = did_you_mean(m.data.name, [*self.data]) or f"declare it: `data {data}`"
                self.problems.say(source, "Q013", f"no data is called `{data}`", m.data.at, help)
        return p.Metric(m.name.name, data, m.higher_is_better)

    def _collect(self, file: File) -> None:
        source = file.source
        for entry in file.document.entries:
            if isinstance(entry, s.Recipe):
                self._declare(self.recipes, entry.name, entry, source, "recipe")
            elif isinstance(entry, s.Target):
                self._declare(self.targets, entry.name, entry, source, "target")
            elif isinstance(entry, s.Metric):
                self._declare(self.metrics, entry.name, entry, source, "metric")
                if entry.name.name in p.QUANTITIES:
                    message = f"`{entry.name.name}` is measured by dfc"
                    self.problems.say(source, "Q014", message, entry.name.at)
            elif isinstance(entry, s.Data):
                for w in entry.names:
                    self._declare(self.data, w, w, source, "data")
        if any(isinstance(e, s.Rule) for e in file.document.entries):
            self._rules(file)

    def _rules(self, file: File) -> None:
        rules, problems = read_rules(file.source, file.name, file.reading)
        self.problems.add(problems)
        if file.shipped:
            return
        known = self.sets.get(rules.name) or shipped_sets().get(rules.name)
        if known is not None and is_another(known, rules):
            at = next(e.name.at for e in file.document.entries if isinstance(e, s.Rule))
            message = f"a rule set `{rules.name}` exists already: {known.source.file}"
            self.problems.say(file.source, "R009", message, at, "rename one of the files")
        self.sets[rules.name] = rules

    def known_sets(self) -> dict[str, RuleSet]:
        """Shipped rule sets, what the user has loaded, and those of the files at hand."""
        return {**all_sets(), **self.sets}

    def _declare(
        self, table: dict[str, Any], w: s.Word, entry: Any, source: Source, kind: str
    ) -> None:
        known = table.get(w.name)
        if known is not None and known[1] is source:
            self.problems.say(source, "Q014", f"a second {kind} `{w.name}`", w.at)
        elif known is not None and not is_std(known[1]):
            where = known[1].span(*known[0].at)
            self.problems.say(source, "Q014", f"a {kind} `{w.name}` exists already: {where}", w.at)
        table[w.name] = (entry, source)


def is_std(source: Source) -> bool:
    return any(f.source is source for f in std_files())


def _some(known: Sequence[str]) -> str | None:
    return f"there are {', '.join(known[:8])}" if known else None
