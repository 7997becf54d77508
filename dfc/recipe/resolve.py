"""A recipe as written to a plan: everything looked up, everything checked, every error told.

Q001  an unknown pass           Q013  an unknown word, quantity or name
Q002  an unknown option         Q014  a name or label that stands for two things
Q010  an unknown unit           Q015  sides of a comparison that measure different things
Q011  no such recipe            Q016  a step where it cannot stand
Q012  a value of a wrong type   Q017  a target that lacks what a step needs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.units import Amount, amount, fits
from dfc.lang.wording import expression_text
from dfc.recipe import plan as p
from dfc.recipe.imports import File, Reader, std_files
from dfc.recipe.options import BadValue, convert, fields_of, type_text
from dfc.rewrite.pass_ import pass_classes
from dfc.rewrite.rule import read_rules
from dfc.rewrite.rulesets import add_set, all_sets

BUILT_IN = ("apply", "verify", "emit", "revert", "keep", "when")
MAX_STEPS = 1000
_VERIFY = {"samples": int, "atol": float, "rtol": float}
_EMIT: Mapping[str, Mapping[str, Any]] = {
    "onnx": {"opset": int, "contrib": bool, "file": str},
    "graph": {"file": str},
}
_DEVICES: Mapping[str, Mapping[str, str]] = {
    "cpu": {"cores": "number", "mem": "bytes", "peak": "flops/s", "bw": "bytes/s"},
    "cuda": {"mem": "bytes", "peak": "flops/s", "bw": "bytes/s", "index": "number"},
}
_LINK = {"bw": "bytes/s", "latency": "time"}


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
    reader = Reader()
    main = reader.text(source)
    extra = reader.text(target) if target is not None else None
    resolver = _Resolver(main, reader.problems, extra)
    found = resolver.plan(name, settings or {})
    problems = sorted(resolver.problems, key=_where)
    return found, problems


def preset(name: str, settings: Mapping[str, str] | None = None) -> p.Plan:
    """A shipped recipe by name, such as `simplify` or `o2`.

    Raises:  DfcError Q011.
    """
    return resolve(Source(f"dfc 1\nrecipe {name}_ {{\n  apply {name}\n}}\n"), settings=settings)


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
                        d = e.diagnostics[0]
                        problems.append(replace(d, span=d.span or step.span))
    return problems


def _where(d: Diagnostic) -> tuple[str, int, int]:
    return (d.span.file, d.span.line, d.span.col) if d.span else ("", 0, 0)


@dataclass
class _Scope:
    """What is known while the statements of a recipe are read."""

    source: Source
    labels: dict[str, str] = field(default_factory=dict)  # label -> first label of its steps
    ends: dict[str, str] = field(default_factory=dict)  # label -> last label of its steps
    verbs: dict[str, int] = field(default_factory=dict)
    goals: list[p.Goal] = field(default_factory=list)
    requirements: list[p.Test] = field(default_factory=list)
    applied: tuple[str, ...] = ()
    steps: int = 0


class _Resolver:
    def __init__(self, main: File, problems: list[Diagnostic], extra: File | None) -> None:
        self.main = main
        self.problems = problems
        self.files = [*std_files(), *(extra.all() if extra else ()), *main.all()]
        self.recipes: dict[str, tuple[s.Recipe, Source]] = {}
        self.targets: dict[str, tuple[s.Target, Source]] = {}
        self.metrics: dict[str, tuple[s.Metric, Source]] = {}
        self.data: dict[str, tuple[s.Word, Source]] = {}
        self.used: set[str] = set()
        self.warnings: list[str] = []
        self.target: p.Target | None = None
        for file in dict.fromkeys(map(id, self.files)):
            self._collect(next(f for f in self.files if id(f) == file))

    def say(
        self, source: Source, code: str, message: str, at: s.At, help: str | None = None
    ) -> None:
        self.problems.append(Diagnostic(code, message, source.span(*at), help))

    # Names

    def _collect(self, file: File) -> None:
        source = file.source
        shipped = file in std_files()
        for entry in file.document.entries:
            if isinstance(entry, s.Recipe):
                self._declare(self.recipes, entry.name, entry, source, "recipe", shipped)
            elif isinstance(entry, s.Target):
                self._declare(self.targets, entry.name, entry, source, "target", shipped)
            elif isinstance(entry, s.Metric):
                self._declare(self.metrics, entry.name, entry, source, "metric", shipped)
                if entry.name.name in p.QUANTITIES:
                    self.say(
                        source, "Q014", f"`{entry.name.name}` is measured by dfc", entry.name.at
                    )
            elif isinstance(entry, s.Data):
                for w in entry.names:
                    self._declare(self.data, w, w, source, "data", shipped)
        if any(isinstance(e, s.Rule) for e in file.document.entries):
            rules, problems = read_rules(source, file.name)
            self.problems += [d for d in problems if d not in self.problems]
            if not problems and not file.shipped:
                try:
                    add_set(rules)
                except DfcError as e:
                    self.problems += e.diagnostics

    def _declare(
        self, table: dict[str, Any], w: s.Word, entry: Any, source: Source, kind: str, shipped: bool
    ) -> None:
        known = table.get(w.name)
        if known is not None and known[1] is not source and not _is_std(known[1]):
            where = known[1].span(*known[0].at)
            self.say(source, "Q014", f"a {kind} `{w.name}` exists already: {where}", w.at)
        elif known is not None and known[1] is source:
            self.say(source, "Q014", f"a second {kind} `{w.name}`", w.at)
        table[w.name] = (entry, source)

    # The plan

    def plan(self, name: str | None, settings: Mapping[str, str]) -> p.Plan | None:
        own = [e for e in self.main.document.entries if isinstance(e, s.Recipe)]
        if name is None and len(own) == 1:
            name = own[0].name.name
        if name is None:
            names = ", ".join(f"`{e.name.name}`" for e in own)
            message = (
                f"the file has {len(own)} recipes: {names}" if own else "the file has no recipe"
            )
            advice = "say which: --recipe NAME" if own else "write `recipe NAME { ... }`"
            if not self.problems:
                self.problems.append(Diagnostic("Q011", message, self.main.source.span(0), advice))
            return None
        if name not in self.recipes:
            help = did_you_mean(name, [*self.recipes])
            self.problems.append(Diagnostic("Q011", f"there is no recipe `{name}`", None, help))
            return None
        recipe, source = self.recipes[name]
        self.target = self._target(recipe, source)
        for e in own:  # the others are checked as well
            if e is not recipe:
                self._statements(e, self.main.source)
        steps, scope = self._statements(recipe, source)
        steps = self._settings(steps, settings)
        self._orders(steps)
        self._needs(steps)
        for w, (word, where) in self.data.items():
            if w not in self.used and not _is_std(where):
                self.warnings.append(f"{where.span(*word.at)}: data `{w}` is not used")
        metrics = tuple(self._metric(m, src) for m, src in self.metrics.values())
        return p.Plan(
            name, steps, tuple(scope.goals), tuple(scope.requirements), self.target,
            tuple(self.data), metrics, tuple(self.warnings),
        )  # fmt: skip

    def _metric(self, m: s.Metric, source: Source) -> p.Metric:
        if m.data is not None:
            self.used.add(m.data.name)
            if m.data.name not in self.data:
                help = (
                    did_you_mean(m.data.name, [*self.data]) or f"declare it: `data {m.data.name}`"
                )
                self.say(source, "Q013", f"no data is called `{m.data.name}`", m.data.at, help)
        return p.Metric(m.name.name, m.data.name if m.data else None, m.higher_is_better)

    def _statements(
        self, recipe: s.Recipe, source: Source
    ) -> tuple[tuple[p.PlanStep, ...], _Scope]:
        scope = _Scope(source, applied=(recipe.name.name,))
        steps: list[p.PlanStep] = []
        for base in recipe.extends:
            found = self.recipes.get(base.name)
            if found is None:
                help = did_you_mean(base.name, [*self.recipes])
                self.say(source, "Q011", f"there is no recipe `{base.name}`", base.at, help)
                continue
            if found[0] is recipe or base.name in scope.applied:
                self.say(source, "Q014", f"`{base.name}` extends itself", base.at)
                continue
            steps += self._extended(found, scope, base, source)
        scope.source = source
        fresh = self.steps(recipe.body, scope, replacing=steps)
        return (*steps, *fresh), scope

    def _extended(
        self, found: tuple[s.Recipe, Source], scope: _Scope, base: s.Word, source: Source
    ) -> tuple[p.PlanStep, ...]:
        """The steps of a base, its goals added to the scope."""
        if len(scope.applied) > 16:
            self.say(source, "Q014", "recipes extend each other too deeply", base.at)
            return ()
        recipe, where = found
        outer, scope.applied = scope.applied, (*scope.applied, base.name)
        scope.source = where
        steps: list[p.PlanStep] = []
        for b in recipe.extends:
            inner = self.recipes.get(b.name)
            if inner is not None and b.name not in scope.applied:
                steps += self._extended(inner, scope, b, where)
        scope.source = where
        steps += self.steps(recipe.body, scope, replacing=steps)
        scope.applied = outer
        return tuple(steps)

    # Steps

    def steps(
        self,
        body: Sequence[s.Statement],
        scope: _Scope,
        replacing: list[p.PlanStep] | None = None,
        goals: bool = True,
    ) -> tuple[p.PlanStep, ...]:
        made: list[p.PlanStep] = []
        for x in body:
            if isinstance(x, s.Doc):
                continue
            if isinstance(x, s.Goal):
                if goals:
                    self._goal(x, scope)
                else:
                    self.say(scope.source, "Q016", "goals stand outside of `when`", x.at)
            elif isinstance(x, s.Step):
                made += self._step(x, scope, replacing)
            elif isinstance(x, s.Keep):
                made += self._keep_step(x, scope, made)
            else:
                made += self._when(x, scope)
            scope.steps += 1
            if scope.steps > MAX_STEPS:
                self.say(scope.source, "Q033", f"a recipe may have {MAX_STEPS} steps", x.at)
                break
        return tuple(made)

    def _step(
        self, x: s.Step, scope: _Scope, replacing: list[p.PlanStep] | None
    ) -> tuple[p.PlanStep, ...]:
        verb = x.verb.name
        if verb == "apply":
            return self._apply(x, scope)
        if verb == "verify":
            return self._verify(x, scope)
        if verb == "emit":
            return self._emit(x, scope)
        if verb == "revert":
            return self._revert(x, scope)
        cls = pass_classes().get(verb)
        if cls is None:
            known = [*pass_classes(), *BUILT_IN]
            help = did_you_mean(verb, known)
            if help is None and verb in self.recipes:
                help = f"write `apply {verb}`"
            self.say(scope.source, "Q001", f"unknown pass `{verb}`", x.verb.at, help)
            return ()
        options = self._options(x, cls, scope)
        step = p.PassStep(
            self._label(x.label, verb, scope, replacing), verb, options,
            self._keep(x.keep, x, scope), scope.source.span(*x.at),
        )  # fmt: skip
        if replacing is not None:
            for i, old in enumerate(replacing):
                if isinstance(old, p.PassStep) and x.label and old.label == step.label:
                    replacing[i] = step  # a base's step, written anew
                    return ()
        return (step,)

    def _label(
        self,
        label: s.Word | None,
        verb: str,
        scope: _Scope,
        replacing: list[p.PlanStep] | None = None,
    ) -> str:
        count = scope.verbs[verb] = scope.verbs.get(verb, 0) + 1
        name = label.name if label else verb if count == 1 else f"{verb}_{count}"
        if label and name in scope.labels:
            inherited = any(isinstance(r, p.PassStep) and r.label == name for r in replacing or ())
            if not inherited:
                self.say(scope.source, "Q014", f"the label `{name}` stands twice", label.at)
        scope.labels[name] = scope.ends[name] = name
        return name

    def _options(self, x: s.Step, cls: Any, scope: _Scope) -> dict[str, Any]:
        """Operands, phrases and `with` as the pass's fields."""
        fields = fields_of(cls)
        given: dict[str, tuple[s.Expr, s.At]] = {}
        phrases = [("", x.operands, x.verb.at)] if x.operands else []
        phrases += [(f.word, f.operands, f.at) for f in x.phrases]
        for word, operands, at in phrases:
            name = cls.phrases.get(word)
            if name is None:
                can = ", ".join(f"`{w}`" for w in cls.phrases if w)
                what = f"`{word}`" if word else f"operand `{expression_text(operands[0])}`"
                help = f"it takes {can}" if can else "options stand behind `with`"
                at = at if word else operands[0].at
                self.say(scope.source, "Q002", f"`{cls.name}` takes no {what}", at, help)
                continue
            if name in given:
                self.say(scope.source, "Q002", f"a second `{word or 'operand'}`", at)
            given[name] = (_joined(operands, fields[name]), at)
        for k in x.options:
            name = k.name.name
            if name not in fields:
                help = did_you_mean(name, [*fields]) or (
                    f"it has {', '.join(fields)}" if fields else "it has no options"
                )
                message = f"pass `{cls.name}` has no option `{name}`"
                self.say(scope.source, "Q002", message, k.name.at, help)
            elif name in given:
                self.say(scope.source, "Q002", f"`{name}` is given twice", k.name.at)
            else:
                given[name] = (k.value, k.at)
        made: dict[str, Any] = {}
        for name, (value, _) in given.items():
            label = x.label.name if x.label else cls.name
            try:
                made[name] = self._value(cls, name, fields[name], value, label, scope)
            except BadValue as e:
                wanted = type_text(fields[name])
                help = e.help or f"`{name}` is a {wanted}"
                self.say(scope.source, e.code, f"`{name}`: {e.message}", e.at, help)
        if cls.name == "fuse":
            self._check_rules(made.get("rules", ()), x, scope)
        return made

    def _value(self, cls: Any, name: str, hint: Any, x: s.Expr, label: str, scope: _Scope) -> Any:
        hole = f"{label}.{name}"
        if isinstance(x, s.Call) and x.name.name == "tune":
            if not x.arguments or x.keywords:
                raise BadValue("`tune` takes the values to try", x.at, "tune(0.1, 0.3, 0.5)")
            values = [convert(hint, a, scope.source, [*self.data]) for a in x.arguments]
            return p.Hole(hole, tuple(values))
        if isinstance(x, s.Word) and x.name == "auto":
            choices = cls.auto.get(name)
            if not choices:
                raise BadValue(
                    f"`{cls.name}` has no choices of its own for it", x.at, "write tune(a, b)"
                )
            return p.Hole(hole, tuple(choices))
        if isinstance(x, s.Word) and x.name in self.data:
            self.used.add(x.name)
        return convert(hint, x, scope.source, [*self.data])

    def _check_rules(self, names: Any, x: s.Step, scope: _Scope) -> None:
        sets = all_sets()
        known = [*sets, *(n for q in sets.values() for r in q.rules for n in (r.name, r.full_name))]
        listed = names.choices[0] if isinstance(names, p.Hole) else names
        for name in listed:
            if name not in known:
                help = did_you_mean(name, known) or f"sets: {', '.join(sets)}"
                self.say(scope.source, "R008", f"no rule or set is called `{name}`", x.at, help)

    def _apply(self, x: s.Step, scope: _Scope) -> tuple[p.PlanStep, ...]:
        made: list[p.PlanStep] = []
        if not x.operands:
            help = "write `apply simplify` or `apply rules(attention)`"
            self.say(scope.source, "Q016", "`apply` what?", x.verb.at, help)
        for f in x.phrases:
            if not (f.word in ("on", "except") and _all_rules(x)):
                self.say(scope.source, "Q002", f"`apply` takes no `{f.word}` here", f.at)
        for o in x.operands:
            if isinstance(o, s.Call) and o.name.name == "rules":
                made += self._rules(x, o, scope)
            elif isinstance(o, s.Word):
                made += self._preset(x, o, scope)
            else:
                help = "name a recipe, or rules(...)"
                self.say(
                    scope.source, "Q013", f"`{expression_text(o)}` cannot be applied", o.at, help
                )
        if x.label and made:
            first, last = _first_label(made), _last_label(made)
            if first and last:
                if x.label.name in scope.labels and x.label.name != first:
                    self.say(
                        scope.source, "Q014", f"the label `{x.label.name}` stands twice", x.label.at
                    )
                scope.labels[x.label.name], scope.ends[x.label.name] = first, last
        return tuple(made)

    def _rules(self, x: s.Step, o: s.Call, scope: _Scope) -> tuple[p.PlanStep, ...]:
        words = [a for a in o.arguments if isinstance(a, (s.Word, s.Text))]
        for a in o.arguments:
            if a not in words:
                self.say(scope.source, "Q013", f"`{expression_text(a)}` is no rule set", a.at)
        operands = tuple(a if isinstance(a, s.Word) else s.Word(a.at, a.value) for a in words)
        label = x.label if x.label and len(x.operands) == 1 else None
        verb = s.Word(o.name.at, "fuse")
        step = replace(x, label=label, verb=verb, operands=operands)
        return self._step(step, scope, None)

    def _preset(self, x: s.Step, o: s.Word, scope: _Scope) -> tuple[p.PlanStep, ...]:
        found = self.recipes.get(o.name)
        if found is None:
            known = [*self.recipes]
            help = did_you_mean(o.name, known)
            if help is None and (o.name in all_sets()):
                help = f"write `apply rules({o.name})`"
            help = help or f"there are {', '.join(known[:8])}"
            self.say(scope.source, "Q011", f"there is no recipe `{o.name}`", o.at, help)
            return ()
        if o.name in scope.applied:
            chain = " -> ".join((*scope.applied, o.name))
            self.say(scope.source, "Q014", f"recipes apply each other in a circle: {chain}", o.at)
            return ()
        if x.options or (x.keep and not x.operands):
            self.say(scope.source, "Q002", "a recipe takes no options here", x.options[0].at)
        recipe, source = found
        outer, applied = scope.source, scope.applied
        scope.source, scope.applied = source, (*applied, o.name)
        steps: list[p.PlanStep] = []
        for base in recipe.extends:
            if base.name in self.recipes and base.name not in scope.applied:
                steps += self._extended(self.recipes[base.name], scope, base, source)
        steps += self.steps(recipe.body, scope)
        scope.source, scope.applied = outer, applied
        keep = self._keep(x.keep, x, scope)
        if keep and steps:
            last = _last_label(steps)
            if last:
                steps.append(p.KeepStep(_first_label(steps) or last, keep))
        first, last = _first_label(steps), _last_label(steps)
        if first and last:
            scope.labels.setdefault(o.name, first)
            scope.ends[o.name] = last
        return tuple(steps)

    def _verify(self, x: s.Step, scope: _Scope) -> tuple[p.PlanStep, ...]:
        mode = x.operands[0].name if x.operands and isinstance(x.operands[0], s.Word) else "each"
        if mode not in ("each", "end", "none") or len(x.operands) > 1:
            help = did_you_mean(mode, ["each", "end", "none"]) or "each, end or none"
            self.say(scope.source, "Q013", f"`verify {mode}` is not known", x.operands[0].at, help)
        return (p.VerifyStep(mode, self._plain_options(x, _VERIFY, "verify", scope)),)

    def _emit(self, x: s.Step, scope: _Scope) -> tuple[p.PlanStep, ...]:
        what = x.operands[0] if x.operands else None
        name = what.name if isinstance(what, s.Word) else ""
        if name not in _EMIT or len(x.operands) != 1:
            help = did_you_mean(name, [*_EMIT]) or f"it writes {', '.join(_EMIT)}"
            at = what.at if what else x.verb.at
            self.say(scope.source, "Q013", f"`emit` cannot write `{name}`", at, help)
            return ()
        return (p.EmitStep(name, self._plain_options(x, _EMIT[name], f"emit {name}", scope)),)

    def _plain_options(
        self, x: s.Step, known: Mapping[str, Any], what: str, scope: _Scope
    ) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for f in x.phrases:
            self.say(scope.source, "Q002", f"`{what}` takes no `{f.word}`", f.at)
        for k in x.options:
            hint = known.get(k.name.name)
            if hint is None:
                help = did_you_mean(k.name.name, [*known]) or f"it has {', '.join(known)}"
                message = f"`{what}` has no option `{k.name.name}`"
                self.say(scope.source, "Q002", message, k.name.at, help)
                continue
            try:
                made[k.name.name] = convert(hint, k.value, scope.source)
            except BadValue as e:
                self.say(scope.source, e.code, f"`{k.name.name}`: {e.message}", e.at, e.help)
        return made

    def _revert(self, x: s.Step, scope: _Scope) -> tuple[p.PlanStep, ...]:
        made: list[p.PlanStep] = []
        if not x.operands:
            self.say(scope.source, "Q016", "`revert` what?", x.verb.at, "name a label")
        for o in x.operands:
            label = self._known_label(o, scope)
            if label:
                made.append(p.RevertStep(scope.labels[label]))
        return tuple(made)

    def _known_label(self, o: s.Expr, scope: _Scope) -> str | None:
        name = o.name if isinstance(o, s.Word) else expression_text(o)
        if name in scope.labels and isinstance(o, s.Word):
            if scope.verbs.get(name, 0) > 1:
                message = f"`{name}` stands {scope.verbs[name]} times"
                self.say(scope.source, "Q014", message, o.at, f"label one: `here: {name} ...`")
            return name
        help = did_you_mean(name, [*scope.labels]) or "a label is known from its step on"
        self.say(scope.source, "Q013", f"no step before this is called `{name}`", o.at, help)
        return None

    def _keep(self, x: s.Expr | None, step: s.Step, scope: _Scope) -> p.Keep | None:
        if x is None:
            return None
        if isinstance(x, s.Word) and x.name in ("faster", "smaller"):
            return p.Keep(x.name)
        if isinstance(x, s.Word):
            help = did_you_mean(x.name, ["faster", "smaller"]) or "faster, smaller, or a comparison"
            self.say(scope.source, "Q013", f"`keep if {x.name}` is not known", x.at, help)
            return None
        test = self._test(x, scope)
        return p.Keep(test) if test else None

    def _keep_step(
        self, x: s.Keep, scope: _Scope, made: Sequence[p.PlanStep]
    ) -> tuple[p.PlanStep, ...]:
        for k in x.options:
            self.say(scope.source, "Q002", f"`keep` has no option `{k.name.name}`", k.name.at)
        keep = self._keep(x.condition, s.Step(x.at, None, s.Word(x.at, "keep")), scope)
        if x.label is None:
            last = next((m for m in reversed(made) if isinstance(m, p.PassStep)), None)
            if last is None:
                self.say(scope.source, "Q016", "there is no step before this `keep`", x.at)
                return ()
            label: str | None = last.label
        else:
            label = self._known_label(x.label, scope)
        return (p.KeepStep(scope.labels[label], keep),) if keep and label else ()

    def _when(self, x: s.When, scope: _Scope) -> tuple[p.PlanStep, ...]:
        test = self._test(x.condition, scope)
        if test is not None and not any(True for _ in test.quantities()):
            always = test.evaluate(lambda q: 0.0)
            which = "always" if always else "never"
            self.say(scope.source, "Q016", f"this holds {which}: nothing in it is measured", x.at)
        then = self.steps(x.then, scope, goals=False)
        otherwise = self.steps(x.otherwise, scope, goals=False)
        return (p.WhenStep(test, then, otherwise),) if test else ()

    # Goals

    def _goal(self, x: s.Goal, scope: _Scope) -> None:
        if x.kind == "require":
            test = self._test(x.what, scope)
            if test:
                scope.requirements.append(test)
            return
        found = self._term(x.what, scope, None)
        if isinstance(found, tuple) and isinstance(found[0], p.Quantity):
            scope.goals.append(p.Goal(x.kind, found[0]))
            self._direction(x, found[0], scope)
        elif found is not None:
            self.say(scope.source, "Q013", f"`{x.kind}` takes one quantity", x.what.at)

    def _direction(self, x: s.Goal, q: p.Quantity, scope: _Scope) -> None:
        metric = self.metrics.get(q.name)
        lower = not metric[0].higher_is_better if metric else q.name in p.LOWER_IS_BETTER
        if (x.kind == "minimize") != lower:
            better = "lower" if lower else "higher"
            wanted = "minimize" if lower else "maximize"
            message = f"of `{q.name}` {better} is better"
            self.say(scope.source, "Q016", message, x.at, f"write `{wanted}`")

    def _test(self, x: s.Expr, scope: _Scope) -> p.Test | None:
        if not isinstance(x, s.Binary) or x.op not in ("<", "<=", ">", ">=", "==", "!="):
            help = "such as `latency(p50) <= 20ms`"
            self.say(scope.source, "Q013", f"`{expression_text(x)}` is no comparison", x.at, help)
            return None
        left = self._term(x.left, scope, None)
        about = next(p.quantities_of(left[0]), None) if left else None
        right = self._term(x.right, scope, about)
        if left is None or right is None:
            return None
        if about is None:
            about = next(p.quantities_of(right[0]), None)
            left = self._term(x.left, scope, about) or left
        if not fits(left[1], right[1]):
            message = f"one side measures {left[1]}, the other {right[1]}"
            self.say(scope.source, "Q015", message, x.at)
            return None
        return p.Test(x.op, left[0], right[0], left[1])

    def _term(
        self, x: s.Expr, scope: _Scope, about: p.Quantity | None
    ) -> tuple[p.Term, str] | None:
        """A side of a comparison and its dimension; `about` is what `baseline` is a baseline of."""
        if isinstance(x, s.Number):
            found = amount(x, scope.source)
            if isinstance(found, Amount):
                return found, found.dimension
            self.problems.append(found)
            return None
        if isinstance(x, s.Binary) and x.op in ("+", "-", "*", "/"):
            left = self._term(x.left, scope, about)
            right = self._term(x.right, scope, about)
            return self._arithmetic(x, left, right, scope) if left and right else None
        if isinstance(x, s.Word) and x.name in (p.BASELINE, p.BEFORE):
            if about is None:
                message = f"`{x.name}` of what? Compare it with a quantity"
                self.say(scope.source, "Q013", message, x.at, f"latency <= {x.name}")
                return None
            q = replace(about, version=x.name)
            return q, self._dimension(q)
        if isinstance(x, s.Word):
            return self._quantity(x, (), scope)
        if isinstance(x, s.Call) and not x.keywords and not x.mark:
            return self._quantity(x.name, x.arguments, scope)
        self.say(scope.source, "Q013", f"`{expression_text(x)}` is no quantity", x.at)
        return None

    def _arithmetic(
        self, x: s.Binary, left: tuple[p.Term, str], right: tuple[p.Term, str], scope: _Scope
    ) -> tuple[p.Term, str] | None:
        plain = ("number", "share")
        if x.op in "+-":
            if not fits(left[1], right[1]):
                message = f"{left[1]} {x.op} {right[1]} has no meaning"
                self.say(scope.source, "Q015", message, x.at)
                return None
            dimension = left[1]
        elif right[1] in plain:
            dimension = left[1]
        elif left[1] in plain and x.op == "*":
            dimension = right[1]
        elif x.op == "/" and left[1] == right[1]:
            dimension = "number"
        else:
            self.say(scope.source, "Q015", f"{left[1]} {x.op} {right[1]} has no meaning", x.at)
            return None
        return p.Arithmetic(x.op, left[0], right[0]), dimension

    def _dimension(self, q: p.Quantity) -> str:
        return p.QUANTITIES.get(q.name, "number")

    def _quantity(
        self, name: s.Word, arguments: Sequence[s.Expr], scope: _Scope
    ) -> tuple[p.Term, str] | None:
        known = [*p.QUANTITIES, *self.metrics]
        if name.name not in known:
            help = did_you_mean(name.name, known) or f"dfc measures {', '.join(p.QUANTITIES)}"
            self.say(scope.source, "Q013", f"no quantity is called `{name.name}`", name.at, help)
            return None
        detail, version = "", ""
        for a in arguments:
            word = a.name if isinstance(a, s.Word) else expression_text(a)
            if word in self._details(name.name):
                detail = word
            elif word in scope.labels and isinstance(a, s.Word):
                self._known_label(a, scope)
                version = scope.ends[word]
            elif word in (p.BASELINE, p.BEFORE):
                version = word
            else:
                can = [*scope.labels, *self._details(name.name)]
                help = did_you_mean(word, can) or "a label is known from its step on"
                self.say(scope.source, "Q013", f"`{name.name}` of `{word}`?", a.at, help)
                return None
        q = p.Quantity(name.name, detail, version)
        return q, self._dimension(q)

    def _details(self, quantity: str) -> Sequence[str]:
        """What may stand in a quantity's brackets beside a label."""
        if quantity == "latency":
            return p.PERCENTILES
        devices = self.target.devices if self.target and quantity == "peak_memory" else ()
        return [d.name for d in devices]

    # Targets

    def _target(self, recipe: s.Recipe, source: Source) -> p.Target | None:
        made = {name: self._made_target(t, src) for name, (t, src) in self.targets.items()}
        if recipe.target is None:
            return next(iter(made.values())) if len(made) == 1 else None
        found = made.get(recipe.target.name)
        if found is None:
            help = did_you_mean(recipe.target.name, [*made])
            message = f"there is no target `{recipe.target.name}`"
            self.say(source, "Q013", message, recipe.target.at, help)
        return found

    def _made_target(self, t: s.Target, source: Source) -> p.Target:
        devices: dict[str, p.Device] = {}
        links: list[p.Link] = []
        for part in t.parts:
            kind, facts = self._made(part.what, isinstance(part, s.Device), source)
            if isinstance(part, s.Device):
                if part.name.name in devices:
                    self.say(source, "Q014", f"a second device `{part.name.name}`", part.name.at)
                devices[part.name.name] = p.Device(part.name.name, kind, facts)
                continue
            for end in (part.source, part.sink):
                if end.name not in devices:
                    help = did_you_mean(end.name, [*devices])
                    message = f"no device before this is called `{end.name}`"
                    self.say(source, "Q013", message, end.at, help)
            links.append(p.Link(part.source.name, part.sink.name, part.both, kind, facts))
        return p.Target(t.name.name, tuple(devices.values()), tuple(links))

    def _made(self, x: s.Expr, device: bool, source: Source) -> tuple[str, dict[str, Any]]:
        """`cuda(mem=16GiB)` as a kind and its facts."""
        kind = x.name.name if isinstance(x, s.Call) else getattr(x, "name", "")
        known: Mapping[str, str] = _DEVICES.get(kind, {}) if device else _LINK
        if device and kind not in _DEVICES:
            help = did_you_mean(kind, [*_DEVICES]) or f"know: {', '.join(_DEVICES)}"
            self.say(source, "Q013", f"no kind of device is called `{kind}`", x.at, help)
        facts: dict[str, Any] = {}
        if not isinstance(x, s.Call):
            return kind, facts
        for a in x.arguments:
            self.say(source, "Q012", "facts have names", a.at, "write mem=16GiB")
        for k in x.keywords:
            name = k.name.name
            if name in ("dtypes",) and isinstance(k.value, s.Several):
                facts[name] = tuple(expression_text(i) for i in k.value.items)
                continue
            if known and name not in known:
                help = did_you_mean(name, [*known, "dtypes"]) or f"it has {', '.join(known)}"
                self.say(source, "Q002", f"`{kind}` has no `{name}`", k.name.at, help)
                continue
            if not isinstance(k.value, s.Number):
                self.say(source, "Q012", f"`{name}` is a number with a unit", k.value.at)
                continue
            found = amount(k.value, source)
            if not isinstance(found, Amount):
                self.problems.append(found)
            elif known and found.dimension != known[name]:
                message = f"`{name}` is {known[name]}, got {found.dimension}"
                self.say(source, "Q015", message, k.value.at)
            else:
                facts[name] = found
        return kind, facts

    # Whole recipes

    def _orders(self, steps: Sequence[p.PlanStep]) -> None:
        before: list[p.PassStep] = []
        for step in p._passes(steps):
            cls = pass_classes()[step.name]
            for earlier in before:
                if earlier.name in cls.not_after:
                    message = f"`{step.name}` cannot come after `{earlier.label}`"
                    self.problems.append(Diagnostic("Q016", message, step.span, "change the order"))
            before.append(step)

    def _needs(self, steps: Sequence[p.PlanStep]) -> None:
        if self.target is None:
            return
        for step in p._passes(steps):
            try:
                lacks = step.build({}).needs(self.target)
            except DfcError:
                continue  # a wrong option has been told
            if lacks:
                message = f"`{step.label}` needs what target `{self.target.name}` lacks: {lacks}"
                self.problems.append(Diagnostic("Q017", message, step.span))

    def _settings(
        self, steps: tuple[p.PlanStep, ...], settings: Mapping[str, str]
    ) -> tuple[p.PlanStep, ...]:
        """`--set label.option=value`."""
        from dfc.lang.reader import parse_expression

        for key, text in settings.items():
            label, _, option = key.rpartition(".")
            source = Source(text, f"--set {key}")
            chosen = [x for x in p._passes(steps) if label in (x.label, x.name)]
            if not chosen:
                known = [x.label for x in p._passes(steps)]
                near = did_you_mean(label, known) or f"steps: {', '.join(known)}"
                self.problems.append(
                    Diagnostic("Q013", f"--set: no step is called `{label}`", None, near)
                )
                continue
            cls = pass_classes()[chosen[0].name]
            fields = fields_of(cls)
            if option not in fields:
                help = did_you_mean(option, [*fields])
                message = f"--set: pass `{cls.name}` has no option `{option}`"
                self.problems.append(Diagnostic("Q002", message, None, help))
                continue
            try:
                x = parse_expression(source)
                value = self._value(cls, option, fields[option], x, label, _Scope(source))
            except BadValue as e:
                span = source.span(*e.at)
                self.problems.append(Diagnostic(e.code, f"`{option}`: {e.message}", span, e.help))
                continue
            except DfcError as e:
                self.problems += e.diagnostics
                continue
            steps = _set(steps, {x.label for x in chosen}, option, value)
        return steps


def _set(
    steps: Sequence[p.PlanStep], labels: set[str], option: str, value: Any
) -> tuple[p.PlanStep, ...]:
    made: list[p.PlanStep] = []
    for x in steps:
        if isinstance(x, p.PassStep) and x.label in labels:
            x = replace(x, options={**x.options, option: value})
        elif isinstance(x, p.WhenStep):
            then = _set(x.then, labels, option, value)
            x = replace(x, then=then, otherwise=_set(x.otherwise, labels, option, value))
        made.append(x)
    return tuple(made)


def _is_std(source: Source) -> bool:
    return any(f.source is source for f in std_files())


def _joined(operands: Sequence[s.Expr], hint: Any) -> s.Expr:
    """Several operands as one value: a list, or selectors joined by `|`."""
    from dfc.lang.selectors import is_selector

    first = operands[0]
    if "Selector" in str(hint) and all(map(is_selector, operands)):
        found = first
        for o in operands[1:]:
            found = s.Binary((first.at[0], o.at[1]), "|", found, o, depth=found.depth + o.depth)
        return found
    if len(operands) == 1 and not str(hint).startswith("tuple"):
        return first
    return s.Several((first.at[0], operands[-1].at[1]), tuple(operands))


def _all_rules(x: s.Step) -> bool:
    return all(isinstance(o, s.Call) and o.name.name == "rules" for o in x.operands)


def _first_label(steps: Sequence[p.PlanStep]) -> str | None:
    return next((x.label for x in p._passes(steps)), None)


def _last_label(steps: Sequence[p.PlanStep]) -> str | None:
    labels = [x.label for x in p._passes(steps)]
    return labels[-1] if labels else None
