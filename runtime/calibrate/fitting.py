"""A device's facts from blocks of mixed operators, where chains of one operator say too little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean

from dfc.planning.cost import Work
from dfc.planning.facts import LAUNCHES
from dfc.planning.machine import Device

_LEAST, _MOST = 1.0, 3.0  # times as slow as in caches; beyond, something else is wrong
GRAINS = (2.0, 32.0)  # the least and the most of what kernels for products are known to take
_COLD = ("math", "norm", "reduce")  # classes whose rates were measured in a cache

Node = tuple[Work, float]  # a node of a block, and its seconds where it stands


def fitted(device: Device, few: Sequence[Node], many: Sequence[Node]) -> Device:
    """The device that nodes show: of blocks with few items, and with many.

    On a GPU all of them show how long it takes to start them, which hides what they do.
    """
    if device.ahead:
        return _starting(_starting(device, [*few, *many]), [*few, *many])
    # Views do no work whatever their sizes, but start later where others left the caches full.
    few = [*few, *(node for node in many if node[0].kind == "view")]
    for _ in range(3):  # starts are what work leaves, and work is what starts leave
        device = _starting(device, few)
        for fit in (_grained, _headed, _gathering, _laid_out):
            device = fit(device, many)
    return _slowed(_starting(device, few), many)


def _starting(device: Device, nodes: Sequence[Node]) -> Device:
    """Times to start a class: what its nodes take beyond their work, a tenth of all at least."""
    found: dict[str, list[float]] = {}
    for work, seconds in nodes:
        inside = work.launching(device) - device.launching(work.kind)
        beyond = seconds - inside - (0.0 if device.ahead else work.working(device))
        kind = work.kind if work.kind in LAUNCHES.values() else "plain"
        found.setdefault(kind, []).append(max(beyond, seconds / 10))
    launches = {kind: mean(times) for kind, times in found.items()}
    plain = launches.pop("plain", device.launch)
    return replace(device, launch=plain, launches={**device.launches, **launches})


def _grained(device: Device, nodes: Sequence[Node]) -> Device:
    """What small sides of products cost on a processor.

    Why:  what a chain of products takes beyond its starts is a small difference of large numbers.
    """
    chosen = [(w, t) for w, t in nodes if w.kind == "matmul"]
    if device.kind != "cpu" or not chosen:
        return device

    def takes(grain: float) -> float:
        return sum(w.seconds(replace(device, grain=grain)) for w, _ in chosen)

    return replace(device, grain=solve(takes, sum(t for _, t in chosen), *GRAINS))


def _headed(device: Device, nodes: Sequence[Node]) -> Device:
    """What a small head of attention takes beyond its arithmetic."""
    alone = replace(device, each_matrix=0.0)
    chosen = [(w, t - w.seconds(alone)) for w, t in nodes if w.kind == "attention"]
    heads = sum(w.matrices for w, _ in chosen)
    each = max(sum(t for _, t in chosen), 0.0) / heads if heads else device.each_matrix
    return replace(device, each_matrix=each)


def _gathering(device: Device, nodes: Sequence[Node]) -> Device:
    """What finds elements by their indices, beyond its start."""
    chosen = [(w, t - w.launching(device)) for w, t in nodes if w.kind == "gather" and w.flops]
    seconds = sum(t for _, t in chosen)
    if seconds <= 0:
        return device
    rate = sum(w.flops for w, _ in chosen) / seconds
    return replace(device, rates={**device.rates, "gather": rate})


def _laid_out(device: Device, nodes: Sequence[Node]) -> Device:
    """With what bandwidth convolutions change layouts, so that all of them take their time."""
    chosen = [(w, t) for w, t in nodes if w.kind == "conv"]
    if not device.layout_bandwidth or not chosen:
        return device

    def laid_out(seconds_a_byte: float) -> Device:
        return replace(device, layout_bandwidth=1 / seconds_a_byte)

    def takes(seconds_a_byte: float) -> float:
        slower = laid_out(seconds_a_byte)
        return sum(w.seconds(slower) for w, _ in chosen)

    memory = 1 / device.bandwidth
    return laid_out(solve(takes, sum(t for _, t in chosen), memory / 10, memory * 10))


def _slowed(device: Device, nodes: Sequence[Node]) -> Device:
    """Rates of what was measured in caches so that all nodes but convolutions take their time."""
    chosen = [(w, t) for w, t in nodes if w.kind != "conv"]

    def slowed(k: float) -> Device:
        rates = {kind: r / (k if kind in _COLD else 1.0) for kind, r in device.rates.items()}
        return replace(device, rates=rates, cache_bandwidth=device.cache_bandwidth / k)

    def takes(k: float) -> float:
        slower = slowed(k)
        return sum(w.seconds(slower) for w, _ in chosen)

    return slowed(solve(takes, sum(t for _, t in chosen), _LEAST, _MOST))


def solve(f: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that grows is `wanted`, or the end of the range that is closest."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < wanted else (low, middle)
    return (low + high) / 2
