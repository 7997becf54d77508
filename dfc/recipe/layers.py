"""`dfc.sensitivity`: what each lossy step of a recipe costs, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph
from dfc.recipe.bench import find_engine
from dfc.recipe.metrics import UserMetric, bind_one
from dfc.recipe.plan import PassStep, Plan
from dfc.recipe.sensitivity import Measuring, Sensitivity, why_not
from dfc.recipe.sources import plan_of
from dfc.report import Report
from dfc.rewrite.driver import run_passes
from dfc.rewrite.journal import user_journal
from dfc.rewrite.pass_ import Context, Pass

Say = Callable[[str], None]


def sensitivity(
    model: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    recipe: Any,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    metric: str | None = None,
    step: str | None = None,
    engine: str = "eager",
    times: bool = True,
    progress: Say | None = None,
) -> list[Sensitivity]:
    """What each lossy step of a recipe costs when one layer alone gets it: one table for each.

    Each step is measured on the graph as the exact steps before it leave it; other lossy steps are
    left out. `metric` names one of the recipe's metrics, by default the one that is passed; without
    any, results are compared with the graph's own: relative error, cosine, and for outputs that are
    logits the KL divergence. `step` is a label, when only one is wanted. `times` of a layer are
    measured on `engine`, once for each shape. What was measured is kept, and a second run goes on.
    Raises:  DfcError Q052 when no step changes results, Q051 for a metric that is not there,
             D085 without anything to run on; whatever data, metrics and steps raise.
    """
    import dfc.capture.torch_export as capture

    say = progress or (lambda what: None)
    plan = plan_of(recipe)
    chosen = _metric(plan, metric, metrics or {}, data or {})
    say("tracing")
    graph = (
        model
        if isinstance(model, Graph)
        else capture.trace(model, args or (), kwargs, dynamic_shapes)
    )
    ctx = Context(
        target=plan.target, data=data or {}, journal=user_journal(),
        examples=_examples(graph, args, kwargs),
    )  # fmt: skip
    found: list[Sensitivity] = []
    runner = find_engine(engine)

    def build(part: Graph) -> Any:
        return runner.build(with_state_inputs(part), "cpu")

    def run(version: Graph) -> Compiled:
        return Compiled(version, runner, build(version), Report(), device="cpu")

    for label, p, before in _lossy(plan, graph, ctx, step, say):
        measuring = Measuring(
            before, p, ctx, say, chosen, run if chosen else None, build if times else None, engine
        )
        found.append(replace(measuring.measured(), label=label))
    return found


def _examples(graph: Graph, args: Any, kwargs: Any) -> tuple[list[Any], ...]:
    """The flat example, where there is one that can be run."""
    if args is None and kwargs is None:
        return ()
    import torch

    from dfc.calling import flat_inputs

    inputs = flat_inputs(graph, tuple(args or ()), dict(kwargs or {}))
    return () if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs) else (inputs,)


def _metric(
    plan: Plan, name: str | None, metrics: Mapping[str, Any], data: Mapping[str, Any]
) -> UserMetric | None:
    wanted = name or next(iter(metrics), None)
    if wanted is None:
        return None
    declared = plan.metric(wanted)
    if declared is None:
        known = [m.name for m in plan.metrics]
        message = f"the recipe declares no metric `{wanted}`"
        help = did_you_mean(wanted, known) or f"write `metric {wanted} on val, higher is better`"
        raise DfcError("Q051", message, help=help)
    return bind_one(declared, metrics, data)


def _lossy(
    plan: Plan, graph: Graph, ctx: Context, label: str | None, say: Say
) -> Iterator[tuple[str, Pass, Graph]]:
    """Lossy steps, each with the graph that the exact steps before it make."""
    steps = list(plan.passes())
    lossy = [s for s in steps if why_not(s.build({})) is None]
    wanted = lossy if label is None else [s for s in steps if s.label == label]
    if not wanted or (label is not None and wanted[0] not in lossy):
        raise _nothing_to_measure(steps, lossy, label)
    current = graph
    for s in steps:
        p = s.build({})
        if s in lossy:
            if s in wanted:
                yield s.label, p, current
        elif p.numerics.kind != "changes":
            say(f"step {s.label}")
            current = run_passes(current, [p], mode="none", ctx=ctx).graph


def _nothing_to_measure(
    steps: Sequence[PassStep], lossy: Sequence[PassStep], label: str | None
) -> DfcError:
    known = [s.label for s in lossy]
    if label is not None:
        found = next((s for s in steps if s.label == label), None)
        why = why_not(found.build({})) if found else None
        message = f"`{label}`: {why}" if why else f"the recipe has no step `{label}`"
        return DfcError("Q052", message, help=did_you_mean(label, known))
    help = "sensitivity is measured of steps such as `quantize`, `sparsify`, `prune` and `autocast`"
    return DfcError("Q052", "no step of the recipe changes results on purpose", help=help)
