"""Goals, requirements and conditions: quantities compared in units that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dfc.errors import did_you_mean
from dfc.lang import syntax as s
from dfc.lang.units import UNITS, Amount, amount, fits
from dfc.lang.wording import expression_text
from dfc.recipe import plan as p
from dfc.recipe.bounds import verdict
from dfc.recipe.names import Names
from dfc.recipe.scope import Scope

Measured = tuple[p.Term, str]  # a term and its dimension


class Goals:
    """Reads what is compared and wished for."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.problems = names.problems

    def goal(self, x: s.Goal, scope: Scope) -> None:
        """Add a goal or a requirement to the scope."""
        if x.kind == "require":
            test = self.test(x.what, scope)
            if test:
                scope.requirements.append(test)
            return
        found = self._term(x.what, scope, None)
        if found is not None and isinstance(found[0], p.Quantity):
            scope.goals.append(p.Goal(x.kind, found[0]))
            self._direction(x, found[0], scope)
        elif found is not None:
            message = f"`{x.kind}` takes one quantity"
            self.problems.say(scope.source, "Q013", message, x.what.at)

    def keep(self, x: s.Expr | None, scope: Scope) -> p.Keep | None:
        """The condition of `keep if`."""
        if x is None:
            return None
        if isinstance(x, s.Word) and x.name in ("faster", "smaller"):
            return p.Keep(x.name)
        if isinstance(x, s.Word):
            help = did_you_mean(x.name, ["faster", "smaller"]) or "faster, smaller, or a comparison"
            message = f"`keep if {x.name}` is not known"
            self.problems.say(scope.source, "Q013", message, x.at, help)
            return None
        test = self.test(x, scope)
        return p.Keep(test) if test else None

    def test(self, x: s.Expr, scope: Scope) -> p.Test | None:
        """A comparison of two things that can be compared; what cannot is told."""
        if not isinstance(x, s.Binary) or x.op not in p.COMPARISONS:
            help = "such as `latency(p50) <= 20ms`"
            message = f"`{expression_text(x)}` is no comparison"
            self.problems.say(scope.source, "Q013", message, x.at, help)
            return None
        left = self._term(x.left, scope, None, missing_is_an_error=False)
        about = next(p.quantities_of(left[0]), None) if left else None
        right = self._term(x.right, scope, about)
        if about is None and right is not None:
            about = next(p.quantities_of(right[0]), None)
            left = self._term(x.left, scope, about)
        if left is None or right is None:
            return None
        if not fits(left[1], right[1]):
            message = f"one side measures {left[1]}, the other {right[1]}"
            self.problems.say(scope.source, "Q015", message, x.at, _units(left[1], right[1]))
            return None
        test = p.Test(x.op, left[0], right[0], left[1])
        certain = verdict(test)
        if certain:
            which, why = certain
            self.problems.say(scope.source, "Q018", f"this holds {which}: {why}", x.at)
        return test

    def _direction(self, x: s.Goal, q: p.Quantity, scope: Scope) -> None:
        metric = self.names.metrics.get(q.name)
        lower = not metric[0].higher_is_better if metric else q.name in p.LOWER_IS_BETTER
        if (x.kind == "minimize") != lower:
            better = "lower" if lower else "higher"
            wanted = "minimize" if lower else "maximize"
            message = f"of `{q.name}` {better} is better"
            self.problems.say(scope.source, "Q016", message, x.at, f"write `{wanted}`")

    def _term(
        self,
        x: s.Expr,
        scope: Scope,
        about: p.Quantity | None,
        missing_is_an_error: bool = True,
    ) -> Measured | None:
        """A side of a comparison and its dimension; `about` is what `baseline` is a baseline of."""
        if isinstance(x, s.Number):
            found = amount(x, scope.source)
            if isinstance(found, Amount):
                return found, found.dimension
            self.problems.add([found])
            return None
        if isinstance(x, s.Binary) and x.op in p.ARITHMETIC:
            left = self._term(x.left, scope, about, missing_is_an_error)
            right = self._term(x.right, scope, about, missing_is_an_error)
            return self._arithmetic(x, left, right, scope) if left and right else None
        if isinstance(x, s.Word) and x.name in (p.BASELINE, p.BEFORE):
            if about is None:
                if missing_is_an_error:
                    message = f"`{x.name}` of what? Compare it with a quantity"
                    help = f"latency <= {x.name}"
                    self.problems.say(scope.source, "Q013", message, x.at, help)
                return None
            q = replace(about, version=x.name)
            return q, self._dimension(q)
        if isinstance(x, s.Word):
            return self._quantity(x, (), scope)
        if isinstance(x, s.Call) and not x.keywords and not x.mark:
            return self._quantity(x.name, x.arguments, scope)
        message = f"`{expression_text(x)}` is no quantity"
        self.problems.say(scope.source, "Q013", message, x.at)
        return None

    def _arithmetic(
        self, x: s.Binary, left: Measured, right: Measured, scope: Scope
    ) -> Measured | None:
        plain = ("number", "share")
        if x.op == "/" and isinstance(right[0], Amount) and right[0].value == 0:
            self.problems.say(scope.source, "Q015", "division by 0", x.right.at)
            return None
        if x.op in "+-":
            dimension = left[1] if fits(left[1], right[1]) else None
        elif right[1] in plain:
            dimension = left[1]
        elif left[1] in plain and x.op == "*":
            dimension = right[1]
        else:
            dimension = "number" if x.op == "/" and left[1] == right[1] else None
        if dimension is None:
            message = f"{left[1]} {x.op} {right[1]} has no meaning"
            self.problems.say(scope.source, "Q015", message, x.at)
            return None
        return p.Arithmetic(x.op, left[0], right[0]), dimension

    def _dimension(self, q: p.Quantity) -> str:
        return p.QUANTITIES.get(q.name, "number")

    def _quantity(self, name: s.Word, arguments: Sequence[s.Expr], scope: Scope) -> Measured | None:
        known = [*p.QUANTITIES, *self.names.metrics]
        if name.name not in known:
            help = did_you_mean(name.name, known) or f"dfc measures {', '.join(p.QUANTITIES)}"
            message = f"no quantity is called `{name.name}`"
            self.problems.say(scope.source, "Q013", message, name.at, help)
            return None
        details = self._details(name.name)
        detail, version = "", ""
        for a in arguments:
            word = a.name if isinstance(a, s.Word) else expression_text(a)
            if word in details:
                detail = word
            elif word in (p.BASELINE, p.BEFORE):
                version = word
            elif isinstance(a, s.Word) and word in scope.frame.known():
                label = self.label(a, scope)
                version = label if label else version
            else:
                message = f"`{name.name}` of `{word}`?"
                help = self._of_what(name.name, word, scope)
                self.problems.say(scope.source, "Q013", message, a.at, help)
                return None
        q = p.Quantity(name.name, detail, version)
        return q, self._dimension(q)

    def _of_what(self, quantity: str, word: str, scope: Scope) -> str:
        """What could stand in the brackets of a quantity."""
        details = self._details(quantity)
        near = did_you_mean(word, [*scope.frame.known(), *details])
        if near:
            return near
        if quantity == "peak_memory" and self.names.target is None:
            return "devices are known where a target is: `recipe NAME for TARGET`"
        some = f"it takes {', '.join(details)}, or a label; " if details else ""
        return f"{some}a label is known from its step on"

    def label(self, o: s.Expr, scope: Scope, first: bool = False) -> str | None:
        """The last step, or the first, that a label stands for; an unknown one is told."""
        name = o.name if isinstance(o, s.Word) else expression_text(o)
        count = scope.frame.twice(name)
        if count:
            message = f"`{name}` stands {count} times"
            self.problems.say(scope.source, "Q014", message, o.at, f"label one: `here: {name} ...`")
            return None
        found = scope.frame.find(name) if isinstance(o, s.Word) else None
        if found is not None:
            return found.first if first else found.last
        help = did_you_mean(name, scope.frame.known()) or "a label is known from its step on"
        message = f"no step before this is called `{name}`"
        self.problems.say(scope.source, "Q013", message, o.at, help)
        return None

    def _details(self, quantity: str) -> Sequence[str]:
        """What may stand in a quantity's brackets beside a label."""
        if quantity == "latency":
            return p.PERCENTILES
        target = self.names.target
        devices = target.devices if target and quantity == "peak_memory" else ()
        return [d.name for d in devices]


def _units(a: str, b: str) -> str | None:
    """What to write where a number stands without its unit."""
    wanted = b if a == "number" else a if b == "number" else None
    units = [u for u, (dimension, _) in UNITS.items() if dimension == wanted]
    return f"write its unit: {', '.join(units[:6])}" if units else None
