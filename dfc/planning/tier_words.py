"""A plan of tiers in words: what limits it, and what would make it faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.tiers import Tiers, plan_tiers

_TELLING = 1.05  # times as fast: less is not worth money
_MORE = 1.5  # times the memory


def limit(plan: Tiers) -> str:
    """What a pass waits for most."""
    if not plan.streamed:
        return "computing"
    computing = sum(x.seconds for x in plan.layers)
    if plan.bound > computing:
        return f"copies from {plan.hop.name}"
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
    whole = replace(plan, streamed=())
    more = whole.held_bytes - plan.memory
    yield f"{amount_text(more, 'bytes')} more memory, which holds all weights", whole
    larger = int(plan.memory * _MORE)
    if larger < whole.held_bytes:
        try:
            bigger = plan_tiers(plan.layers, plan.weights, larger, plan.hop, plan.fixed)
        except DfcError:
            return
        yield f"{amount_text(larger - plan.memory, 'bytes')} more memory", bigger


def words(plan: Tiers) -> list[str]:
    """What stays, what is streamed, and what that costs."""
    memory = amount_text(plan.memory, "bytes")
    if not plan.streamed:
        return [f"everything fits in {memory}: no weights are streamed"]
    stays, each = (amount_text(x, "bytes") for x in (plan.resident_bytes, plan.bytes_per_pass))
    slots = f"{plan.slots} slot{'s' * (plan.slots > 1)}"
    names = [plan.layers[i].name for i in plan.streamed]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"in {memory}: {stays} stay, {slots} of {amount_text(plan.slot_bytes, 'bytes')}; "
        f"{each} come from {plan.hop.name} in each pass ({shown})",
        f"a pass takes {amount_text(float(plan.pass_seconds), 'time')} by the plan, and never less "
        f"than {amount_text(float(plan.bound), 'time')}; {limit(plan)} limit"
        f"{'s' if limit(plan) == 'computing' else ''} it",
        *(f"{what}: {gain:.2f} times as fast" for what, gain in advice(plan)[:3]),
    ]
