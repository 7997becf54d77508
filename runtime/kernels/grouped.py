"""Linear layers of experts on packed weights: rows in runs, each with an expert's own weight.

What `dfc.grouped_linear_w4` and `grouped_linear_w8` mean with activations="int8"
(dfc/ops/grouped_quantized.py). Only the weights of experts that have rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dfc.ops.grouped_quantized import GroupedLinearW4, GroupedLinearW8, by_expert
from dfc.runtime.kernels.linear import Bound, is_packed
from dfc.runtime.kernels.memory import huge

_ALIGNED = 64  # bytes: what the kernels read at once
_FIRST_CAPABILITY = (8, 0)  # of PyTorch's own grouped product
_MULTIPLES = 8  # of numbers of bf16: its rows begin at 16 bytes
_FLOATS = "grouped_linear_floats(Tensor x, Tensor ends, Tensor weight) -> Tensor"
_PACKED = "grouped_linear_packed(Tensor x, Tensor ends, Tensor packed, int n) -> Tensor"
_CODES = (
    "grouped_linear_codes(Tensor x, Tensor ends, Tensor codes, Tensor scale, Tensor? zero, "
    "int bits, int group, int rounded) -> Tensor"
)


def in_one_piece(packed: Sequence[Tensor]) -> Tensor:
    """The packed weights of experts one behind the other; in front, where each begins and ends."""
    sizes = [p.numel() for p in packed]
    places, at = [], _up(16 * len(packed))
    for size in sizes:
        places += [at, at + size]
        at = _up(at + size)
    made = huge(at)
    made[: 16 * len(packed)].view(torch.int64)[:] = torch.tensor(places)
    for i, p in enumerate(packed):
        made[places[2 * i] : places[2 * i + 1]] = p
    return made


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _places(packed: Tensor, experts: int) -> list[tuple[int, int]] | None:
    """Where each expert's weight begins and ends; None for what is no such piece."""
    head = 16 * experts
    if packed.numel() < head:
        return None
    flat = packed[:head].view(torch.int64).tolist()
    found = list(zip(flat[::2], flat[1::2], strict=True))
    within = all(head <= a <= b <= packed.numel() and a % _ALIGNED == 0 for a, b in found)
    return found if within else None


def are_packed(packed: Tensor, bits: int, experts: int, n: int, k: int, group: int) -> bool:
    """Whether a tensor of bytes is the whole of the packed weights of this shape."""
    places = _places(packed, experts)
    if places is None:
        return False
    return all(is_packed(packed[a:b], bits, n, k, group) for a, b in places)


class BoundExperts:
    """Packed weights as a function of x and ends.

    `x` of 16 bits is computed with as f32, as the op says of rows that are rounded to int8.
    """

    def __init__(self, packed: Tensor, experts: int, n: int, k: int) -> None:
        places = _places(packed, experts)
        if places is None:
            raise RuntimeError(f"dfc linear: no packed weights of {experts} experts")
        self.packed, self.places, self.n, self.k = packed, places, n, k
        self.bound: dict[int, Bound] = {}

    def run(self, x: Tensor, ends: Tensor) -> Tensor:
        return by_expert(x.float(), ends, self.n, self._product).to(x.dtype)

    def _product(self, e: int, rows: Tensor) -> Tensor:
        found = self.bound.get(e)
        if found is None:
            begin, end = self.places[e]
            found = self.bound[e] = Bound(self.packed[begin:end], self.n, self.k)
        return found.run(rows, None)


def floats(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """Rows times weights [E, N, K] that were unpacked to floats of x's type."""
    n = weight.shape[1]
    if _has_one_kernel(weight):
        y = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends.to(torch.int32))
        behind = torch.arange(x.shape[0], device=x.device) >= ends[-1]
        return y.masked_fill_(behind.unsqueeze(-1), 0)
    return by_expert(x, ends, n, lambda e, rows: torch.mm(rows, weight[e].T))


def _has_one_kernel(weight: Tensor) -> bool:
    """Whether PyTorch multiplies all runs at once, and asks the host for nothing."""
    whole = not any(size % _MULTIPLES for size in weight.shape[1:])
    if weight.dtype is not torch.bfloat16 or not whole or not weight.shape[0]:
        return False
    return (
        not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= _FIRST_CAPABILITY
    )


def codes(
    x: Tensor, ends: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int,
    group: int, rounded: int,
) -> Tensor:  # fmt: skip
    """What the op means, as one operator that torch.compile does not look into."""
    activations = "int8" if rounded else "float"
    if bits == 4:
        return GroupedLinearW4(group, activations).reference(x, ends, codes, scale, zero)
    return GroupedLinearW8(group or None, activations).reference(x, ends, codes, scale)


@cache
def register() -> torch.library.Library:
    """Make the operators known that torch.compile calls; the library keeps them alive."""
    ops: Any = torch.library.Library("dfc", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema, run, shape in (
        (_FLOATS, floats, lambda x, ends, weight: _like(x, weight.shape[1])),
        (_PACKED, _packed, lambda x, ends, packed, n: _like(x, n)),
        (_CODES, codes, lambda x, ends, codes, *rest: _like(x, codes.shape[1])),
    ):
        ops.define(schema)
        name = schema.partition("(")[0]
        ops.impl(name, run, "CompositeExplicitAutograd")
        ops.impl(name, shape, "Meta")
    return ops  # type: ignore[no-any-return]


def _like(x: Tensor, n: int) -> Tensor:
    return x.new_empty((x.shape[0], n))


def _packed(x: Tensor, ends: Tensor, packed: Tensor, n: int) -> Tensor:
    return BoundExperts(packed, ends.shape[0], n, x.shape[1]).run(x, ends)
