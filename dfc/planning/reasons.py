"""Why each node of a plan is on its stage, and why stages end where they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dfc.ir.graph import Node
from dfc.lang.units import amount_text
from dfc.planning.model import Modelled
from dfc.planning.problem import loads, why_not

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan


@dataclass(frozen=True)
class Reason:
    """What became of a node: `placed` where its neighbours are, or `cut` off from what it reads."""

    outcome: str
    text: str


def reasons(plan: Plan) -> dict[Node, Reason]:
    """The reason for every node of a plan that was just made.

    Cost:  one pricing of the partition for each node behind a cut.
    """
    assert plan.modelled is not None, "a plan that was read does not know what else was tried"
    told = _Told(plan, plan.modelled)
    found: dict[Node, Reason] = {}
    for g, nodes in enumerate(plan.modelled.groups):
        first, *rest = nodes
        found[first] = told.of_group(g)
        found.update((n, told.placed(g)) for n in rest)
    return found


class _Told:
    def __init__(self, plan: Plan, model: Modelled) -> None:
        self.plan, self.model = plan, model
        stage = dict(zip(plan.graph.nodes, plan.partition.stage, strict=True))
        self.stage = [stage[nodes[0]] for nodes in model.groups]
        self.load = loads(model.problem, self.stage)
        self.before: dict[int, list[tuple[int, float]]] = {}  # what each group reads, and bytes
        for t in model.problem.tensors:
            for v in t.readers:
                self.before.setdefault(v, []).append((t.producer, t.bytes))
        self.together = {v for group in model.problem.together for v in group}

    def placed(self, g: int) -> Reason:
        s = self.plan.stages[self.stage[g]]
        wish = self._wish(g)
        share = f"{amount_text(s.seconds, 'time')} a microbatch"
        if len(self.plan.stages) == 1:
            return Reason("placed", f"{wish}stage 0 on `{s.device}`, the only one: {share}")
        most = amount_text(self.plan.bottleneck, "time")
        slowest = "the slowest device" if self.model.problem.looped else "the slowest"
        return Reason(
            "placed", f"{wish}stage {s.index} on `{s.device}`: {share}, {slowest} takes {most}"
        )

    def _wish(self, g: int) -> str:
        if g in self.model.problem.pins:
            return "pinned: "
        return "kept together with others: " if g in self.together else ""

    def of_group(self, g: int) -> Reason:
        """A group that reads from another stage says what the cut costs, and what else would."""
        mine = self.stage[g]
        crossing = [(u, size) for u, size in self.before.get(g, ()) if self.stage[u] != mine]
        if not crossing:
            return self.placed(g)
        device = self.plan.stages[mine].device
        sent = sum(size for _, size in crossing)
        come = sorted({self.stage[u] for u, _ in crossing})
        source = " and ".join(map(str, come))
        text = (
            f"{self._wish(g)}stage {mine} on `{device}` begins here: it gets "
            f"{amount_text(sent, 'bytes')} from stage {source}"
        )
        others = [self._moved(g, mine, max(come)), self._back(g, mine, max(come))]
        return Reason("cut", "; ".join([text, *filter(None, others)]))

    def _moved(self, g: int, mine: int, to: int) -> str:
        """What it would be with this group, and all that it needs, one stage earlier."""
        group = self._closure(g, mine, to, self._needs)
        return self._compared(group, to, "in", f"stage {to}")

    def _back(self, g: int, mine: int, source: int) -> str:
        """What it would be with what this group reads moved here."""
        producers = [u for u, _ in self.before[g] if self.stage[u] == source]
        group = {v for u in producers for v in self._closure(u, source, mine, self._readers)}
        return self._compared(group, mine, "with what it reads in", f"stage {mine}")

    def _closure(self, g: int, mine: int, to: int, near: object) -> set[int]:
        found, waiting = {g}, [g]
        while waiting:
            for u in near(waiting.pop(), mine, to):  # type: ignore[operator]
                if u not in found:
                    found.add(u)
                    waiting.append(u)
        return found

    def _needs(self, g: int, mine: int, to: int) -> Iterator[int]:
        yield from (u for u, _ in self.before.get(g, ()) if self.stage[u] > to)

    def _readers(self, g: int, mine: int, to: int) -> Iterator[int]:
        for t in self.model.problem.tensors:
            if t.producer == g:
                yield from (v for v in t.readers if self.stage[v] < to)

    def _compared(self, group: set[int], to: int, how: str, where: str) -> str:
        other: Sequence[int] = [to if v in group else s for v, s in enumerate(self.stage)]
        problem = self.model.problem
        refused = why_not(problem, other)
        if refused is not None:
            return f"{how} {where}, {refused}"
        was, now = self.load.bottleneck, loads(problem, other)
        slow = int(np.argmax(now.busiest))
        at = f"at stage {slow}"
        if problem.looped:
            at = f"on `{self.plan.machine.devices[slow].name}`"
        took = f"{amount_text(now.bottleneck, 'time')} a microbatch {at}"
        worse = "instead of" if now.bottleneck > was else "no better than"
        return f"{how} {where} it would take {took}, {worse} {amount_text(was, 'time')}"
