"""Runs passes and keeps their promises: validity, timing, proof, blame, undoing what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rewrite.pass_ import EXACT, Context, Numerics, Pass
from dfc.rewrite.promises import FAULTS, run_checked, weaker
from dfc.rewrite.verdicts import LeftOut, Outcome, PassReport

if TYPE_CHECKING:
    from dfc.rewrite.blame import Fault, Proof, Wrong

VERIFY = ("none", "end", "each")

PrintAfter = Callable[[str, Graph], None]
Say = Callable[[str], None]


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    probes: Any = None,
    mode: str = "each",
    strict: bool = False,
    print_after: PrintAfter | None = None,
    ctx: Context | None = None,
    numerics: Numerics = EXACT,
    atol: float = 0.0,
    rtol: float = 0.0,
    samples: int | None = None,
    on_fault: Callable[[Fault], str] | None = None,
    say: Say | None = None,
) -> Outcome:
    """Run passes on a copy of the graph. `numerics` is what was promised before them.

    With probes and the mode "each", a rewrite that changes results, fails, or leaves an invalid
    graph is found, left out, and told in the report; the pass goes on with the rest.
    Needs:   a valid graph; `probes` (dfc.rewrite.probe.Probes) unless the mode is "none". Without
             them, passes run unproved and say so. `atol` and `rtol` are what the user allows beside
             what the passes promise; `samples` how many probes are run. `on_fault` writes a
             reproducer and says where.
    Raises:  DfcError V030 (status 4) under `strict` when a pass is wrong; where nothing is proved,
             V031, V032 and V034 (status 1) for a pass that breaks a graph, lies, or fails.
    """
    if mode not in VERIFY:
        raise DfcError("Q004", f"verify is one of {', '.join(VERIFY)}, got `{mode}`")
    ctx = ctx or Context()
    if probes is not None and not ctx.examples:
        ctx = replace(ctx, examples=tuple(p.inputs for p in probes.probes))
    run = _Run(ctx, numerics, strict, print_after, on_fault, say or (lambda what: None))
    if probes is None or mode == "none":
        return run.unproved(graph, passes, probes)
    from dfc.rewrite.blame import Proof

    proof = Proof(probes, atol, rtol, samples)
    for _ in probes.ready(samples):  # before any pass can have touched what the original reads
        pass
    if mode == "end":
        return run.at_end(graph, passes, proof)
    return run.each(graph, passes, proof)


@dataclass
class _Run:
    """What stays the same over the passes of one call."""

    ctx: Context
    numerics: Numerics
    strict: bool
    print_after: PrintAfter | None
    on_fault: Callable[[Fault], str] | None
    say: Say

    def unproved(self, graph: Graph, passes: Sequence[Pass], probes: Any) -> Outcome:
        """Run them all on one copy; what is wrong is an error."""
        current = graph.copy()
        reports: list[PassReport] = []
        promised = self.numerics
        for p in passes:
            reports.append(run_checked(p, current, self.ctx))
            promised = weaker(promised, p.numerics) if reports[-1].changes else promised
            if self.print_after:
                self.print_after(str(p), current)
        return Outcome(current, reports, probes, promised, list(passes))

    def at_end(self, graph: Graph, passes: Sequence[Pass], proof: Proof) -> Outcome:
        """One proof for all passes; when it fails, run again with a proof after each."""
        products = _fork(self.ctx.products)
        try:
            found = self.unproved(graph, passes, proof.probes)
        except DfcError as e:
            if e.code not in FAULTS:
                raise
            found = None
        if found is not None:
            if found.numerics.kind == "changes" or not any(r.changes for r in found.reports):
                return found
            error = proof.judge(found.graph, found.numerics)
            if isinstance(error, float):
                found.reports = [
                    replace(r, verdict="proved", error=error) if r.changes else r
                    for r in found.reports
                ]
                return found
        _restore(self.ctx, products)
        self.say("something is wrong: running the passes again, with a proof after each")
        self.print_after = None
        return self.each(graph, passes, proof)

    def each(self, graph: Graph, passes: Sequence[Pass], proof: Proof) -> Outcome:
        """A proof after each pass."""
        current = graph.copy()
        outcome = Outcome(current, [], proof.probes, self.numerics)
        for p in passes:
            self._one(p, outcome, proof)
            if self.print_after:
                self.print_after(str(p), outcome.graph)
        return outcome

    def _one(self, p: Pass, outcome: Outcome, proof: Proof) -> None:
        """Run one pass, prove it, and leave out what is wrong."""
        from dfc.rewrite.blame import Wrong, said

        before, products = outcome.graph.copy(), _fork(self.ctx.products)
        promised = weaker(outcome.numerics, p.numerics)
        try:
            report = run_checked(p, outcome.graph, self.ctx)
        except DfcError as e:
            if e.code not in FAULTS or (self.strict and e.status != 1):
                raise  # the user's own code, told with its line
            return self._blame(p, outcome, before, products, proof, Wrong(said(e)), None)
        if not report.changes:
            outcome.passes.append(p)
            outcome.reports.append(report)
            return None
        if promised.kind == "changes":
            report = replace(report, reason="it changes results on purpose")
        else:
            self.say(f"proving `{p.name}`")
            found = proof.judge(outcome.graph, promised)
            if isinstance(found, Wrong):
                return self._blame(p, outcome, before, products, proof, found, report)
            report = replace(report, verdict="proved", error=found)
        outcome.numerics = promised
        outcome.passes.append(p)
        outcome.reports.append(report)
        return None

    def _blame(
        self,
        p: Pass,
        outcome: Outcome,
        before: Graph,
        products: dict[str, Any],
        proof: Proof,
        wrong: Wrong,
        report: PassReport | None,
    ) -> None:
        """Find what is wrong in a pass and go on without it, or without the pass."""
        from dfc.rewrite.blame import Blame

        outcome.graph = before
        _restore(self.ctx, products)
        blame = Blame(
            p, before, self.ctx, products, proof, outcome.numerics, self.say, self.on_fault,
            self.strict,
        )  # fmt: skip
        settled = blame.settle(wrong)
        left_out = tuple(blame.left_out)
        if isinstance(settled, LeftOut) or not settled.changes:
            last = left_out[-1]
            where = f"{last.what}: " if last.number >= 0 else ""
            outcome.reports.append(
                PassReport(
                    str(p), report.changes if report else 0, len(before), len(before),
                    report.ms if report else 0.0, "reverted", f"{where}{last.reason}",
                    wrong.error, left_out=left_out,
                )
            )  # fmt: skip
            return
        assert settled.report is not None
        outcome.graph = settled.graph
        self.ctx.products.clear()
        self.ctx.products.update(settled.products)
        outcome.numerics = weaker(outcome.numerics, settled.step.numerics)
        outcome.passes.append(settled.step)
        proved = settled.error is not None
        outcome.reports.append(
            replace(
                settled.report, step=str(p), verdict="proved" if proved else "unproved",
                reason=_left_out_text(left_out), error=settled.error, applied=str(settled.step),
                left_out=left_out,
            )
        )  # fmt: skip


def _left_out_text(left_out: Sequence[LeftOut]) -> str:
    first = left_out[0]
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return f"left out {first.what}{more}, which is wrong: {first.reason}"


def _fork(products: dict[str, Any]) -> dict[str, Any]:
    """What passes have made so far, so that what one of them adds can be taken back."""
    return {k: copy.copy(v) for k, v in products.items()}


def _restore(ctx: Context, products: dict[str, Any]) -> None:
    ctx.products.clear()
    ctx.products.update(_fork(products))


__all__ = ["VERIFY", "LeftOut", "Outcome", "PassReport", "run_passes"]
