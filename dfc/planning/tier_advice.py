"""Of a plan of tiers: what limits it, what would make it faster, and all of it as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.streaming import bound
from dfc.planning.tier_chain import with_below
from dfc.planning.tiers import Tiers, plan_tiers

_TELLING = 1.05  # times as fast: less is not worth money
_MORE = 1.5  # times the memory


def limit(plan: Tiers) -> str:
    """What a pass waits for most."""
    if not plan.streamed:
        return "computing"
    computing = sum(x.seconds for x in plan.layers)
    if plan.bound > computing:
        s = plan.simulation
        slowest = max(s.hops, key=lambda h: bound(s.layers, s.streamed, [h]))
        return f"copies from {slowest.name}"
    return "computing" if plan.pass_seconds <= plan.bound * _TELLING else "slots"


def advice(plan: Tiers) -> list[tuple[str, float]]:
    """What to buy or change, and how many times as fast a pass is then; the best first."""
    if not plan.streamed:
        return []
    now = float(plan.pass_seconds)
    found = [(what, now / float(other.pass_seconds)) for what, other in _others(plan)]
    times = plan.break_even
    if times > 1:
        what = f"{times} times the batch in each pass, which costs no more copies"
        computing = float(sum(x.seconds for x in plan.layers))
        found.append((what, now / max(computing, now / times)))
    return sorted((f for f in found if f[1] >= _TELLING), key=lambda f: -f[1])


def _others(plan: Tiers) -> Iterator[tuple[str, Tiers]]:
    fast = replace(plan.hop, per_byte=plan.hop.per_byte / 2)
    yield f"twice the bandwidth of {plan.hop.name}", replace(plan, hop=fast)
    if plan.below is not None and plan.below.streamed:
        yield from _below(plan, plan.below)
    whole = replace(plan, streamed=(), below=None)
    more = whole.held_bytes - plan.memory
    yield f"{amount_text(more, 'bytes')} more memory, which holds all weights", whole
    larger = int(plan.memory * _MORE)
    if larger < whole.held_bytes:
        try:
            bigger = plan_tiers(plan.layers, plan.weights, larger, plan.hop, plan.fixed)
        except DfcError:
            return
        if plan.below is not None:
            bigger = with_below(bigger, plan.below.memory, plan.below.hop)
        yield f"{amount_text(larger - plan.memory, 'bytes')} more memory", bigger


def _below(plan: Tiers, below: Tiers) -> Iterator[tuple[str, Tiers]]:
    fast = replace(below.hop, per_byte=below.hop.per_byte / 2)
    faster = replace(plan, below=replace(below, hop=fast))
    yield f"twice the bandwidth of {below.hop.name}", faster
    more = replace(below, streamed=()).held_bytes - below.memory
    told = f"{amount_text(more, 'bytes')} more of the host's memory, which then reads nothing"
    yield told, replace(plan, below=None)


def tiers_data(plan: Tiers) -> dict[str, Any]:
    """A plan as data; seconds and bytes are those of a pass, as planned."""
    return {
        "memory": plan.memory,
        "resident_bytes": plan.resident_bytes,
        "held_bytes": plan.held_bytes,
        "streamed": [plan.layers[i].name for i in plan.streamed],
        "slots": plan.slots,
        "slot_bytes": plan.slot_bytes,
        "bytes_per_pass": plan.bytes_per_pass,
        "from": plan.hop.name,
        "pass_seconds": float(plan.pass_seconds) if plan.streamed else None,
        "bound_seconds": float(plan.bound) if plan.streamed else None,
        "limit": limit(plan),
        "break_even": plan.break_even if plan.streamed else 1,
        "advice": advice(plan),
        **({"below": tiers_data(plan.below)} if plan.below and plan.below.streamed else {}),
    }
