"""Reads rules: names are resolved, patterns expanded, the form is checked.

R001  a clause is missing or stands twice        R005  a form that no pattern has
R002  a name stands for two things               R006  a pattern that uses itself, or misused
R003  a name that nothing binds                  R007  a function that conditions do not know
R004  an op that does not exist
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.reader import Reading, many_objects, read_document
from dfc.lang.source import Source
from dfc.rewrite.pass_ import EXACT, close
from dfc.rewrite.rule import (
    ARITHMETIC,
    CONSTANTS,
    FUNCTIONS,
    Rule,
    RuleSet,
    is_scoped,
    pattern_names,
    walk,
)

_C = TypeVar("_C")
MAX_NODES = 2000  # of one rule with its patterns expanded
MAX_DEPTH = 100  # of the same
MAX_NEAR = 10  # unknown ops for which a near one is looked for among thousands
MAX_PROBLEMS = 50  # of one file: what nobody reads is not looked for


def load_rules(path: Path) -> RuleSet:
    """The rules of a file. Nothing is proved here.

    Raises:  DfcError with every error of the file: P for its text, R for its rules; D050.
    """
    try:
        source = Source.of_file(path)
    except OSError as e:
        why = (e.strerror or str(e)).lower()
        raise DfcError("D050", f"cannot read `{path}`: {why}") from None
    return rules_of(source, path.stem)


def rules_of(source: Source, name: str) -> RuleSet:
    """The rules of a text.

    Raises:  DfcError with every error.
    """
    found, problems = read_rules(source, name)
    if problems:
        raise DfcError.of(problems)
    return found


def read_rules(
    source: Source, name: str, reading: Reading | None = None
) -> tuple[RuleSet, list[Diagnostic]]:
    """As many rules as are right, and everything that is wrong; never raises for bad text.

    `reading` is the source as it was read, where somebody has read it before.
    """
    with many_objects():
        return _read_rules(source, name, reading or read_document(source))


def _read_rules(source: Source, name: str, reading: Reading) -> tuple[RuleSet, list[Diagnostic]]:
    broken = {d.span.line for d in reading.problems if d.span}
    checker = _Checker(source, name, reading.document, broken)
    rules = checker.rules()
    problems = [*reading.problems, *checker.problems]
    problems.sort(key=lambda d: (d.span.line, d.span.col) if d.span else (0, 0))
    return RuleSet(name, rules, source, checker.patterns), problems


class _Checker:
    """Turns the rules of a document into `Rule`s and collects what is wrong with them."""

    def __init__(
        self, source: Source, name: str, document: s.Document, broken: set[int] | None = None
    ) -> None:
        self.broken = broken or set()  # lines that could not be read
        self.source = source
        self.set = name
        self.document = document
        self.problems: list[Diagnostic] = []
        self.patterns: dict[str, s.Pattern] = {}
        self.expansions = 0

    def say(self, code: str, message: str, at: s.At, help: str | None = None) -> None:
        self.problems.append(Diagnostic(code, message, self.source.span(*at), help))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Enough

    def rules(self) -> tuple[Rule, ...]:
        """The rules that are right, in their order."""
        found: dict[str, Rule] = {}
        with suppress(_Enough):
            self._rules(found)
        return tuple(found.values())

    def _rules(self, found: dict[str, Rule]) -> None:
        for p in self.document.entries:
            if isinstance(p, s.Pattern):
                if p.name.name in self.patterns:
                    self.say("R002", f"a pattern `{p.name.name}` exists already", p.name.at)
                elif p.name.name in FUNCTIONS:
                    self.say("R002", f"`{p.name.name}` is a function of conditions", p.name.at)
                self.patterns[p.name.name] = p
        seen: set[str] = set()
        for entry in self.document.entries:
            if not isinstance(entry, s.Rule):
                continue
            if entry.name.name in seen:
                self.say("R002", f"a rule `{entry.name.name}` exists already", entry.name.at)
            seen.add(entry.name.name)
            before = len(self.problems)
            rule = self.rule(entry)
            if rule is not None and len(self.problems) == before:
                found.setdefault(rule.name, rule)

    def rule(self, entry: s.Rule) -> Rule | None:
        whole = not self._broken(entry)
        for kind, name, least, most in _COUNTS:
            clauses = _of(entry, kind)
            if len(clauses) < least and whole:
                self.say("R001", f"the rule has no `{name}`", entry.name.at, _HELP.get(kind))
            elif len(clauses) > most:
                self.say("R001", f"a second `{name}`", clauses[1].at)
        matches, rewrites = _of(entry, s.Match), _of(entry, s.Rewrite)
        claims, priorities = _of(entry, s.Claim), _of(entry, s.Priority)
        if not matches or not rewrites:
            return None
        matches, rewrites = self._named(matches, rewrites)
        self.expansions = 0
        try:
            matches = [replace(m, pattern=self.expand(m.pattern, ())) for m in matches]
            rewrites = [replace(r, value=self.expand(r.value, ())) for r in rewrites]
        except _Failed:
            return None
        tolerance = claims[0].tolerance if claims else None  # a missing claim has been told
        rule = Rule(
            name=entry.name.name,
            set=self.set,
            source=self.source,
            at=entry.at,
            doc="\n".join(c.text for c in _of(entry, s.Doc)) or self._comment(entry),
            params=None if entry.params is None else tuple(w.name for w in entry.params),
            matches=tuple(matches),
            conditions=tuple(c.what for c in _of(entry, s.Condition)),
            rewrites=tuple(rewrites),
            claim=EXACT if tolerance is None else close(tolerance),
            priority=priorities[0].value if priorities else 0,
            samples=tuple(_of(entry, s.Sample)),
            text=self.source.text[entry.at[0] : entry.at[1]],
        )
        self._check(entry, rule)
        return rule

    def _broken(self, entry: s.Rule) -> bool:
        """Whether a clause of the rule could not be read: what is missing may be there."""
        first, last = (self.source.span(at).line for at in entry.at)
        return any(first <= line <= last for line in self.broken)

    def _comment(self, entry: s.Rule) -> str:
        """The comment that stands above a rule: why it helps."""
        text, starts = self.source.text, self.source.lines
        number = self.source.span(entry.at[0]).line - 1
        found: list[str] = []
        while number and text[starts[number - 1] : starts[number]].lstrip().startswith("#"):
            found.append(text[starts[number - 1] : starts[number]].strip().lstrip("# "))
            number -= 1
        return " ".join(reversed(found))

    def _named(
        self, matches: list[s.Match], rewrites: list[s.Rewrite]
    ) -> tuple[list[s.Match], list[s.Rewrite]]:
        """`match pattern` and `rewrite expression` without names mean `y = ...`."""
        nameless = [m for m in matches if not m.names]
        if nameless and (len(matches) > 1 or any(r.names for r in rewrites)):
            self.say("R001", "a match needs a name here", nameless[0].at, "write `y = ...`")
        if len(matches) == len(rewrites) == 1 and not matches[0].names and not rewrites[0].names:
            y = s.Word(matches[0].at, "y")
            return [replace(matches[0], names=(y,))], [replace(rewrites[0], names=(y,))]
        if any(not r.names for r in rewrites):
            if len(rewrites) == 1 and len(matches) == 1:
                return matches, [replace(rewrites[0], names=matches[0].names)]
            bare = next(r for r in rewrites if not r.names)
            self.say("R001", "a rewrite needs a name here", bare.at, "write `y = ...`")
        return matches, rewrites

    # Patterns

    def expand(self, x: s.Expr, inside: tuple[str, ...], depth: int = 0) -> s.Expr:
        """Put the bodies of patterns in place of their uses; `inside` are those we are in."""
        self.expansions += 1
        if self.expansions > MAX_NODES or depth > MAX_DEPTH:
            over = f"has over {MAX_NODES} parts" if depth <= MAX_DEPTH else "is nested too deeply"
            self.say("R006", f"with its patterns the rule {over}", x.at)
            raise _Failed
        depth += 1
        if isinstance(x, s.Call):
            arguments = tuple(self.expand(a, inside, depth) for a in x.arguments)
            values = [self.expand(k.value, inside, depth) for k in x.keywords]
            old = (*x.arguments, *(k.value for k in x.keywords))
            made = x
            if any(a is not b for a, b in zip(old, (*arguments, *values), strict=True)):
                pairs = zip(x.keywords, values, strict=True)
                keywords = tuple(replace(k, value=v) for k, v in pairs)
                made = replace(x, arguments=arguments, keywords=keywords)
            pattern = self.patterns.get(x.name.name)
            return made if pattern is None else self.use(made, pattern, inside, depth)
        if isinstance(x, s.Several):
            return replace(x, items=tuple(self.expand(i, inside, depth) for i in x.items))
        if isinstance(x, s.Unary):
            return replace(x, operand=self.expand(x.operand, inside, depth))
        if isinstance(x, s.Binary):
            left, right = (self.expand(y, inside, depth) for y in (x.left, x.right))
            return replace(x, left=left, right=right)
        return x

    def use(self, call: s.Call, pattern: s.Pattern, inside: tuple[str, ...], depth: int) -> s.Expr:
        """A pattern's body in place of a call of it."""
        name = pattern.name.name
        if name in inside:
            self.say("R006", f"the pattern `{name}` uses itself", call.at)
            raise _Failed
        params = [w.name for w in pattern.params]
        given = dict(zip(params, call.arguments, strict=False))
        given |= {k.name.name: k.value for k in call.keywords}
        wrong = [k for k in given if k not in params]
        if len(call.arguments) > len(params) or wrong or len(given) < len(params) or call.mark:
            wanted = ", ".join(params)
            self.say("R006", f"the pattern `{name}` takes ({wanted})", call.at)
            raise _Failed
        scope = f"{name}.{self.expansions}"  # what the body names itself is nobody else's
        body = _substitute(pattern.body, given, scope)
        return self.expand(body, (*inside, name), depth)

    # Checks

    def _check(self, entry: s.Rule, rule: Rule) -> None:
        bound = {n for m in rule.matches for n in pattern_names(m.pattern)} | rule.targets
        if rule.params is not None:
            for w in entry.params or ():
                if w.name not in bound:
                    self.say(
                        "R003", f"no match binds `{w.name}`", w.at, did_you_mean(w.name, [*bound])
                    )
            known = set(rule.params) | rule.targets
            for m in rule.matches:
                self._unknown(m.pattern, known, "no parameter of the rule")
        targets = [w for m in rule.matches for w in m.names]
        for i, w in enumerate(targets):
            if w.name in {t.name for t in targets[:i]}:
                self.say("R002", f"`{w.name}` is matched twice", w.at)
        for m in rule.matches:
            self._pattern(m.pattern, top=True)
        for c in rule.conditions:
            self._condition(c, bound)
        for r in rule.rewrites:
            for x in walk(r.value):
                if isinstance(x, s.Word | s.Tail) and x.name not in bound | set(CONSTANTS):
                    self.say(
                        "R003", f"nothing binds `{x.name}`", x.at, did_you_mean(x.name, [*bound])
                    )
                if isinstance(x, s.Call):
                    self._callable(x, in_rewrite=True)
            bound |= {w.name for w in r.names}
        if not rule.roots:
            self.say("R001", "the rewrite replaces nothing that is matched", rule.rewrites[0].at)
        for sample in rule.samples:
            for g in sample.given:
                if g.name.name not in bound:
                    help = did_you_mean(g.name.name, [*bound])
                    self.say("R003", f"the rule has no `{g.name.name}`", g.name.at, help)

    def _unknown(self, x: s.Expr, known: set[str], why: str) -> None:
        for w in walk(x):
            if not isinstance(w, s.Word | s.Tail) or w.name in known or w.name == "_":
                continue
            if w.name not in CONSTANTS and not is_scoped(w.name):
                self.say("R003", f"`{w.name}` is {why}", w.at, did_you_mean(w.name, [*known]))

    def _pattern(self, x: s.Expr, top: bool = False) -> None:
        if top and not isinstance(x, s.Call) and not (isinstance(x, s.Binary) and x.op == "|"):
            self.say("R005", "a match begins with an op", x.at)
        if isinstance(x, s.Call):
            if x.mark == "!":
                self.say("R005", "`!` is for the rewrite: a match computes nothing", x.at)
            self._callable(x, in_rewrite=False)
            for a in (*x.arguments, *(k.value for k in x.keywords)):
                self._pattern(a)
        elif isinstance(x, s.Binary):
            if x.op != "|":
                self.say("R005", f"`{x.op}` is no pattern", x.at, "put conditions into `where`")
                return
            self._pattern(x.left, top)
            self._pattern(x.right, top)
        elif isinstance(x, s.Unary):
            if x.op != "~=" or not isinstance(x.operand, s.Number):
                self.say("R005", f"`{x.op}` is no pattern", x.at, "`~=` takes a number")
        elif isinstance(x, s.Several):
            for i, item in enumerate(x.items):
                if isinstance(item, s.Tail) and i != len(x.items) - 1:
                    self.say("R005", "`...` stands last", item.at)
                self._pattern(item)
        elif isinstance(x, s.Number) and x.unit:
            self.say("R005", "a pattern's numbers have no unit", x.at)

    def _condition(self, x: s.Expr, bound: set[str]) -> None:
        for c in walk(x):
            if isinstance(c, s.Call):
                name = c.name.name
                if name not in FUNCTIONS:
                    help = did_you_mean(name, [*FUNCTIONS]) or "know: " + ", ".join(FUNCTIONS)
                    self.say("R007", f"conditions have no function `{name}`", c.name.at, help)
                else:
                    self._arity(c)
            elif isinstance(c, s.Word) and c.name not in bound and c.name not in CONSTANTS:
                if isinstance(x, s.Binary) and _names_op(x, c):
                    continue
                self.say("R003", f"nothing binds `{c.name}`", c.at, did_you_mean(c.name, [*bound]))

    def _callable(self, x: s.Call, in_rewrite: bool) -> None:
        name = x.name.name
        if in_rewrite and name in FUNCTIONS and not x.mark:
            if name not in ARITHMETIC:
                self._arity(x)
            return
        if not known_op(name):
            near = _near_op(name) if len(self.problems) < MAX_NEAR else None
            self.say("R004", f"unknown op `{name}`", x.name.at, near)

    def _arity(self, x: s.Call) -> None:
        least, most = FUNCTIONS[x.name.name]
        if not least <= len(x.arguments) <= most or x.keywords:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            self.say("R007", f"`{x.name.name}` takes {wanted} argument{'s' * (most != 1)}", x.at)


def _of(entry: s.Rule, kind: type[_C]) -> list[_C]:
    return [c for c in entry.clauses if isinstance(c, kind)]


class _Enough(Exception):
    """So much is wrong that the rest can wait."""


class _Failed(Exception):
    """The problem has been noted; this rule goes no further."""


_COUNTS: tuple[tuple[type[Any], str, int, float], ...] = (
    (s.Match, "match", 1, float("inf")),
    (s.Rewrite, "rewrite", 1, float("inf")),
    (s.Claim, "exact` or `within", 1, 1),
    (s.Priority, "priority", 0, 1),
)
_HELP: dict[type[Any], str] = {s.Claim: "say what it promises: `exact`, or `within 1e-5`"}


def _substitute(x: s.Expr, given: Mapping[str, s.Expr], scope: str) -> s.Expr:
    """A pattern's body with its parameters replaced and its own names made private."""

    def go(x: s.Expr) -> s.Expr:
        if isinstance(x, s.Word):
            if x.name in given:
                return given[x.name]
            if x.name in CONSTANTS or x.name == "_":
                return x
            return replace(x, name=f"{scope}${x.name}")
        if isinstance(x, s.Tail):
            return replace(x, name=f"{scope}${x.name}")
        if isinstance(x, s.Call):
            keywords = tuple(replace(k, value=go(k.value)) for k in x.keywords)
            return replace(x, arguments=tuple(map(go, x.arguments)), keywords=keywords)
        if isinstance(x, s.Several):
            return replace(x, items=tuple(map(go, x.items)))
        if isinstance(x, s.Unary):
            return replace(x, operand=go(x.operand))
        if isinstance(x, s.Binary):
            return replace(x, left=go(x.left), right=go(x.right))
        return x

    return go(x)


def _names_op(comparison: s.Binary, word: s.Word) -> bool:
    """`op(x) == relu`: the word is an op's name."""
    sides = (comparison.left, comparison.right)
    return word in sides and any(isinstance(x, s.Call) and x.name.name == "op" for x in sides)


def known_op(name: str) -> bool:
    """Whether a rule may name this op: `linear`, `aten.linear.default`, `dfc.linear_gelu`."""
    import torch

    import dfc.ops  # noqa: F401 - makes the ops known
    from dfc.ir.op import lookup

    if "." in name:
        try:
            lookup(name)
        except DfcError:
            parts = name.split(".")
            return len(parts) == 2 and parts[0] == "aten" and known_op(parts[1])
        return True
    return name.isidentifier() and hasattr(torch.ops.aten, name)


def _near_op(name: str) -> str | None:
    if "." in name and not name.startswith("aten."):
        from dfc.ir.op import declared_ops

        near = did_you_mean(name, [op.name for op in declared_ops()])
        return near or "an op of yours is brought by `--use FILE.py`, or by importing its module"
    return did_you_mean(name, _bases())


@cache
def _bases() -> list[str]:
    from dfc.ops.aten import _names

    return sorted({n.split(".")[1] for n in _names() if n.startswith("aten.")})
