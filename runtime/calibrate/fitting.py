"""A device's facts from blocks of mixed operators, where chains of one operator say too little."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean

from dfc.planning.cost import Work
from dfc.planning.facts import LAUNCHES
from dfc.planning.machine import Device

_LEAST, _MOST = 0.5, 4.0  # of a stretch; beyond, something else is wrong
_COLD = ("math", "norm", "reduce")  # classes whose rates were measured in a cache

Node = tuple[Work, float]  # a node of a block, and its seconds where it stands


def fitted(
    device: Device, nodes: Mapping[str, Sequence[Node]], totals: Mapping[str, float]
) -> Device:
    """The device that blocks show: `totals` are their seconds without clocks between the nodes."""
    many = {name for name in nodes if name.startswith("many")}
    device = _starting(device, [n for name in nodes if name not in many for n in nodes[name]])
    device = _gathering(device, [n for name in many for n in nodes[name]])
    for fit, some in ((_stretched, nodes.keys() - many), (_slowed, many)):
        for convolves in (False, True):
            names = [name for name in some if name.endswith("convolutions") == convolves]
            works = [work for name in names for work, _ in nodes[name]]
            device = fit(device, works, sum(totals[name] for name in names), convolves)
    return device


def _starting(device: Device, nodes: Sequence[Node]) -> Device:
    """Times to start a class: what its nodes take beyond their work, a tenth of all at least."""
    found: dict[str, list[float]] = {}
    for work, seconds in nodes:
        beyond = seconds - work.seconds(device) + device.launching(work.kind)
        kind = work.kind if work.kind in LAUNCHES.values() else "plain"
        found.setdefault(kind, []).append(max(beyond, seconds / 10))
    launches = {kind: mean(times) for kind, times in found.items()}
    plain = launches.pop("plain", device.launch)
    return replace(device, launch=plain, launches={**device.launches, **launches})


def _gathering(device: Device, nodes: Sequence[Node]) -> Device:
    """What finds elements by their indices, beyond its start."""
    chosen = [(w, t - w.launching(device)) for w, t in nodes if w.kind == "gather" and w.flops]
    seconds = sum(t for _, t in chosen)
    if seconds <= 0:
        return device
    rate = sum(w.flops for w, _ in chosen) / seconds
    return replace(device, rates={**device.rates, "gather": rate})


def _stretched(device: Device, works: Sequence[Work], seconds: float, convolves: bool) -> Device:
    """Starts so that all takes `seconds`: of convolutions, or of everything else."""

    def stretched(k: float) -> Device:
        launches = {
            kind: start * (k if (kind == "conv") == convolves else 1.0)
            for kind, start in device.launches.items()
        }
        return replace(device, launch=device.launch * (1.0 if convolves else k), launches=launches)

    return _solved(stretched, works, seconds)


def _slowed(device: Device, works: Sequence[Work], seconds: float, convolves: bool) -> Device:
    """Rates of what was measured in caches so that all takes `seconds`, likewise."""

    def slowed(k: float) -> Device:
        if convolves:
            return replace(device, layout_bandwidth=device.layout_bandwidth / k)
        rates = {kind: r / (k if kind in _COLD else 1.0) for kind, r in device.rates.items()}
        return replace(device, rates=rates, cache_bandwidth=device.cache_bandwidth / k)

    return _solved(slowed, works, seconds)


def _solved(make: Callable[[float], Device], works: Sequence[Work], seconds: float) -> Device:
    """The device whose factor lets the works take so many seconds, within bounds."""
    return make(solve(lambda k: sum(w.seconds(make(k)) for w in works), seconds, _LEAST, _MOST))


def solve(f: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that grows is `wanted`, or the end of the range that is closest."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < wanted else (low, middle)
    return (low + high) / 2
