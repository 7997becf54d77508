"""Give every node a stage: one graph over several devices, cut where that costs least."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rewrite.pass_ import EXACT, Context, Pass

if TYPE_CHECKING:
    from dfc.planning.machine import Machine
    from dfc.planning.pipeline import Plan

PLAN = "plan"  # what the pass leaves among its context's products


@dataclass(frozen=True)
class Partition(Pass):
    """Cut the graph into stages, one or several a device, and plan which runs when.

    `on` names the devices of the target that may be used; without a target, those of this host:
    `gpu0`, `gpu1`, ..., and `host`. A device that is named twice is two stages with half of it
    each. Not all of them are used where fewer are better.

    `by time` (or `throughput`) makes the time between two microbatches small, `by latency` the time
    of one, `by memory` the bytes of the device that holds most, `by cost` the devices' seconds,
    each weighed with the `price` that the target gives it. `pin "layers.0.**" to gpu0` and
    `colocate "embed", "head"` before it are respected.

    A device may have several stages: `with train=true, schedule=interleaved, stages_per_device=2`.
    `interleaved`, `breadth_first` and `interleaved_zb` have any number, `zb_v` and `dualpipe_v`
    two, the others one; `auto` takes what the simulation says is quickest.

    With `train=true` stages may keep less and run their forward again, or its cheap operators:
    `recompute=always`, `selective`, or `auto`, where as few do as leave devices room.

    Needs:    figures of the devices: a target's, a known device's, or rough ones of this host.
    Ensures:  every node has a stage; nothing reads what a later stage makes; each stage fits its
              device; the plan is among the products, and `plan.json` in the package.
    Keeps:    the graph, but for the stages.
    Cost:     seconds for thousands of nodes; a wide graph takes up to 15 s for its bound.
    Raises:   DfcError N040.. for sizes, devices and links; N060 (status 6) when it does not fit;
              N063 when nothing keeps to what is pinned and colocated; N066..N068 for a schedule
              with another number of stages a device, or more stages than the model has parts.
    """

    name = "partition"
    numerics = EXACT
    phrases = {"on": "devices", "by": "by"}  # noqa: RUF012

    devices: tuple[str, ...] = ()  # those that may be used; all of the target's when none is named
    by: Literal["time", "throughput", "latency", "memory", "cost"] = "time"
    max_stages: int | None = None
    microbatches: int = 8  # of one step
    schedule: str = "auto"
    stages_per_device: int | None = None  # as the schedule has them, or as is best
    train: bool = False  # backward passes and optimizer state are planned as well
    recompute: Literal["never", "auto", "selective", "always"] = "never"
    sizes: tuple[str, ...] = ()  # "B=4": sizes of one microbatch; else those of the example

    def needs(self, target: Any) -> str | None:
        known = [d.name for d in target.devices]
        missing = next((name for name in self.devices if name not in known), None)
        return None if missing is None else f"no device `{missing}`: it has {', '.join(known)}"

    def run(self, graph: Graph, ctx: Context) -> int:
        if not len(graph):
            return 0
        plan = self._plan(graph, ctx)
        ctx.products[PLAN] = plan
        _tell(plan, ctx)
        changes = 0
        for node, stage in zip(graph.nodes, plan.partition.stage, strict=True):
            if node.stage != stage:
                graph.set_stage(node, stage)
                changes += 1
        return changes

    def _plan(self, graph: Graph, ctx: Context) -> Plan:
        from dfc.passes.colocate import TOGETHER
        from dfc.passes.pin import PINS
        from dfc.planning.devices import wanted
        from dfc.planning.limits import limits_of
        from dfc.planning.model import Wish
        from dfc.planning.pipeline import plan

        wishes = ctx.products.get(PINS, ()), ctx.products.get(TOGETHER, ())
        wish = Wish(self.microbatches, self.train, recompute=self.recompute)
        return plan(
            graph, self._machine(ctx.target), sizes=self._sizes(graph, ctx), wish=wish,
            schedule=self.schedule, stages_per_device=self.stages_per_device,
            max_stages=self.max_stages, objective=wanted(self.by),
            limits=limits_of(graph, *wishes, left=True),
        )  # fmt: skip

    def _machine(self, target: Any) -> Machine:
        from dfc.planning.here import here
        from dfc.planning.machine import Machine

        if target is None:
            machine = here()
        else:
            machine = target if isinstance(target, Machine) else target.machine()
        return machine.only(self.devices) if self.devices else machine

    def _sizes(self, graph: Graph, ctx: Context) -> Mapping[str, int]:
        from dfc.ir.interpret import bind_inputs

        given = bind_inputs(graph, ctx.examples[0]) if ctx.examples else {}
        found = {name: size for name, size in given.items() if name in graph.ranges}
        for text in self.sizes:
            match = re.fullmatch(r"(\w+)=(\d+)", text)
            if match is None:
                raise DfcError("N040", f"`{text}` is no size", help='write sizes=["B=4", "S=128"]')
            found[match[1]] = int(match[2])
        return found


def _tell(plan: Plan, ctx: Context) -> None:
    """The plan in the report, and the reason for each node to whoever asks."""
    from dfc.planning.wording import summary

    ctx.note(f"partition: {summary(plan)}")
    if plan.no_pipeline:
        ctx.note(f"partition: these stages cannot be run as a pipeline: {plan.no_pipeline}")
    if ctx.asked:
        from dfc.planning.reasons import reasons

        for node, reason in reasons(plan).items():
            ctx.decided(node, reason.outcome, reason.text)
