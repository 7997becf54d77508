"""Linear layers with quantized weights as Triton kernels: they read the codes as they are stored.

Codes become floats in registers, so that memory gives a quarter or half of the bytes that weights
of 16 bits take. `few_rows` adds up products; `many_rows` multiplies tiles on tensor cores, in parts
along K where there are few tiles, which `finish` adds up. `unpack` writes floats for cuBLAS.

A weight of four bits is u8[N, G*GROUP/2], the low nibble first; one of eight bits is i8 or f8
[N, K]. Scales are [N, G], or [N] with GROUP = 0. Offsets of weights are 64-bit: tables are large.
Rows of x lie x_step numbers apart.
Source:  the formats are those of dfc/ops/linear_quantized.py and linear_f8.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _digits(codes):
    """2**23 + code as f32, code a byte.

    Why:  written into the digits it takes one operation; converting integers takes four times that.
    """
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _wide(codes):
    """Codes of eight bits as f32: i8, or f8."""
    if codes.dtype == tl.int8:
        wide = _digits(codes.to(tl.uint8, bitcast=True) ^ 128) - 8388736.0
    else:
        wide = codes.to(tl.float32)
    return wide


@triton.jit
def _zero(zero, ns, groups, inside, G):
    """2**23 + zero point [BN, groups] as f32; the offset 8 where there are none."""
    if zero is None:
        points = tl.where(inside, 8388616.0, 8388616.0)
    else:
        at = ns.to(tl.int64)[:, None] * ((G + 1) // 2) + (groups // 2)[None, :]
        byte = tl.load(zero + at, mask=inside, other=0)
        points = _digits((byte >> ((groups % 2) * 4).to(tl.uint8)[None, :]) & 15)
    return points


@triton.jit
def few_rows(
    x, weight, scale, zero, bias, y, n, k, G, x_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """One row of y for each of the second index: products added up, in f32.

    A thread reads a chunk of BYTES codes of one row and one scale, and adds up without others.
    """
    row = tl.program_id(1).to(tl.int64)
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    in_n = ns < n
    each: tl.constexpr = BYTES * 8 // BITS  # codes of a chunk
    width = G * GROUP * BITS // 8 if BITS == 4 else k  # bytes of a weight's row
    begin = weight + ns.to(tl.int64)[:, None, None] * width
    total = tl.zeros((BN, CHUNKS), tl.float32)
    for first in range(0, tl.cdiv(k, each), CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        at = chunks[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        codes = tl.load(begin + at[None], mask=in_n[:, None, None] & (at < width)[None], other=0.0)
        if BITS == 4:
            ks = chunks[:, None] * each + tl.arange(0, each)[None, :]
            given = tl.load(x + row * x_step + ks, mask=ks < k, other=0).to(tl.float32)
            low, high = tl.split(tl.reshape(given, (CHUNKS, BYTES, 2)))
            groups = chunks * each // GROUP
            inside = in_n[:, None] & (groups < G)[None, :]
            points = _zero(zero, ns, groups, inside, G)[:, :, None]
            products = (_digits(codes & 15) - points) * low[None]
            products += (_digits(codes >> 4) - points) * high[None]
        else:
            given = tl.load(x + row * x_step + at, mask=at < k, other=0).to(tl.float32)
            products = _wide(codes) * given[None]
        sums = tl.sum(products, 2)
        if GROUP:
            groups = chunks * each // GROUP
            inside = in_n[:, None] & (groups < G)[None, :]
            where = scale + ns.to(tl.int64)[:, None] * G + groups[None, :]
            sums *= tl.load(where, mask=inside, other=0).to(tl.float32)
        total += sums
    found = tl.sum(total, 1)
    if GROUP == 0:
        found *= tl.load(scale + ns, mask=in_n, other=0).to(tl.float32)
    if bias is not None:
        found += tl.load(bias + ns, mask=in_n, other=0).to(tl.float32)
    tl.store(y + row * n + ns, found, mask=in_n)


@triton.jit
def many_rows(
    x, rows, weight, scale, zero, bias, y, m, n, k, G, x_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y[M, N], or PARTS sums of it along K that `finish` adds up, of f32 or i32.

    `rows`: None for an x of floats. Else x holds codes, and their scales are `rows`: of [M] with
    GROUP = 0, of [M, G] with a group, which then is BK. Sums of such codes are exact.
    """
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    in_n, in_m = ns < n, ms < m
    groupwise: tl.constexpr = (rows is not None) and GROUP > 0
    whole: tl.constexpr = x.dtype.element_ty == tl.int8
    kind: tl.constexpr = tl.int32 if whole else tl.float32
    total = tl.zeros((BN, BM), kind)
    steps = tl.cdiv(k, BK)
    each = tl.cdiv(steps, PARTS)
    from_x = x + ms.to(tl.int64)[:, None] * x_step
    for step in range(tl.program_id(2) * each, min((tl.program_id(2) + 1) * each, steps)):
        ks = step * BK + tl.arange(0, BK)
        given = tl.load(from_x + ks[None, :], mask=in_m[:, None] & (ks < k)[None, :], other=0.0)
        if GROUP:
            groups = step * (BK // GROUP) + tl.arange(0, BK // GROUP)
            inside = in_n[:, None] & (groups < G)[None, :]
            where = scale + ns.to(tl.int64)[:, None] * G + groups[None, :]
            by = tl.load(where, mask=inside, other=0).to(tl.float32)
        if BITS == 4:
            half: tl.constexpr = GROUP // 2
            at = groups[:, None] * half + tl.arange(0, half)[None, :]
            begin = weight + ns.to(tl.int64)[:, None, None] * (G * half)
            codes = tl.load(begin + at[None], mask=inside[:, :, None], other=0)
            points = _zero(zero, ns, groups, inside, G)[:, :, None]
            low, high = _digits(codes & 15) - points, _digits(codes >> 4) - points
            if not groupwise:
                low, high = low * by[:, :, None], high * by[:, :, None]
            low = tl.reshape(low.to(x.dtype.element_ty), (BN, BK // 2))
            high = tl.reshape(high.to(x.dtype.element_ty), (BN, BK // 2))
            even, odd = tl.split(tl.reshape(given, (BM, BK // 2, 2)))
            start = tl.zeros((BN, BM), kind) if groupwise else total
            sums = tl.dot(low, tl.trans(even), start, input_precision="tf32x3")
            sums = tl.dot(high, tl.trans(odd), sums, input_precision="tf32x3")
        else:
            begin = weight + ns.to(tl.int64)[:, None] * k
            mask = in_n[:, None] & (ks < k)[None, :]
            codes = tl.load(begin + ks[None, :], mask=mask, other=0.0)
            if codes.dtype != x.dtype.element_ty:
                if GROUP and not groupwise:
                    wide = tl.reshape(_wide(codes), (BN, BK // GROUP, GROUP)) * by[:, :, None]
                    codes = tl.reshape(wide, (BN, BK)).to(x.dtype.element_ty)
                elif x.dtype.element_ty == tl.bfloat16:
                    codes = codes.to(tl.bfloat16)
                else:
                    codes = _wide(codes).to(x.dtype.element_ty)
            start = tl.zeros((BN, BM), kind) if groupwise else total
            if whole:
                sums = tl.dot(codes, tl.trans(given), start, out_dtype=tl.int32)
            else:  # sums of f8 in all digits of f32
                sums = tl.dot(
                    codes, tl.trans(given), start, input_precision="tf32x3",
                    max_num_imprecise_acc=0,
                )  # fmt: skip
        if groupwise:
            from_rows = tl.load(rows + ms.to(tl.int64) * G + step, mask=in_m, other=0)
            total += sums * from_rows[None, :] * by
        else:
            total = sums
    found = tl.trans(total)
    inside_y = in_m[:, None] & in_n[None, :]
    at_y = ms.to(tl.int64)[:, None] * n + ns[None, :]
    if PARTS > 1:
        at_part = tl.program_id(2).to(tl.int64) * m * n + at_y
        tl.store(y + at_part, found, mask=inside_y)
    else:
        if GROUP:
            made = _scaled(found, ms, ns, in_m, in_n, None, None, bias)
        else:
            made = _scaled(found, ms, ns, in_m, in_n, rows, scale, bias)
        tl.store(y + at_y, made, mask=inside_y)


@triton.jit
def _scaled(found, ms, ns, in_m, in_n, rows, scale, bias):
    """Sums times the scales of rows and of outputs, plus the bias, in f32."""
    made = found.to(tl.float32)
    if rows is not None:
        made *= tl.load(rows + ms, mask=in_m, other=0)[:, None]
    if scale is not None:
        made *= tl.load(scale + ns, mask=in_n, other=0).to(tl.float32)[None, :]
    if bias is not None:
        made += tl.load(bias + ns, mask=in_n, other=0).to(tl.float32)[None, :]
    return made


@triton.jit
def finish(
    parts, rows, scale, bias, y, m, n,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[M, N] of sums [PARTS, M, N], in order, so that every run gives the same bits."""
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    ms = tl.program_id(1) * BM + tl.arange(0, BM)
    in_n, in_m = ns < n, ms < m
    inside = in_m[:, None] & in_n[None, :]
    at = ms.to(tl.int64)[:, None] * n + ns[None, :]
    size = tl.cast(m, tl.int64) * n  # an m of 1 is a constant here
    total = tl.load(parts + at, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size + at, mask=inside, other=0)
    tl.store(y + at, _scaled(total, ms, ns, in_m, in_n, rows, scale, bias), mask=inside)


@triton.jit
def round_rows(
    x, codes, scales, k, G, x_step,
    GROUP: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Each row of x, or with a GROUP that is BK each group of it, as codes up to MOST and a scale.

    Codes are i8, f8, or whole numbers as floats: of the type that `codes` has.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BK
    last = first + BK if GROUP else k
    peaks = tl.zeros((BK,), tl.float32)
    for begin in range(first, last, BK):
        ks = begin + tl.arange(0, BK)
        given = tl.abs(tl.load(x + row * x_step + ks, mask=ks < k, other=0).to(tl.float32))
        peaks = tl.maximum(peaks, given, propagate_nan=tl.PropagateNan.ALL)
    # NaN reaches the scale, and by it the whole row: maxima over threads would pass it by.
    broken = tl.sum((peaks != peaks).to(tl.int32), 0)
    peak = tl.max(peaks, 0)
    scale = tl.where(peak == 0, 1.0, tl.div_rn(peak, tl.cast(MOST, tl.float32)))
    scale = tl.where(broken > 0, float("nan"), scale)
    tl.store(scales + row * G + tl.program_id(1), scale)
    for begin in range(first, last, BK):
        ks = begin + tl.arange(0, BK)
        given = tl.load(x + row * x_step + ks, mask=ks < k, other=0).to(tl.float32)
        made = tl.div_rn(given, scale)
        if codes.dtype.element_ty.primitive_bitwidth == 8 and MOST != 127:
            made = tl.clamp(made, -MOST, MOST)
        else:  # to the nearest whole number, halves to the even one
            made = (made + 12582912.0) - 12582912.0
        tl.store(codes + row * k + ks, made.to(codes.dtype.element_ty), mask=ks < k)


@triton.jit
def unpack(
    weight, scale, zero, y, n, k, G,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The floats [N, K] that codes stand for, each rounded once."""
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    in_n = ns < n
    wide_ns = ns.to(tl.int64)[:, None]
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    inside_y = in_n[:, None] & (ks < k)[None, :]
    if BITS == 4:
        at = tl.program_id(1) * (BK // 2) + tl.arange(0, BK // 2)
        groups = at // (GROUP // 2)
        inside = in_n[:, None] & (groups < G)[None, :]
        codes = tl.load(weight + wide_ns * (G * GROUP // 2) + at[None, :], mask=inside, other=0)
        by = tl.load(scale + wide_ns * G + groups[None, :], mask=inside, other=0).to(tl.float32)
        points = _zero(zero, ns, groups, inside, G)
        low, high = (_digits(codes & 15) - points) * by, (_digits(codes >> 4) - points) * by
        kind = y.dtype.element_ty
        found = tl.reshape(tl.join(low.to(kind), high.to(kind)), (BN, BK))
    else:
        codes = tl.load(weight + wide_ns * k + ks[None, :], mask=inside_y, other=0.0)
        if GROUP:
            where = scale + wide_ns * G + (ks // GROUP)[None, :]
            by = tl.load(where, mask=inside_y, other=0).to(tl.float32)
        else:
            by = tl.load(scale + ns, mask=in_n, other=0).to(tl.float32)[:, None]
        found = (_wide(codes) * by).to(y.dtype.element_ty)
    tl.store(y + wide_ns * k + ks[None, :], found, mask=inside_y)
