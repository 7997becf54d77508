"""Linear layers of random codes for tests of the kernels, and the paths that this machine has."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dfc.ops.codes import pack4
from dfc.ops.linear_quantized import LinearW4, LinearW8
from dfc.runtime.kernels import library, linear

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
SHAPES = ((1, 16, 128), (1, 5, 40), (3, 33, 200), (9, 20, 160), (2, 1, 7), (130, 17, 96))
MANY = ((130, 17, 96), (33, 40, 1100), (70, 3, 2050))  # rows, whose small codes have lanes


def needs_kernels() -> None:
    """CI has a compiler, and has installed dfc with it: there the kernels must be there."""
    found = library.state()
    if not found.built and not IN_CI:
        pytest.skip(f"{found.reason}; {found.advice}")
    assert found.built, f"{found.reason}; {found.advice}"
    linear.register()


def paths() -> tuple[str, ...]:
    return library.state().paths or ("portable",)


def each_path() -> Any:
    return pytest.mark.parametrize("path", paths())


class Layer:
    """A linear layer of random codes; with `whole` all sums of floats are exact as well.

    Then scales are powers of two, and each group of x has the largest magnitude 127 times one.
    """

    def __init__(self, bits: int, group: int | None, shape: tuple[int, int, int], **o: Any) -> None:
        self.bits, self.group = bits, group
        rows, n, k = shape
        random = torch.Generator().manual_seed(rows * 1000 + n * 10 + k + bits)
        groups = -(-k // group) if group else 1
        self.bias = torch.randint(-9, 9, (n,), generator=random).float() if o.get("bias") else None
        self.zero = None
        if bits == 4:
            assert group is not None
            codes = torch.randint(0, 16, (n, groups * group), generator=random, dtype=torch.uint8)
            self.codes = pack4(codes)
            if o.get("zeros"):
                points = torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8)
                self.zero = pack4(points)
        else:
            self.codes = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
            if o.get("small"):  # as trained weights are: most codes far below the largest
                wide = torch.randn(n, k, generator=random) * 30
                self.codes = wide.round().clamp(-128, 127).to(torch.int8)
        if o.get("whole"):
            self.scale = 2.0 ** torch.randint(-2, 2, (n, groups), generator=random).float()
            self.x = torch.randint(-127, 128, (rows, k), generator=random).float()
            self.x[:, :: group or k] = 127
            self.x *= 2.0 ** torch.randint(-2, 2, (rows, 1), generator=random).float()
        else:
            self.scale = torch.rand(n, groups, generator=random) * 0.1 + 0.01
            self.x = torch.randn(rows, k, generator=random)
        if group is None:
            self.scale = self.scale[:, 0]
        if o.get("half"):
            self.scale = self.scale.half()

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    def pack(self) -> Tensor:
        if self.bits == 8:
            return linear.pack_w8(self.codes, self.scale, self.group)
        assert self.group is not None
        return linear.pack_w4(self.codes, self.scale, self.zero, self.x.shape[1], self.group)

    def run(self, path: str | None = None, before: int = 0) -> Tensor:
        return linear.linear(self.x, self.pack(), self.bias, self.n, before, path)

    def meaning(self) -> Tensor:
        if self.bits == 8:
            op8 = LinearW8(self.group, "int8")
            return op8.reference(self.x, self.codes, self.scale, self.bias)
        assert self.group is not None
        op4 = LinearW4(self.group, "int8")
        return op4.reference(self.x, self.codes, self.scale, self.zero, self.bias)


def layers(**options: Any) -> list[Layer]:
    fours = product((4,), (16, 32, 64, 128), SHAPES, (False, True))
    eights = product((8,), (None, 16, 32, 128), SHAPES, (False,))
    return [
        Layer(bits, group, shape, zeros=zeros, bias=i % 2, half=i % 3 == 0, **options)
        for i, (bits, group, shape, zeros) in enumerate([*fours, *eights])
    ] + [Layer(8, None, shape, small=True, bias=True, **options) for shape in MANY]
