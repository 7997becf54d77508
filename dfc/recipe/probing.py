"""The probes of a compilation: inputs around the user's example, with the model's own results."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.report import Report

_LONG_S = 3.0  # after which it is told how far things are


def make(
    model: Any, graph: Graph, args: Any, kwargs: Any, mode: str, report: Report,
    say: Callable[[str], None],
) -> Any:  # fmt: skip
    """Probes with the original's results, or None with the reason in the report.

    Raises:  DfcError T010 when the captured graph gives other results than the model.
    """
    if any(p.data is None for p in graph.parameters.values()):
        report.notes.append("unproved: the model has no weights, so nothing can be run")
        return None
    if args is None and kwargs is None:
        report.notes.append("unproved: there are no example inputs")
        return None
    import torch

    from dfc.calling import flat_inputs
    from dfc.ir.weights import on_host
    from dfc.rewrite.probe import make_probes, other_masks

    inputs = [on_host(x) for x in flat_inputs(graph, args or (), kwargs or {})]
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
        report.notes.append("unproved: the example inputs are on the meta device")
        return None
    if mode == "none":
        return make_probes(graph, inputs, count=1)
    say("running the original on probe inputs")
    run_original = None
    if not isinstance(model, Graph) and not _on_meta(model):
        from dfc.capture.original import original_runner

        run_original = original_runner(model, graph, args or (), kwargs or {})
    probes = make_probes(graph, inputs, run_original=run_original)
    _settle_size_one(graph, probes, report, say)
    names, masked = other_masks(graph, inputs)
    if names and run_original is not None:
        probes.look_aside(names, masked)
    return probes


def _on_meta(model: Any) -> bool:
    """Whether the model itself cannot run: its weights came from a file."""
    return any(p.is_meta for p in getattr(model, "parameters", tuple)())


def _settle_size_one(graph: Graph, probes: Any, report: Report, say: Callable[[str], None]) -> None:
    """Run every probe; where size 1 alone goes wrong, the graph is for sizes from 2 on."""
    began, whole = time.perf_counter(), len(probes.probes)
    try:
        for done, _ in enumerate(probes.ready(), 1):
            if done < whole and time.perf_counter() - began > _LONG_S:
                say(f"running the original on probe inputs: {done} of {whole} done")
    except DfcError as e:
        wrong = [p for p in probes.probes if p.original is None]
        ones = {s for s, (low, _) in graph.ranges.items() if low == 1}
        if e.code != "T010" or not wrong or not wrong[0].ones or not ones:
            raise
        for s in sorted(ones):
            graph.ranges[s] = (2, graph.ranges[s][1])
        report.notes.append(
            f"{', '.join(f'`{s}`' for s in sorted(ones))} must be at least 2: "
            "torch.export took another path for size 1"
        )
        probes.probes = [p for p in probes.probes if not p.ones]
        _settle_size_one(graph, probes, report, say)
