"""Whether both sides of a rule agree on one set of inputs, and where they differ most.

The rule is that of dfc/rewrite/agree.py, element by element where a value is not finite: what the
left side itself gets wrong, because a narrow type overflows on the way, binds nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfc.rewrite.agree import ULPS, _bits
from dfc.rewrite.pass_ import Numerics


@dataclass(frozen=True)
class Disagreement:
    """The worst element of one output: what the left side gives, the right one, and the witness.

    Units:  absolute errors; `relative` is the error against the largest element of the output.
    """

    output: int
    reason: str
    index: tuple[int, ...] = ()
    left: Any = None
    right: Any = None
    witness: float | None = None
    error: float = float("inf")
    allowed: float = 0.0
    relative: float = float("inf")


def same(right: Sequence[Any], left: Sequence[Any]) -> bool:
    """Bit for bit, any NaN being any NaN: nothing more need be asked."""
    return all(_exactly(i, x, o) is None for i, (x, o) in enumerate(zip(right, left, strict=True)))


def disagreement(
    right: Sequence[Any], left: Sequence[Any], witness: Sequence[Any], claim: Numerics
) -> Disagreement | None:
    """The first output for which the claim does not hold."""
    for i, (x, o, w) in enumerate(zip(right, left, witness, strict=True)):
        floating = isinstance(o, torch.Tensor) and (o.is_floating_point() or o.is_complex())
        if claim.kind == "exact" or not floating or _form(i, x, o):
            found = _exactly(i, x, o)
        elif o.is_complex():
            real = [torch.view_as_real(t.resolve_conj()) for t in (x, o, w)]
            found = _within(i, real[0], real[1], real[2], claim.rtol)
        else:
            found = _within(i, x, o, w, claim.rtol)
        if found is not None:
            return found
    return None


def _form(i: int, x: Any, o: Any) -> Disagreement | None:
    if isinstance(x, torch.Tensor) and isinstance(o, torch.Tensor):
        if x.dtype == o.dtype and x.shape == o.shape:
            return None
        reason = f"the right side gives {_type(x)}, the left {_type(o)}"
        return Disagreement(i, reason)
    return Disagreement(i, f"the right side gives {_type(x)}, the left {_type(o)}")


def _type(x: Any) -> str:
    from dfc.ir.types import TensorType

    return str(TensorType.of(x)) if isinstance(x, torch.Tensor) else repr(x)


def _exactly(i: int, x: Any, o: Any) -> Disagreement | None:
    if not isinstance(o, torch.Tensor):
        alike = type(x) is type(o) and (x == o or (x != x and o != o))
        return None if alike else Disagreement(i, f"the right side gives {x!r}, the left {o!r}")
    form = _form(i, x, o)
    if form is not None:
        return form
    a, b = _bits(x), _bits(o)
    if torch.equal(a, b):
        return None
    wrong = a != b
    if x.is_complex():
        x, o = torch.view_as_real(x.resolve_conj()), torch.view_as_real(o.resolve_conj())
    if x.is_floating_point():
        wrong &= ~(x.isnan() & o.isnan())
    if not bool(wrong.any()):
        return None
    size = (x.double() - o.double()).abs().nan_to_num(float("inf"), posinf=float("inf"))
    size = torch.where(wrong, size, -1.0)
    at = _at(size)
    reason = "the sides differ"
    if x.is_floating_point() and float(x[at]) == float(o[at]) == 0:
        reason = "the sides differ in the sign of zero"
    scale = float(o.double().abs().nan_to_num(0.0, posinf=0.0).max()) if o.numel() else 0.0
    error = float(size[at])
    return Disagreement(
        i, reason, at, _item(o, at), _item(x, at), None, error, 0.0, error / scale if scale else 0.0
    )


def _item(x: torch.Tensor, at: tuple[int, ...]) -> Any:
    return x[at].item()


def _at(x: torch.Tensor) -> tuple[int, ...]:
    """The place of the largest element."""
    return tuple(int(n) for n in torch.unravel_index(x.argmax(), x.shape))


def _within(
    i: int, x: torch.Tensor, o: torch.Tensor, w: torch.Tensor, rtol: float
) -> Disagreement | None:
    if not o.numel():
        return None
    wide = w.double()
    info = torch.finfo(o.dtype)
    edge = info.max * (1 - max(rtol, ULPS * info.eps))
    moved = _moved(x, o, wide, edge)
    if bool(moved.any()):
        at = tuple(int(n) for n in moved.nonzero()[0])
        return Disagreement(
            i,
            "infinities and NaN stand in other places",
            at,
            _item(o, at),
            _item(x, at),
            float(wide[at]),
        )
    known = o.isfinite() & x.isfinite() & wide.isfinite()
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(known, (x.double() - wide).abs(), zero)
    own = float(torch.where(known, (o.double() - wide).abs(), zero).max())
    scale = float(torch.where(known, wide.abs(), zero).max())
    # Below the smallest normal number kernels may flush to zero; f16 is computed in f32.
    floor = ULPS * info.tiny * info.eps if o.dtype == torch.float16 else info.tiny
    allowed = max(2 * own, ULPS * info.eps * scale, rtol * scale, floor)
    worst = float(error.max())
    if worst <= allowed:
        return None
    at = _at(error)
    return Disagreement(
        i, "the right side is too far off", at, _item(o, at), _item(x, at), float(wide[at]),
        worst, allowed, worst / scale if scale else float("inf"),
    )  # fmt: skip


def _moved(x: torch.Tensor, o: torch.Tensor, wide: torch.Tensor, edge: float) -> torch.Tensor:
    """Where an infinity or NaN stands on one side only, and the left side is not itself at fault.

    From `edge` on, rounding decides between a number and infinity.
    """
    alike = ((x == o) | (x.isnan() & o.isnan())) | (x.isfinite() & o.isfinite())
    # The left side overflows on the way to a number that its type can hold: it asks for nothing.
    spoilt = ~o.isfinite() & wide.isfinite() & (o.isnan() | (wide.abs() <= edge))
    # It overflows at the end: whatever is not finite says so.
    over = ~x.isfinite() & (wide.abs() >= edge) & ~(o.isfinite() & wide.isinf())
    over |= ~o.isfinite() & x.isfinite() & wide.isfinite() & (x.abs() >= edge)
    # It is not finite, and of another kind than in float64: either kind will do.
    other = ~o.isfinite() & ~wide.isfinite() & ((x == wide) | (x.isnan() & wide.isnan()))
    return ~(alike | spoilt | over | other)
