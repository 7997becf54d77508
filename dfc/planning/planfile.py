"""A plan as `plan.json`: everything a runtime needs besides the graph, whose nodes carry their
stages. What is read is believed only after it agrees with the graph and with itself.

D060  it cannot be read            D062  it is not a plan of this graph
D061  another schema               D063  it contradicts itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import inf, isclose
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.actions import Program, of_rows, parse_program
from dfc.planning.check import check
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import Plan, Stage
from dfc.planning.problem import Partition
from dfc.planning.simulate import Costs, Link

SCHEMA = 1
_LAST = "let `partition` be the last step: what comes behind it may make and move nodes"


def to_text(plan: Plan) -> str:
    """Canonical JSON: equal plans have equal texts. What is without a limit is null."""
    return json.dumps(data_of(plan), indent=1, sort_keys=True, allow_nan=False) + "\n"


def data_of(plan: Plan) -> dict[str, Any]:
    costs, program = plan.costs, plan.program
    return {
        "schema": SCHEMA,
        "model": plan.name,
        "sizes": dict(plan.sizes),
        "wish": asdict(plan.wish),
        "objective": plan.objective,
        "bottleneck": plan.bottleneck,
        "latency": plan.latency,
        "machine": _machine_data(plan.machine),
        "stages": [_finite(asdict(s)) for s in plan.stages],
        "partition": {
            "value": plan.partition.value,
            "bound": plan.partition.bound,
            "method": plan.partition.method,
        },
        "costs": {
            "forward": _floats(costs.forward),
            "inputs": _floats(costs.inputs),
            "weights": _floats(costs.weights),
            "edges": [list(e) for e in costs.all_edges()],
            "links": [[a, b, float(x.latency), float(x.per_byte)]
                      for (a, b), x in sorted(costs.links.items())],
            "activations": list(costs.activations),
            "resident": list(costs.resident),
            "taken": list(costs.taken),
            "kept": list(costs.kept),
            "remade": list(costs.remade),
            "remake": _floats(costs.remake),
            "slots": costs.slots,
        },
        "program": {
            "name": program.name,
            "placement": list(program.placement),
            "ranks": str(program).splitlines(),
        },
        "prediction": {"step_seconds": plan.step_seconds, "peaks": list(plan.simulation.peaks)},
        "links": [list(x) for x in plan.links],
        "splits": [list(x) for x in plan.splits],
        "advice": [list(x) for x in plan.advice],
        "idle": list(plan.idle),
    }  # fmt: skip


def of_text(text: str, graph: Graph, file: str = "plan.json") -> Plan:
    """The plan of a graph whose nodes have their stages.

    Raises:  DfcError D060..D063; N020..N023, N061 for a program that may not run.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except ValueError as e:
        raise DfcError("D060", f"{file} is not JSON: {e}") from e
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise DfcError("D061", f"{file} has schema {found!r}, this dfc reads {SCHEMA}")
    try:
        plan = _plan(data, graph)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise DfcError("D060", f"{file} holds what dfc does not write: {reason}") from e
    _of_graph(plan, file)
    _agrees(plan, data["prediction"], file)
    return plan


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _plan(data: Mapping[str, Any], graph: Graph) -> Plan:
    c, p = data["costs"], data["partition"]
    costs = Costs(
        tuple(c["forward"]), tuple(c["inputs"]), tuple(c["weights"]),
        links={(a, b): Link(latency, per_byte) for a, b, latency, per_byte in c["links"]},
        edges=[(int(a), int(b), int(size)) for a, b, size in c["edges"]],
        activations=tuple(c["activations"]), resident=tuple(c["resident"]), slots=c["slots"],
        taken=tuple(c.get("taken", ())), kept=tuple(c.get("kept", ())),
        remade=tuple(c.get("remade", ())), remake=tuple(c.get("remake", ())),
    )  # fmt: skip
    partition = Partition(
        _stages_of_nodes(graph), float(p["value"]), float(p["bound"]), str(p["method"])
    )
    return Plan(
        str(data["model"]), _machine_of(data["machine"]),
        {str(k): int(v) for k, v in data["sizes"].items()}, Wish(**data["wish"]), data["objective"],
        tuple(Stage(**_infinite(s)) for s in data["stages"]),
        partition, float(data["bottleneck"]), float(data["latency"]), costs,
        _program_of(data["program"]),
        tuple((str(a), str(b), float(size), float(busy)) for a, b, size, busy in data["links"]),
        tuple((str(name), float(ratio)) for name, ratio in data["splits"]),
        tuple((str(what), float(gain)) for what, gain in data["advice"]),
        tuple(map(str, data["idle"])), graph,
    )  # fmt: skip


def _program_of(data: Mapping[str, Any]) -> Program:
    read = parse_program("\n".join(data["ranks"]), str(data["name"]))
    return of_rows(str(data["name"]), read.ranks, [int(r) for r in data["placement"]])


def planned(found: Plan, graph: Graph) -> Plan:
    """The plan as one of a copy of its graph, whose nodes carry their stages.

    Raises:  DfcError D062 where another step has changed what the plan is of.
    """
    stage = _stages_of_nodes(graph)
    stages = tuple(replace(s, nodes=stage.count(s.index)) for s in found.stages)
    partition = replace(found.partition, stage=stage)
    made = replace(found, graph=graph, modelled=None, partition=partition, stages=stages)
    _of_graph(made, "the plan")
    return made


def _stages_of_nodes(graph: Graph) -> tuple[int, ...]:
    """The stages that the nodes carry, in the graph's order.

    Raises:  DfcError D062 for a node without one.
    """
    found = []
    for node in graph.nodes:
        if node.stage is None:
            raise DfcError("D062", f"{node!r} has no stage", help=_LAST)
        found.append(node.stage)
    return tuple(found)


def _of_graph(plan: Plan, file: str) -> None:
    """That the stages and what goes between them are those of the graph."""
    count = len(plan.stages)
    used = sorted(set(plan.partition.stage))
    if used != list(range(count)):
        message = f"{file} has {counted(count, 'stage')}, the graph's nodes are in {used}"
        raise DfcError("D062", message, help=_LAST)
    for s in plan.stages:
        held = plan.partition.stage.count(s.index)
        if held != s.nodes:
            message = (
                f"{file} has {counted(s.nodes, 'node')} in stage {s.index}, the graph has {held}"
            )
            raise DfcError("D062", message)
    stage = dict(zip(plan.graph.nodes, plan.partition.stage, strict=True))
    told = {(a, b) for a, b, _ in plan.costs.all_edges()}
    for node in plan.graph.nodes:
        for v in node.operands:
            edge = (stage[v.node] if v.node else stage[node], stage[node])
            if edge[0] != edge[1] and edge not in told:
                message = f"{file} has no edge from stage {edge[0]} to {edge[1]}, which reads "
                raise DfcError("D062", f"{message}%{v.name}", help=_LAST)


def _agrees(plan: Plan, prediction: Mapping[str, Any], file: str) -> None:
    """That the parts of a plan are those of one plan, and that its program may run."""
    count = len(plan.stages)
    names = {d.name for d in plan.machine.devices}
    strange = next((s.device for s in plan.stages if s.device not in names), None)
    if strange is not None or plan.program.stages != count:
        what = (
            f"no device `{strange}`"
            if strange
            else f"a program of {counted(plan.program.stages, 'stage')}"
        )
        raise DfcError("D063", f"{file} has {counted(count, 'stage')} and {what}")
    used = set(plan.program.placement) == set(range(len(plan.machine.devices)))
    if not used or [s.device for s in plan.stages] != [d.name for d in plan.devices]:
        raise DfcError("D063", f"{file} has stages on other devices than its program has them")
    plan.machine.check()
    check(plan.program, plan.costs)
    told_s = float(prediction["step_seconds"])
    if not isclose(told_s, plan.step_seconds, rel_tol=1e-9):
        message = f"{file} predicts a step of {told_s:.6g} s, its actions take "
        raise DfcError("D063", f"{message}{plan.step_seconds:.6g} s")


def _machine_data(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "devices": [_finite(asdict(d)) for d in machine.devices],
        "wires": [
            [a, b, None if w.bandwidth == inf else w.bandwidth, w.latency]
            for (a, b), w in sorted(machine.wires.items())
        ],
    }


def _machine_of(data: Mapping[str, Any]) -> Machine:
    devices = tuple(Device(**_infinite(d)) for d in data["devices"])
    wires = {
        (int(a), int(b)): Wire(inf if bandwidth is None else float(bandwidth), float(latency))
        for a, b, bandwidth, latency in data["wires"]
    }
    return Machine(str(data["name"]), devices, wires)


def _floats(values: Any) -> list[float]:
    return [float(x) for x in values]


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and v == inf else v for k, v in data.items()}


def _infinite(data: Mapping[str, Any]) -> dict[str, Any]:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return {k: inf if v is None else v for k, v in values.items()}
