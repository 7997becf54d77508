"""Statements of a recipe to steps of a plan; what they apply and extend is put in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from dfc.errors import did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.wording import expression_text
from dfc.recipe import plan as p
from dfc.recipe.goals import Goals
from dfc.recipe.names import Enough, Names
from dfc.recipe.scope import Scope, Stretch
from dfc.recipe.sentences import options_of, plain_options
from dfc.rewrite.pass_ import pass_classes

BUILT_IN = (
    "apply", "verify", "emit", "revert", "keep", "when", "minimize", "maximize", "require",
)  # fmt: skip
MAX_STEPS = 1000  # of one recipe
MAX_DEPTH = 16  # of recipes that apply or extend each other
MAX_WORK = 20_000  # steps of all recipes of a file
VERIFY = {"samples": int, "atol": float, "rtol": float}
EMIT: Mapping[str, Mapping[str, Any]] = {
    "onnx": {"opset": int, "contrib": bool, "file": str, "stages": Literal["separate"] | int},
    "graph": {"file": str},
}
Steps = tuple[p.PlanStep, ...]


class Resolver:
    """Reads recipes, one after the other."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.problems = names.problems
        self.goals = Goals(names)
        self.work = 0

    def recipe(self, recipe: s.Recipe, source: Source) -> tuple[Steps, Scope]:
        """All steps of a recipe, with those of its bases, and its goals."""
        scope = Scope(source, applied=(recipe.name.name,))
        return tuple(self._body(recipe, scope, [])), scope

    def _body(self, recipe: s.Recipe, scope: Scope, steps: list[p.PlanStep]) -> list[p.PlanStep]:
        """Steps of the bases, then the recipe's own, which replace those of the same label."""
        for base in recipe.extends:
            self._extend(base, scope, steps)
        goals, requirements = [*scope.goals], [*scope.requirements]
        scope.goals, scope.requirements = [], []
        steps += self._statements(recipe.body, scope, replacing=steps)
        scope.goals = scope.goals or goals  # own goals replace a base's
        fresh = {_about(r) for r in scope.requirements}
        scope.requirements[:0] = [r for r in requirements if _about(r) not in fresh]
        return steps

    def _extend(self, base: s.Word, scope: Scope, steps: list[p.PlanStep]) -> None:
        found = self.names.recipe(base, scope.source)
        if found is None or self._goes_in_a_circle(base, scope, "extend"):
            return
        with scope.extending(base.name, found[1]):
            self._body(found[0], scope, steps)

    def _goes_in_a_circle(self, w: s.Word, scope: Scope, verb: str) -> bool:
        if w.name in scope.applied:
            chain = " -> ".join((*scope.applied, w.name))
            message = f"recipes {verb} each other in a circle: {chain}"
            self.problems.say(scope.source, "Q014", message, w.at)
            return True
        if len(scope.applied) >= MAX_DEPTH:
            message = f"recipes {verb} each other more than {MAX_DEPTH} deep"
            self.problems.say(scope.source, "Q033", message, w.at)
            return True
        return False

    def _statements(
        self,
        body: Sequence[s.Statement],
        scope: Scope,
        replacing: list[p.PlanStep] | None = None,
        goals: bool = True,
    ) -> list[p.PlanStep]:
        made: list[p.PlanStep] = []
        for x in body:
            if isinstance(x, s.Doc):
                continue
            if isinstance(x, s.Goal) and goals:
                self.goals.goal(x, scope)
            elif isinstance(x, s.Goal):
                self.problems.say(scope.source, "Q016", "goals stand outside of `when`", x.at)
            elif isinstance(x, s.Step):
                made += self._step(x, scope, replacing)
            elif isinstance(x, s.Keep):
                made += self._keep(x, scope, made)
            else:
                made += self._when(x, scope)
            self._count(x.at, scope)
        return made

    def _count(self, at: s.At, scope: Scope) -> None:
        """Bound the steps of one recipe, and of all."""
        scope.steps += 1
        self.work += 1
        if scope.steps > MAX_STEPS or self.work > MAX_WORK:
            limit = MAX_STEPS if scope.steps > MAX_STEPS else MAX_WORK
            what = "a recipe" if scope.steps > MAX_STEPS else "the recipes of a file"
            self.problems.say(scope.source, "Q033", f"{what} may have {limit} steps", at)
            raise Enough

    def _step(self, x: s.Step, scope: Scope, replacing: list[p.PlanStep] | None) -> Steps:
        built_in = {
            "apply": self._apply, "verify": self._verify, "emit": self._emit,
            "revert": self._revert,
        }.get(x.verb.name)  # fmt: skip
        return built_in(x, scope) if built_in else self._pass(x, scope, replacing)

    # Passes

    def _pass(self, x: s.Step, scope: Scope, replacing: list[p.PlanStep] | None) -> Steps:
        verb = x.verb.name
        cls = pass_classes().get(verb)
        if cls is None:
            help = did_you_mean(verb, [*pass_classes(), *BUILT_IN])
            if verb in self.names.recipes:
                help = f"write `apply {verb}`"
            elif verb in self.names.known_sets():
                help = f"write `apply rules({verb})`"
            self.problems.say(scope.source, "Q001", f"unknown pass `{verb}`", x.verb.at, help)
            return ()
        old = _position(x.label, scope, replacing)
        label = self._label(x.label, verb, scope, old is not None)
        options = options_of(x, cls, label, scope.source, self.names)
        keep = self.goals.keep(x.keep, scope)
        step = p.PassStep(label, verb, options, keep, scope.source.span(*x.at))
        if old is not None and replacing is not None:
            replacing[old] = step
            return ()
        return (step,)

    def _label(self, label: s.Word | None, verb: str, scope: Scope, again: bool) -> str:
        """A label of the plan for a step, which its own recipe knows by its label or verb."""
        frame = scope.frame
        if again and label:
            return frame.own[label.name].first
        name = label.name if label else verb
        if label and name in frame.own:
            self.problems.say(scope.source, "Q014", f"the label `{name}` stands twice", label.at)
        if not label:
            frame.bare[name] = frame.bare.get(name, 0) + 1
        found = scope.fresh(name)
        frame.own[name] = Stretch(found, found)
        return found

    # Built-in steps

    def _apply(self, x: s.Step, scope: Scope) -> Steps:
        made: list[p.PlanStep] = []
        if not x.operands:
            help = "write `apply simplify` or `apply rules(attention)`"
            self.problems.say(scope.source, "Q016", "`apply` what?", x.verb.at, help)
        if not all(isinstance(o, s.Call) and o.name.name == "rules" for o in x.operands):
            for f in x.phrases:
                message = f"`apply` takes no `{f.word}` here"
                self.problems.say(scope.source, "Q002", message, f.at)
        for o in x.operands:
            self._count(o.at, scope)
            if isinstance(o, s.Call) and o.name.name == "rules":
                made += self._rules(x, o, scope)
            elif isinstance(o, s.Word):
                made += self._preset(x, o, scope)
            else:
                message = f"`{expression_text(o)}` cannot be applied"
                self.problems.say(
                    scope.source, "Q013", message, o.at, "name a recipe, or rules(...)"
                )
        if x.label:
            self._name_all(x.label, made, scope)
        return tuple(made)

    def _name_all(self, label: s.Word, made: Sequence[p.PlanStep], scope: Scope) -> None:
        """Let a label stand for all steps that an `apply` has made."""
        found = _stretch(made)
        if found is None:
            return
        known = scope.frame.own.get(label.name)
        if known is not None and known != found:
            self.problems.say(
                scope.source, "Q014", f"the label `{label.name}` stands twice", label.at
            )
        scope.frame.own[label.name] = found

    def _rules(self, x: s.Step, o: s.Call, scope: Scope) -> Steps:
        """`apply rules(a, b)` is the pass fuse."""
        words = [a for a in o.arguments if isinstance(a, (s.Word, s.Text))]
        for a in o.arguments:
            if not isinstance(a, (s.Word, s.Text)):
                message = f"`{expression_text(a)}` is no rule set"
                self.problems.say(scope.source, "Q013", message, a.at)
        operands = tuple(a if isinstance(a, s.Word) else s.Word(a.at, a.value) for a in words)
        label = x.label if x.label and len(x.operands) == 1 else None
        verb = s.Word(o.name.at, "fuse")
        return self._pass(replace(x, label=label, verb=verb, operands=operands), scope, None)

    def _preset(self, x: s.Step, o: s.Word, scope: Scope) -> Steps:
        found = self.names.recipes.get(o.name)
        if found is None:
            help = did_you_mean(o.name, [*self.names.recipes])
            if help is None and o.name in self.names.known_sets():
                help = f"write `apply rules({o.name})`"
            help = help or f"there are {', '.join([*self.names.recipes][:8])}"
            message = f"there is no recipe `{o.name}`"
            self.problems.say(scope.source, "Q011", message, o.at, help)
            return ()
        if self._goes_in_a_circle(o, scope, "apply"):
            return ()
        for k in x.options:
            message = "a recipe takes no options here"
            self.problems.say(scope.source, "Q002", message, k.name.at, "set them in its steps")
        steps: list[p.PlanStep] = []
        with scope.applying(o.name, found[1]):
            self._body(found[0], scope, steps)
        stretch = _stretch(steps)
        keep = self.goals.keep(x.keep, scope)
        if keep and stretch:
            steps.append(p.KeepStep(stretch.first, keep))
        if stretch:
            scope.frame.borrowed[o.name] = stretch
        return tuple(steps)

    def _verify(self, x: s.Step, scope: Scope) -> Steps:
        what = x.operands[0] if x.operands else None
        mode = what.name if isinstance(what, s.Word) else "" if what else "each"
        if mode not in p.VERIFY_MODES or len(x.operands) > 1:
            shown = ", ".join(map(expression_text, x.operands))
            help = did_you_mean(mode, p.VERIFY_MODES) or "each, end or none"
            message = f"`verify {shown}` is not known"
            self.problems.say(scope.source, "Q013", message, x.operands[0].at, help)
        options = plain_options(x, VERIFY, "verify", scope.source, self.names)
        return (p.VerifyStep(mode, options),)

    def _emit(self, x: s.Step, scope: Scope) -> Steps:
        what = x.operands[0] if x.operands else None
        name = what.name if isinstance(what, s.Word) else ""
        if name not in EMIT or len(x.operands) != 1:
            help = did_you_mean(name, [*EMIT]) or f"it writes {', '.join(EMIT)}"
            at = what.at if what else x.verb.at
            self.problems.say(scope.source, "Q013", f"`emit` cannot write `{name}`", at, help)
            return ()
        options = plain_options(x, EMIT[name], f"emit {name}", scope.source, self.names)
        return (p.EmitStep(name, options, scope.source.span(*x.at)),)

    def _revert(self, x: s.Step, scope: Scope) -> Steps:
        if not x.operands:
            self.problems.say(scope.source, "Q016", "`revert` what?", x.verb.at, "name a label")
        labels = [self.goals.label(o, scope, first=True) for o in x.operands]
        return tuple(p.RevertStep(label) for label in labels if label)

    def _keep(self, x: s.Keep, scope: Scope, made: Sequence[p.PlanStep]) -> Steps:
        for k in x.options:
            message = f"`keep` has no option `{k.name.name}`"
            self.problems.say(scope.source, "Q002", message, k.name.at)
        keep = self.goals.keep(x.condition, scope)
        if x.label is not None:
            label = self.goals.label(x.label, scope, first=True)
        else:
            last = _stretch(made)
            label = last.last if last else None
            if label is None:
                message = "there is no step before this `keep`"
                self.problems.say(scope.source, "Q016", message, x.at)
        return (p.KeepStep(label, keep),) if keep and label else ()

    def _when(self, x: s.When, scope: Scope) -> Steps:
        test = self.goals.test(x.condition, scope)
        then = tuple(self._statements(x.then, scope, goals=False))
        otherwise = tuple(self._statements(x.otherwise, scope, goals=False))
        return (p.WhenStep(test, then, otherwise),) if test else ()


def _position(label: s.Word | None, scope: Scope, replacing: list[p.PlanStep] | None) -> int | None:
    """Where a base's step of this label stands."""
    found = scope.frame.own.get(label.name) if label else None
    for i, old in enumerate(replacing or ()):
        if found and isinstance(old, p.PassStep) and old.label == found.first == found.last:
            return i
    return None


def _stretch(steps: Sequence[p.PlanStep]) -> Stretch | None:
    labels = [x.label for x in p.passes_of(steps)]
    return Stretch(labels[0], labels[-1]) if labels else None


def _about(r: p.Test) -> tuple[object, ...]:
    """What a requirement bounds, and from which side."""
    bounded = (q for q in r.quantities() if q.version not in (p.BASELINE, p.BEFORE))
    return (r.op[0], next(bounded, None))
