"""How the weights of one copy lie in a slot, and what carries them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dfc.errors import DfcError
from dfc.ir.graph import Parameter
from dfc.planning.tiers import aligned
from dfc.planning.weight_blocks import weight_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One weight in a slot: from `offset` on."""

    weight: Parameter
    offset: int

    @property
    def bytes(self) -> int:
        return weight_bytes(self.weight)

    def of(self, slot: Tensor) -> Tensor:
        """The weight where it lies in a slot of bytes."""
        t = self.weight.tensor_type
        flat = slot[self.offset : self.offset + self.bytes].view(t.dtype.to_torch())
        return flat.view([int(s) for s in t.shape])  # type: ignore[arg-type]


def pieces_of(weights: Sequence[Parameter]) -> tuple[Piece, ...]:
    """The weights one after the other."""
    found, offset = [], 0
    for w in weights:
        found.append(Piece(w, offset))
        offset += aligned(weight_bytes(w))
    return tuple(found)


Load = tuple[Piece, ...]  # what one copy brings


def load_bytes(load: Load) -> int:
    """From the first byte to the last, with what is between weights."""
    last = load[-1]
    return last.offset + last.bytes


def flat(load: Load, into: Tensor) -> Tensor:
    """The weights of a load as they will lie in a slot."""
    for piece in load:
        piece.of(into).copy_(numbers(piece.weight))
    return into


def numbers(weight: Parameter) -> Tensor:
    """Raises:  DfcError K021 for a weight without data."""
    if weight.data is None:
        raise DfcError(
            "K021", f"the parameter !{weight.name} has no data: the model is on the meta device",
            help="load weights before running", status=2,
        )  # fmt: skip
    return weight.data.tensor()


class Carrier(Protocol):
    """Brings loads into slots. What it is told is in order: fill, ready, leave of each slot."""

    @property
    def slots(self) -> Sequence[Tensor]: ...

    def begin(self) -> None:
        """A pass begins.

        Raises:  DfcError when what is read has changed.
        """
        ...

    def fill(self, load: int, slot: int) -> None:
        """Start to bring a load, or queue it, once what was queued has left the slot."""
        ...

    def ready(self, slot: int) -> None:
        """What is computed from here on may read the slot.

        Raises:  DfcError when its load could not be brought.
        """
        ...

    def leave(self, slot: int) -> None:
        """What was computed so far was the last to read the slot."""
        ...

    def settle(self) -> None:
        """Wait until nothing is being brought."""
        ...

    def copied(self) -> list[tuple[int, float]]:
        """Bytes and seconds of the last copies."""
        ...

    def close(self) -> None: ...
