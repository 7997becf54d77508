"""A graph that runs with part of its weights streamed: PyTorch's operators, one after the other.

What stays lies in memory of its own, the rest comes into slots when it is read. Results are those
of the same operators with all weights at hand, bit for bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dfc.emit.supply import Supply, Visit
from dfc.errors import DfcError
from dfc.ir.graph import Parameter
from dfc.planning.tiers import Tiers
from dfc.planning.weight_blocks import Block, Cut
from dfc.runtime.modes import as_captured
from dfc.runtime.tiers.cycle import Cycle
from dfc.runtime.tiers.slots import Carrier, Load, pieces_of

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.runtime.tiers.clock import Clock
    from dfc.runtime.tiers.places import Place


class Streamed:
    """A runner of the eager engine within the memory of a plan.

    The plan was made of the same parts. With a `clock`, every block is timed.
    Keeps:  one pass at a time, whatever threads call: all passes fill the same slots.
    """

    def __init__(self, parts: Cut, plan: Tiers, place: Place, clock: Clock | None = None) -> None:
        from dfc.emit.fx import to_fx

        blocks = parts.blocks
        self._lock, self._closed = threading.Lock(), False
        self.plan, self.clock, self._finish = plan, clock, place.finish
        streamed = {blocks[i]: j for j, i in enumerate(plan.streamed)}
        brought = [[p for p in blocks[i].weights if p.name in names]
                   for i, names in zip(plan.streamed, plan.loads, strict=True)]  # fmt: skip
        loads = [pieces_of(weights) for weights in brought]
        gone = {p for weights in brought for p in weights}
        stay = [*parts.stay, *(p for b in blocks for p in b.weights)]
        self.held = {p: place.hold(p) for p in dict.fromkeys(stay) if p not in gone}
        self.carrier = _carrier(place, loads, plan)
        self._finalizer = weakref.finalize(self, self.carrier.close)
        self.cycle = Cycle(self.carrier, loads)
        visits = [
            self._visit(b, tuple(brought[streamed[b]]) if b in streamed else (), streamed.get(b))
            for b in blocks if b in streamed or (clock is not None and b.first is not None)
        ]  # fmt: skip
        supply = Supply(self.held, tuple(visits), parts.calls)
        self._module = to_fx(parts.graph, place.device, supply=supply)

    def _visit(self, block: Block, weights: tuple[Parameter, ...], load: int | None) -> Visit:
        assert block.first is not None and block.last is not None
        cycle, clock = self.cycle, self.clock

        def take() -> tuple[Tensor, ...]:
            if clock is not None:
                clock.stamp()
            found = cycle.take(load) if load is not None else ()
            if clock is not None:
                clock.stamp()
            return found

        leave = cycle.leave if load is not None else _nothing
        return Visit(block.first, block.last, weights, take, leave)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """One pass.

        Raises:  DfcError K071 when the weights' files are not what they were, K076 when closed.
        """
        with self._lock, as_captured():
            self._check_open()
            self.carrier.begin()
            if not self.cycle.between_passes:  # the last pass was ended by an error
                self.cycle.restart()
            return list(self._module.forward(*inputs))

    def _check_open(self) -> None:
        if self._closed:
            help = "load it again, or close it later"
            raise DfcError("K076", "the model was closed: its weights are gone", help=help)

    def finish(self) -> None:
        """Wait until what was called is computed; copies for the next pass may go on."""
        self._finish()

    def memory(self) -> list[Tensor]:
        """All memory that weights are in: what stays, and the slots."""
        return [*self.held.values(), *self.carrier.slots]

    @property
    def held_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.memory())

    @property
    def brought(self) -> tuple[int, ...]:
        """Bytes of weights that passes so far took from slots; of those that were read from below,
        where a second hop is.
        """
        read = getattr(self.carrier, "taken_from_below", None)
        return (self.cycle.brought,) if read is None else (self.cycle.brought, read)

    def close(self) -> None:
        """End what brings weights, and let go of all memory; it cannot be called any more."""
        with self._lock:
            self._closed = True
            self._finalizer()
            self.cycle.forget()
            self.held.clear()
            # A module and its graph know each other: tensors would stay until it is collected.
            for name in list(self._module._buffers):
                delattr(self._module, name)


def _carrier(place: Place, loads: Sequence[Load], plan: Tiers) -> Carrier:
    """Over one hop, or over two where the memory below streams as well."""
    if plan.below is None or not plan.below.streamed:
        return place.carrier(loads, plan.slots, plan.slot_bytes)
    from dfc.runtime.tiers.relay import Relaying, relay

    return relay(cast("Relaying", place), loads, plan)


def _nothing() -> None:
    return None
