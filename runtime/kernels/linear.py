"""`torch.ops.dfc.linear_w4` and `linear_w8`: linear layers on packed weights, for torch's engines.

What they compute is what the ops of the same names mean with activations="int8"
(dfc/ops/linear_quantized.py); weights are packed once by `pack_w4` and `pack_w8`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dfc.runtime.kernels.library import HALF_SCALES, ZEROS, Library, library
from dfc.runtime.kernels.memory import huge

GELU = 1  # of x, before it is multiplied: kernels.h
_SCHEMA = "(Tensor x, Tensor packed, Tensor? bias, int n, int group, int before=0) -> Tensor"
_WHY = {1: "the packed weight does not fit", 2: "out of memory", 3: "no such path"}


def pack_w4(packed: Tensor, scale: Tensor, zero: Tensor | None, k: int, group: int) -> Tensor:
    """Codes of four bits, as `dfc.linear_w4` has them, in the kernels' own layout.

    Needs:   the kernels (`library()` is not None).
    Raises:  ValueError for what cannot be packed.
    """
    return _pack(4, packed, scale, zero, k, group)


def pack_w8(weight: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """Codes of eight bits, as `dfc.linear_w8` has them, in the kernels' own layout."""
    return _pack(8, weight, scale, None, weight.shape[1], group or 0)


def packed_bytes(
    bits: int, n: int, k: int, group: int, flags: int = 0, fixes: int = 0
) -> int | None:
    """How large a packed weight is; None for sizes that the kernels do not take."""
    size = int(_library().c.dfc_packed_bytes(bits, n, k, group, flags, fixes))
    return None if size < 0 else size


def is_packed(packed: Tensor, bits: int, n: int, k: int, group: int) -> bool:
    """Whether a tensor of bytes is a whole packed weight of this shape."""
    data = packed.data_ptr(), packed.numel()
    return bool(_library().c.dfc_packed_check(*data, bits, n, k, group) == 0)


def _pack(
    bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None, k: int, group: int
) -> Tensor:
    n = codes.shape[0]
    wide = scale.detach().to(torch.float32).contiguous()
    flags = (HALF_SCALES if _is_half(wide) else 0) | (0 if zero is None else ZEROS)
    codes = codes.contiguous()
    lanes, fixes = _lanes(codes) if bits == 8 and not group else (0, 0)
    flags |= lanes
    size = packed_bytes(bits, n, k, group, flags, fixes)
    groups = -(-k // group) if group else 1
    row = k if bits == 8 else groups * group // 2
    if size is None or codes.numel() != n * row or wide.numel() != n * groups:
        raise ValueError(f"no packed layout for {n} x {k} of {bits} bits in groups of {group}")
    if zero is not None and zero.numel() != n * ((groups + 1) // 2):
        raise ValueError(f"{zero.numel()} bytes of zero points for {n} x {groups} groups")
    zero = None if zero is None else zero.contiguous()
    out = huge(size)
    status = _library().c.dfc_pack(
        bits, n, k, group, flags, fixes, codes.data_ptr(), wide.data_ptr(),
        None if zero is None else zero.data_ptr(), out.data_ptr(), size, torch.get_num_threads(),
    )  # fmt: skip
    _check(status)
    return out


def _lanes(codes: Tensor) -> tuple[int, int]:
    """How codes i8[N, K] are multiplied with many rows: a flag, and what a panel then has."""
    fixes = ctypes.c_int64()
    flag = int(_library().c.dfc_lanes(*codes.shape, codes.data_ptr(), ctypes.byref(fixes)))
    return flag, fixes.value


def _is_half(scale: Tensor) -> bool:
    """Whether scales lose nothing as float16."""
    return bool(torch.equal(scale.to(torch.float16).to(torch.float32), scale))


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, before: int = 0, path: str | None = None
) -> Tensor:
    """`x`, or its GELU, times a packed weight of n outputs, plus `bias`.

    Raises:  RuntimeError where dtypes, devices or sizes do not fit.
    """
    found = _library()
    k = x.shape[-1] if x.dim() else 0
    _require(x.dtype is torch.float32 and x.is_cpu, "x is not f32 on the CPU")
    _require(packed.dtype is torch.uint8 and packed.is_contiguous(), "packed is not bytes")
    _require(packed.is_cpu, "packed is not on the CPU")
    if bias is not None:
        if bias.dtype is not torch.float32 or bias.numel() != n or not bias.is_cpu:
            _require(False, f"bias is not f32[{n}] on the CPU")
        bias = bias.contiguous()
    x, apart = _rows(x)
    y = x.new_empty((*x.shape[:-1], n))
    status = found.c.dfc_linear(
        packed.data_ptr(), packed.numel(), x.data_ptr(), apart, x.numel() // k if k else 0, k,
        None if bias is None else bias.data_ptr(), y.data_ptr(), n, before,
        torch.get_num_threads(), (path or found.path).encode(),
    )  # fmt: skip
    _check(status)
    return y


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x`, and how far apart its rows are: a part of a wider one is read where it lies."""
    k = x.shape[-1] if x.dim() else 0
    if not x.is_contiguous() and x.dim() > 1 and x.stride(-1) == 1 and x.stride(-2) >= k:
        outer = range(x.dim() - 2)
        if all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in outer):
            return x, x.stride(-2)
    return x.contiguous(), k


class Bound:
    """A packed weight as a function of x and bias: what `linear` does, with less around it.

    Why:  one row takes some 50 microseconds; torch's dispatcher and checks would be a third.
    """

    def __init__(self, packed: Tensor, n: int, k: int, before: int = 0) -> None:
        found = _library()
        self.packed = packed  # keeps what the pointer leads to
        self.n, self.k, self.before = n, k, before
        self._weight = packed.data_ptr(), packed.numel()
        self._path = found.path.encode()
        self._call = found.c.dfc_linear

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is not torch.float32 or not x.is_cpu or x.shape[-1] != self.k:
            raise RuntimeError(f"dfc linear: x is not f32[.., {self.k}] on the CPU")
        x, apart = (x, self.k) if x.is_contiguous() else _rows(x)
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        y = x.new_empty((*x.shape[:-1], self.n))  # takes less than torch.empty
        status = self._call(
            *self._weight, x.data_ptr(), apart, x.numel() // self.k, self.k,
            None if bias is None else bias.data_ptr(), y.data_ptr(), self.n, self.before,
            torch.get_num_threads(), self._path,
        )  # fmt: skip
        if status:
            _check(status)
        return y


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise RuntimeError(f"dfc linear: {why}")


def _check(status: int) -> None:
    _require(status == 0, _WHY.get(status, f"status {status}"))


def _library() -> Library:
    found = library()
    _require(found is not None, "the kernels are not built: see `dfc doctor`")
    assert found is not None
    return found


@cache
def register() -> torch.library.Library:
    """Make `torch.ops.dfc.linear_w4` and `linear_w8` known; the library keeps them alive."""
    ops: Any = torch.library.Library("dfc", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("linear_w4", "linear_w8"):
        ops.define(name + _SCHEMA)
        ops.impl(name, _run, "CPU")
        ops.impl(name, _shape, "Meta")
    return ops  # type: ignore[no-any-return]


def _run(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, before: int = 0
) -> Tensor:
    return linear(x, packed, bias, n, before)


def _shape(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, before: int = 0
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))
