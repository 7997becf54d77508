"""Measured times of nodes for a plan: from a file, or by running the model on this processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.cli.sources import Source
    from dfc.ir.graph import Graph, Node
    from dfc.planning.pipeline import Plan

_FORM = 'write {"nodes": {"NAME": SECONDS}}, or take what `dfc plan --measure --json` prints'


def read_times(path: Path, graph: Graph) -> dict[Node, float]:
    """The seconds of nodes, by the names of their first results.

    Raises:  DfcError D050 for no file, D058 for one that is not of times of this graph.
    """
    from dfc.cli.sources import read_text

    try:
        data = json.loads(read_text(path))
    except ValueError as e:
        why = str(e)[:1].lower() + str(e)[1:]
        raise DfcError("D058", f"cannot read times from `{path}`: {why}", help=_FORM) from e
    times = data.get("nodes") if isinstance(data, dict) else None
    if not isinstance(times, dict):
        raise DfcError("D058", f"`{path}` has no times of nodes", help=_FORM)
    known = {n.results[0].name: n for n in graph.nodes if n.results}
    found = {}
    for name, seconds in times.items():
        if name not in known:
            help = did_you_mean(name, list(known)) or "it has the times of another graph"
            raise DfcError("D058", f"`{path}`: there is no node `{name}`", help=help)
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds < float("inf"):
            raise DfcError("D058", f"`{path}`: `{name}` takes {seconds!r}, which is no time",
                           help="write seconds, as in 1.5e-4")  # fmt: skip
        found[known[name]] = float(seconds)
    return found


def measure_times(
    source: Source, graph: Graph, sizes: Mapping[str, int], threads: int
) -> dict[Node, float]:
    """The seconds of every node on this processor, for inputs of these sizes: the example, where it
    has them, else random ones.

    Raises:  DfcError K021 for a model without weights.
    """
    from dfc.calling import flat_inputs
    from dfc.cli.inputs import random_inputs
    from dfc.planning.balanced import node_seconds

    for p in graph.parameters.values():
        if p.data is None:
            message = f"the parameter !{p.name} has no data: there is nothing to measure"
            raise DfcError("K021", message, help="plan without --measure, or load weights")
    example = None
    if source.args is not None and source.kind != "graph":
        example = flat_inputs(graph, tuple(source.args), dict(source.kwargs or {}))
    if example is None or sizes != source.sizes(graph):
        example = random_inputs(graph, sizes, 0, example)
    return node_seconds(graph, example, threads)


def measured_data(found: Plan, times: Mapping[Node, float]) -> dict[str, Any]:
    """Which times of a plan were measured: of how many nodes of each stage, and what they were."""
    stages = [0] * len(found.stages)
    for node, stage in zip(found.graph.nodes, found.partition.stage, strict=True):
        stages[stage] += node in times
    counts = [n if d.kind == "cpu" else 0 for n, d in zip(
        stages, found.devices, strict=True)]  # fmt: skip
    return {
        "nodes": {n.results[0].name: t for n, t in times.items() if n.results},
        "measured_nodes": counts,
        "classes": _by_class(found, times),
    }


def _by_class(found: Plan, times: Mapping[Node, float]) -> dict[str, dict[str, float]]:
    """Seconds of measured nodes by class of operator, beside those that the target promised."""
    from dfc.planning.cost import work_of

    classes: dict[str, dict[str, float]] = {}
    for node, stage in zip(found.graph.nodes, found.partition.stage, strict=True):
        device = found.devices[stage]
        if node in times and device.kind == "cpu":
            work = work_of(node, found.sizes)
            sums = classes.setdefault(work.kind, {"measured": 0.0, "predicted": 0.0})
            sums["measured"] += times[node]
            sums["predicted"] += work.seconds(device)
    return classes


def measured_text(found: Plan, data: Mapping[str, Any]) -> str:
    """The same in sentences: the target's figures are as good as they are for these operators."""
    parts = [
        f"{'all' if n == s.nodes else n or 'none'} of stage {s.index}"
        for n, s in zip(data["measured_nodes"], found.stages, strict=True)
    ]
    rest = "" if sum(data["measured_nodes"]) == len(found.graph) else "; the others are the model's"
    lines = [f"measured times: {', '.join(parts)}{rest}"]
    sums = data["classes"]
    if any(c["measured"] for c in sums.values()):
        lines.append(f"the target's own figures give {_compared(sums)}")
    return "\n".join(lines)


def _compared(sums: Mapping[str, Mapping[str, float]]) -> str:
    """Predicted over measured: of everything, and of the three classes that are most wrong."""
    from dfc.lang.units import amount_text

    measured, predicted = (sum(c[k] for c in sums.values()) for k in ("measured", "predicted"))
    wrong = sorted(sums.items(), key=lambda x: -abs(x[1]["predicted"] - x[1]["measured"]))
    worst = ", ".join(
        f"{kind} {c['predicted'] / c['measured']:.2f} of {amount_text(c['measured'], 'time')}"
        for kind, c in wrong[:3] if c["measured"]
    )  # fmt: skip
    return f"{predicted / measured:.2f} of that ({worst})"
