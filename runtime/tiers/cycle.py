"""Slots that are used in turn, pass after pass: each is filled again as soon as it was left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfc.runtime.tiers.slots import Carrier, Load

if TYPE_CHECKING:
    from torch import Tensor


class Cycle:
    """Loads in the order of a pass, over and over; the first ones are brought at once.

    Keeps:  what was taken is left before the next is taken, so that slots become free in order.
    """

    def __init__(self, carrier: Carrier, loads: Sequence[Load]) -> None:
        self.carrier, self.loads = carrier, loads
        self.count = len(carrier.slots)
        self._sizes = [sum(piece.bytes for piece in load) for load in loads]
        self.brought = 0  # bytes of all that was taken
        self._views = [
            [tuple(piece.of(slot) for piece in load) for slot in carrier.slots] for load in loads
        ]
        self.restart()

    def restart(self) -> None:
        """From the first load, whatever was taken before."""
        self.carrier.settle()
        self.taken = 0
        for q in range(self.count if self.loads else 0):
            self._fill(q)

    def _fill(self, q: int) -> None:
        self.carrier.fill(q % len(self.loads), q % self.count)

    def take(self, load: int) -> tuple[Tensor, ...]:
        """The weights of a load, which is next."""
        slot = self.taken % self.count
        self.carrier.ready(slot)
        self.brought += self._sizes[load]
        return self._views[load][slot]

    def leave(self) -> None:
        """Done with what was taken last: its slot is for the next load that has none."""
        self.carrier.leave(self.taken % self.count)
        self._fill(self.taken + self.count)
        self.taken += 1

    def forget(self) -> None:
        """Let go of the slots."""
        self._views.clear()

    @property
    def between_passes(self) -> bool:
        return not self.loads or self.taken % len(self.loads) == 0
