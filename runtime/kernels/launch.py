"""Sizes of tiles for the Triton kernels of quantized linear layers, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from subprocess import CalledProcessError
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from dfc.runtime.kernels import triton_linear as kernels

LARGEST_F8 = 448.0
# What Triton raises where it cannot compile, has no C compiler or Python headers for its launcher,
# or does not find the driver's library; a CUDA error is a RuntimeError, as everywhere in PyTorch.
FAILURES = (TritonError, CalledProcessError, OSError, AssertionError)
# What holds codes up to 256; Triton's interpreter multiplies no bf16.
_COMPILED = isinstance(kernels.many_rows, triton.JITFunction)
_EXACT_FLOATS = torch.bfloat16 if _COMPILED else torch.float16


def reason(failure: BaseException) -> str:
    """One line of what Triton says: its compiler shows the source first, others begin with it."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[-1 if isinstance(failure, CompilationError) else 0].strip()


class Tiles(NamedTuple):
    """How `many_rows` cuts its work."""

    bm: int
    bn: int
    bk: int
    parts: int
    warps: int
    stages: int

    def smaller(self) -> Tiles | None:
        """Tiles that need less shared memory: each device has another amount."""
        if self.stages > 2:
            return self._replace(stages=2)
        return self._replace(bm=self.bm // 2) if self.bm > 16 else None


# By tiles, types of x and weights, and device: those that are taken in their place.
_fitting: dict[tuple[object, ...], Tiles] = {}


@cache
def _cores(device: int) -> int:
    """Multiprocessors."""
    if not torch.cuda.is_available():
        return 8  # interpreted: parts along K are tested too
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def tiles(m: int, n: int, k: int, group: int, wide: bool, groupwise: bool, device: int) -> Tiles:
    """For m rows, a power of two: enough tiles that every multiprocessor has some.

    `wide`: x is f32, whose tiles are products of three parts each.
    """
    bm = min(max(m, 16), 64 if wide else 128)
    bn = 32 if wide else 64
    bk = group if groupwise else max(group, 64 if wide or bm > 64 else 128)
    count = triton.cdiv(n, bn) * triton.cdiv(m, bm)
    parts = 1
    while parts < 8 and count * parts < 2 * _cores(device) and k // bk >= 4 * parts:
        parts *= 2
    return Tiles(bm, bn, bk, parts, 4, 3)


@dataclass(frozen=True)
class Layer:
    """One linear layer's codes, scales and bias, as the kernels read them."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    bits: int
    group: int
    n: int
    k: int

    @property
    def groups(self) -> int:
        return -(-self.k // self.group) if self.group else 1

    def few(self, x: Tensor, y: Tensor) -> None:
        size = 16 if self.bits == 8 else min(16, self.group // 2)
        bn = 8 if self.n <= 8192 else 16
        grid = (triton.cdiv(self.n, bn), x.shape[0])
        kernels.few_rows[grid](
            x, self.weight, self.scale, self.zero, self.bias, y, self.n, self.k, self.groups,
            x.stride(0), BITS=self.bits, GROUP=self.group, BN=bn, CHUNKS=32, BYTES=size,
            num_warps=4,
        )  # fmt: skip

    def many(self, x: Tensor, rows: Tensor | None, y: Tensor, cut: Tiles | None = None) -> None:
        m = x.shape[0]
        groupwise = rows is not None and self.group > 0
        if cut is None:
            wide, power = x.dtype == torch.float32, triton.next_power_of_2(m)
            device = x.device.index or 0
            cut = tiles(power, self.n, self.k, self.group, wide, groupwise, device)
        to: Any = y
        if cut.parts > 1:
            kind = torch.int32 if x.dtype == torch.int8 else torch.float32
            to = torch.empty((cut.parts, m, self.n), dtype=kind, device=x.device)
        key = (cut, x.dtype, self.weight.dtype, x.device)
        while True:
            held = _fitting.get(key, cut)
            try:
                self._many(x, rows, to, held)
                break
            except OutOfResources:
                less = held.smaller()
                if less is None:
                    raise
                _fitting[key] = less
        if cut.parts > 1:
            self.finish(to, None if groupwise else rows, y)

    def _many(self, x: Tensor, rows: Tensor | None, to: Tensor, cut: Tiles) -> None:
        m = x.shape[0]
        grid = (triton.cdiv(self.n, cut.bn), triton.cdiv(m, cut.bm), cut.parts)
        kernels.many_rows[grid](
            x, rows, self.weight, self.scale, self.zero, self.bias, to, m, self.n, self.k,
            self.groups, x.stride(0), BITS=self.bits, GROUP=self.group, BM=cut.bm, BN=cut.bn,
            BK=cut.bk, PARTS=cut.parts, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def finish(self, parts: Tensor, rows: Tensor | None, y: Tensor) -> None:
        count, m, n = parts.shape
        bm = min(triton.next_power_of_2(m), 4)
        scale = None if self.group else self.scale
        kernels.finish[(triton.cdiv(n, 256), triton.cdiv(m, bm))](
            parts, rows, scale, self.bias, y, m, n, PARTS=count, BM=bm, BN=256, num_warps=4
        )

    def rounded(self, x: Tensor, y: Tensor) -> None:
        """Rows as codes too: i8 or f8 without groups, whole numbers as floats with them."""
        f8 = self.weight.dtype == torch.float8_e4m3fn
        kind = self.weight.dtype if not self.group else _EXACT_FLOATS
        codes = torch.empty(x.shape, dtype=kind, device=x.device)
        m, groups = x.shape[0], self.groups
        scales = torch.empty((m, groups), dtype=torch.float32, device=x.device)
        bk = self.group or min(triton.next_power_of_2(self.k), 4096)
        kernels.round_rows[(m, groups)](
            x, codes, scales, self.k, groups, x.stride(0), GROUP=self.group, BK=bk,
            MOST=LARGEST_F8 if f8 else 127.0, num_warps=1 if self.group else 8,
        )  # fmt: skip
        self.many(codes, scales, y)

    def floats(self, kind: torch.dtype) -> Tensor:
        """The weights [N, K] unpacked."""
        y = torch.empty((self.n, self.k), dtype=kind, device=self.weight.device)
        bk = max(256, self.group)
        kernels.unpack[(triton.cdiv(self.n, 16), triton.cdiv(self.k, bk))](
            self.weight, self.scale, self.zero, y, self.n, self.k, self.groups,
            BITS=self.bits, GROUP=self.group, BN=16, BK=bk, num_warps=4,
        )  # fmt: skip
        return y
