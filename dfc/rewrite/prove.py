"""Is a rule right? Both sides on what its samples stand for, until an input breaks it.

R020  a rule without `applies` or `refuses`      R023  a sample under `refuses` that is rewritten
R021  a sample under `applies` that is refused    R024  the right side cannot be written
R022  the two sides differ                        R025  a sample that makes no graph
R026  a rule that takes too long to prove

`applies` samples are seeds: other sizes, ranks, element types and numbers than the sample's are
tried as well, since a rule applies wherever its conditions hold, not only where its author looked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any

from dfc.errors import DfcError, Diagnostic
from dfc.ir.expr import evaluate
from dfc.ir.graph import Graph, Value
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.lang import syntax as s
from dfc.rewrite.deciding import Facts, shown
from dfc.rewrite.match import Attempt, Compiled, Match, Refusal
from dfc.rewrite.pass_ import EXACT
from dfc.rewrite.prove_build import Choices, Left, build_left
from dfc.rewrite.prove_choices import choices_of
from dfc.rewrite.prove_inputs import BRIEF, QUICK, THOROUGH, Plan, constants, plans, tensor
from dfc.rewrite.prove_judge import Disagreement, disagreement, same
from dfc.rewrite.prove_report import counterexample
from dfc.rewrite.prove_run import RunBuilder
from dfc.rewrite.prove_sample import Case, Refused, Spec, Unbuildable, case_of
from dfc.rewrite.prove_sums import order_decides
from dfc.rewrite.prove_types import Variation, symbolic, variations
from dfc.rewrite.replace import Order, replace
from dfc.rewrite.rule import Rule, is_scoped

STRUCTURES = 24  # graphs of one pattern that are tried for the first sample; half for others
MAX_SECONDS = 30.0  # of processor time for one rule
MAX_SAMPLES = 32


@dataclass
class Tally:
    """How much was tried: sets of inputs on which both sides ran, graphs that the rule refused,
    and those on which the left side itself does not run."""

    inputs: int = 0
    graphs: int = 0
    refused: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Proof:
    """What became of a rule: `problems` is empty when it is right as far as anybody could find.

    Units:  seconds of processor time.
    """

    rule: Rule
    tally: Tally
    seconds: float
    problems: tuple[Diagnostic, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Trial:
    """One graph and one set of inputs, and what the two sides made of it."""

    rule: Rule
    left: Left
    case: Case
    variation: str
    plan: Plan
    inputs: Mapping[str, Any]
    right: Graph | None = None
    difference: Disagreement | None = None
    failure: str = ""  # of the right side


class _Wrong(Exception):
    """A counterexample."""

    def __init__(self, problem: Diagnostic) -> None:
        self.problem = problem


def prove(rule: Rule) -> Proof:
    """Try a rule on everything that its samples stand for; stop at the first input that breaks it.

    Cost:  about half a second for a rule of ten ops.
    """
    start = time.process_time()
    prover = _Prover(rule)
    problems = prover.run()
    return Proof(rule, prover.tally, time.process_time() - start, tuple(problems))


class _Prover:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.compiled = Compiled(rule)
        self.tally = Tally()
        self.start = time.process_time()

    def run(self) -> list[Diagnostic]:
        applies = [x for x in self.rule.samples if x.kind == "applies"]
        refuses = [x for x in self.rule.samples if x.kind == "refuses"]
        missing = [k for k, found in (("applies", applies), ("refuses", refuses)) if not found]
        problems = [
            self.problem("R020", f"the rule has no `{k}` sample", _HELP[k]) for k in missing
        ]
        if len(applies) + len(refuses) > MAX_SAMPLES:
            problems.append(self.problem("R026", f"the rule has more than {MAX_SAMPLES} samples"))
        for sample in (*applies, *refuses)[:MAX_SAMPLES]:
            try:
                case = case_of(sample)
                self.applies(sample, case) if sample.kind == "applies" else self.refuses(
                    sample, case
                )
            except Unbuildable as e:
                problems.append(self.problem("R025", str(e), None, sample.at))
            except _Wrong as e:
                problems.append(e.problem)
                if e.problem.code in ("R022", "R024", "R026"):
                    break
        return problems

    def problem(
        self, code: str, message: str, help: str | None = None, at: s.At | None = None
    ) -> Diagnostic:
        span = self.rule.source.span(*(at or self.rule.at))
        return Diagnostic(code, f"rule `{self.rule.name}`: {message}", span, help)

    # Samples

    def applies(self, sample: s.Sample, case: Case) -> None:
        """The sample itself in every structure, then all that it stands for."""
        first: dict[str, int] | None = None
        others: list[dict[str, int]] = []
        refusals: list[tuple[int, Refusal | str]] = []
        data = constants(case, Plan("random inputs", seed=1))
        main = sample.at == self.rule.samples[0].at
        limit = STRUCTURES if main else STRUCTURES // 2
        for wanted, built in choices_of(self.rule, case, data, limit):
            if isinstance(built, Unbuildable):
                refusals.append((0, str(built)))
                continue
            full = built.used >= case.keys()
            care = THOROUGH if first is None and full else BRIEF
            found = self.structure(Variation("", case, care), wanted)
            if found is not None:
                refusals.append((1 + full, found))
            elif full and first is None:
                first = wanted
            else:
                others.append(wanted)
        if first is None:
            raise _Wrong(self.not_applied(sample, refusals))
        self.elsewhere(case, first, others, main)

    def not_applied(
        self, sample: s.Sample, refusals: Sequence[tuple[int, Refusal | str]]
    ) -> Diagnostic:
        """The sample never applies: the reason of the graph that came closest."""
        rank, found = max(refusals, key=lambda r: r[0], default=(0, "nothing matches"))
        if rank == 2 and isinstance(found, str):
            message = f"the right side cannot be written: {found}"
            return self.problem("R024", message, None, sample.at)
        why = found.reason if isinstance(found, Refusal) else found
        if rank == 1:
            why = f"no graph of the pattern uses all that it gives, and of the others: {why}"
        return self.problem(
            "R021", f"the sample should apply and is refused: {why}", None, sample.at
        )

    def elsewhere(
        self, case: Case, first: dict[str, int], others: list[dict[str, int]], main: bool
    ) -> None:
        """What the sample stands for, in the first structure; every third in another as well, and
        other element types in each that differs from it in one choice of ops.

        Of samples beyond the first, half: they show other structures.
        """
        rest = others[1::5][:3] or others[:1]
        apart = [o for o in others if len(o) == 1 and not next(iter(o)).endswith("~")]
        for i, variation in enumerate((*variations(case), *symbolic(case))):
            if not main and (i % 2 or variation.ranges):
                continue
            self.structure(variation, first)
            if rest and not variation.ranges and (variation.care != QUICK or i % 3 == 0):
                self.structure(variation, rest[i % len(rest)])
            if variation.care != QUICK:
                for other in apart:
                    self.structure(replaced(variation, care=QUICK), other)

    def refuses(self, sample: s.Sample, case: Case) -> None:
        """Every structure that uses all of the sample must be refused, by a condition or an op."""
        data = constants(case, Plan("random inputs", seed=1))
        tried = 0
        why = "no graph of the pattern uses all that it gives"
        for _, built in choices_of(self.rule, case, data, STRUCTURES):
            if isinstance(built, Unbuildable):
                tried += isinstance(built, Refused)
                why = str(built)
                continue
            if not built.used >= case.keys():
                continue
            tried += 1
            if not isinstance(self.rewritten(built), Graph):
                self.tally.refused += 1
                continue
            problem = self.problem(
                "R023",
                "the sample is rewritten, and should be refused",
                "say in `where` what the sample lacks, or take the sample out",
                sample.at,
            )
            raise _Wrong(replaced(problem, notes=self.bound(built)))
        if not tried:
            raise Unbuildable(f"the sample shows nothing: {why}")

    def bound(self, left: Left) -> tuple[str, ...]:
        """What each name stood for: a commutative op may have given them otherwise than meant."""
        match = self.match(left)
        names = match.env.items() if match is not None else ()
        return tuple(f"`{name}` is {shown(x)}" for name, x in names if not is_scoped(name))

    # One graph

    def structure(self, variation: Variation, wanted: Mapping[str, int]) -> Refusal | str | None:
        """Try one graph on many inputs; why it does not come to that, if it does not."""
        if time.process_time() - self.start > MAX_SECONDS:
            message = f"the proof takes more than {MAX_SECONDS:.0f} s"
            help = "make the samples smaller, or make several rules of it"
            raise _Wrong(self.problem("R026", message, help))
        folds = any(isinstance(g, Spec) and g.constant for g in variation.case.values())
        sides: tuple[Left, Graph] | None = None
        for plan in self.plans(variation):
            if sides is not None and folds:
                sides = self.with_other_constants(sides, variation, plan)
            if sides is None:
                found = self.sides(variation, wanted, plan)
                if not isinstance(found, tuple):
                    if plan.seed == 1:  # later ones have other constants
                        return found
                    continue
                sides = found
            self.run_plan(variation, *sides, plan)
        return None

    def sides(
        self, variation: Variation, wanted: Mapping[str, int], plan: Plan
    ) -> tuple[Left, Graph] | Refusal | str:
        """Both sides as graphs, or why there are none."""
        data = constants(variation.case, plan, variation.sizes[0])
        strict = bool(variation.label)
        try:
            left = build_left(
                self.rule, variation.case, Choices(wanted), data, variation.ranges, strict
            )
        except Unbuildable as e:
            self.tally.skipped += 1
            return str(e)
        check = variation.care == THOROUGH or bool(variation.ranges)
        right = self.rewritten(left, check)
        if not isinstance(right, Graph):
            self.tally.refused += 1
            return right
        self.tally.graphs += 1
        return left, right

    def with_other_constants(
        self, sides: tuple[Left, Graph], variation: Variation, plan: Plan
    ) -> tuple[Left, Graph] | None:
        """The same graphs with other numbers, where the right side depends on them by reading
        alone; None where everything must be done anew."""
        left, right = sides
        known = left.graph.parameters
        if right.parameters.keys() - known.keys() or any(
            p.tensor_type.numel == 1 for p in known.values()
        ):
            return None
        data = constants(variation.case, plan, variation.sizes[0])
        for graph in (left.graph, right):
            for name, p in graph.parameters.items():
                if name in data:
                    p.data = TensorData(name, data[name])
        return sides if self.match(left) is not None else None

    def match(self, left: Left) -> Match | None:
        node = left.roots[self.rule.roots[0]].node
        assert node is not None
        return Attempt(self.compiled, left.graph, Facts(left.graph), explain=False).run(node)

    def plans(self, variation: Variation) -> Iterator[Plan]:
        names: dict[str, TensorType] = {}
        for name, g in variation.case.items():
            if isinstance(g, Spec):
                names[name] = g.type
        yield from plans(names, variation.care)

    def rewritten(self, left: Left, check: bool = True) -> Graph | Refusal | str:
        """A copy of the graph with the rule applied, why it does not match, or why the right side
        cannot be written. With `check`, its types are inferred once more."""
        graph, twin = left.graph.copy_with_map()
        node = twin[left.roots[self.rule.roots[0]]].node
        assert node is not None
        tried = Attempt(self.compiled, graph, Facts(graph), explain=True)
        match = tried.run(node)
        if match is None:
            return tried.refusal or Refusal(self.rule, 0, "nothing matches")
        done = replace(match, graph, Order(graph), {}, RunBuilder)
        if isinstance(done, str):
            return done
        try:
            verify(graph, types=done.made if check else False)
        except DfcError as e:
            if _is_valid(left.graph):
                wrong = self.problem("R024", f"the right side is no graph: {e.message}")
                raise _Wrong(wrong) from e
            return e.message  # sizes in symbols that the left side does not take, either
        return graph

    def run_plan(self, variation: Variation, left: Left, right: Graph, plan: Plan) -> None:
        for sizes in variation.sizes:
            inputs = _inputs(left, plan, sizes)
            if inputs is None:
                self.tally.skipped += 1
                continue
            try:
                expected = interpret(left.graph, list(inputs.values()))
            except DfcError:
                self.tally.skipped += 1
                continue
            trial = Trial(self.rule, left, variation.case, variation.label, plan, inputs, right)
            try:
                got = interpret(right, list(inputs.values()))
            except DfcError as e:
                raise _Wrong(counterexample(trial, failure=e.message)) from None
            self.tally.inputs += 1
            if same(got, expected):
                continue
            witness = expected if self.rule.claim == EXACT else self.witness(left, inputs, expected)
            found = disagreement(got, expected, witness, self.rule.claim)
            if found is None:
                continue
            sums = self.rule.claim != EXACT and plan.finite
            if sums and order_decides(left.graph, list(inputs.values())):
                self.tally.skipped += 1
            else:
                raise _Wrong(counterexample(trial, difference=found))

    def witness(self, left: Left, inputs: Mapping[str, Any], expected: Sequence[Any]) -> Any:
        try:
            return interpret(left.graph, list(inputs.values()), double=True)
        except DfcError:  # an op that float64 does not have, and that mixes with others
            return expected


def _is_valid(graph: Graph) -> bool:
    try:
        verify(graph)
    except DfcError:
        return False
    return True


_HELP = {
    "applies": "give one: `applies x: f32[2, 8]`; it is what the proof starts from",
    "refuses": "give one that looks alike and must be left alone, and say why in a comment",
}


def _inputs(left: Left, plan: Plan, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The tensors that a plan gives to the graph's inputs."""
    found: dict[str, Any] = {}
    for i, v in enumerate(left.graph.inputs):
        assert isinstance(v.type, TensorType)
        shape = [int(evaluate(d, sizes)) for d in v.type.shape]  # type: ignore[arg-type]
        found[v.name] = tensor(_named(v, plan), v.type, shape, plan, i)
    return found


def _named(v: Value, plan: Plan) -> str:
    """The name under which a plan knows an input: `rest` for `rest_1`."""
    base = v.name.rpartition("_")[0]
    return base if base in plan.kinds and v.name not in plan.kinds else v.name
