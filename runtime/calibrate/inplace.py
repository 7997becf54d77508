"""What each node of a graph takes where it stands, between the others: by a clock behind each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dfc.ir.graph import Graph
from dfc.runtime.calibrate.sampling import quiet

_INTERRUPTED = 1.3  # times what nodes alone take: such a run was not left alone


@dataclass(frozen=True)
class Clocked:
    """Seconds of one run: of each node, in order, and of what comes before and after them."""

    nodes: tuple[float, ...]
    around: float  # the call itself, parameters that are looked up


def clocked(graph: Graph, inputs: Sequence[Any], device: str = "cpu") -> Callable[[], Clocked]:
    """Runs a graph on the eager engine with a clock behind every node.

    On a GPU that is what nodes keep the processor busy, which starts them while others run; all of
    them are waited for at the end, outside of what is timed.
    Why:     a wait behind every node takes 4 us on an H100, which a model does not.
    Cost:    a tenth of a microsecond a node more than the engine takes.
    """
    import torch

    from dfc.emit.fx import to_fx
    from dfc.runtime.direct import call_directly
    from dfc.runtime.kernels.graph import kernels

    stamps: list[float] = []

    def mark() -> None:
        stamps.append(time.perf_counter())

    module = to_fx(graph, device, kernels(device), mark)
    call_directly(module)
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]

    def run() -> Clocked:
        stamps.clear()
        begin = time.perf_counter()
        with torch.no_grad():
            module(*given)
        end = time.perf_counter()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        around = stamps[0] - begin + end - stamps[-1]
        return Clocked(tuple(b - a for a, b in pairwise(stamps)), around)

    return run


def quiet_seconds(runs: Sequence[Clocked]) -> list[float]:
    """Each node's, as `quiet` tells it, with its share of what is around them.

    Why:    nodes have their quiet moments in different runs: together they are brought to what the
            nodes of one run take, as far as that is not a run which was interrupted.
    Needs:  one run at least.
    """
    around = quiet([r.around for r in runs]).value / max(len(runs[0].nodes), 1)
    nodes = [quiet(times).value for times in zip(*(r.nodes for r in runs), strict=True)]
    whole = quiet([sum(r.nodes) for r in runs]).value
    scale = min(whole / max(sum(nodes), 1e-9), _INTERRUPTED)
    return [t * scale + around for t in nodes]
