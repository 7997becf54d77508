"""When do floats agree? One rule for the whole project.

Against the witness (the captured graph in float64), a result's error may be at most the larger of
twice the original's own error and k units in the last place of the tensor's largest element, and
non-finite elements must stand where the original's stand. Everything else must be equal.

What a pass promises (`rtol`) or a user allows (`rtol`, `atol`) only ever widens this: a result that
is nearer to the witness than the original was is never called wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfc.ops.rounding import rounded_alike

ULPS = 16


@dataclass(frozen=True)
class Difference:
    """How far one output is from the witness, and how far it may be.

    Units:  absolute errors; `index` is the worst element.
    """

    output: int
    reason: str
    error: float
    allowed: float
    index: tuple[int, ...] = ()
    got: float | None = None
    expected: float | None = None

    def __str__(self) -> str:
        if not self.index:
            return f"output {self.output}: {self.reason}"
        at = ", ".join(map(str, self.index))
        return (
            f"output {self.output}[{at}]: {self.reason}: got {self.got:.9g}, "
            f"the witness says {self.expected:.9g} "
            f"(error {self.error:.3g}, allowed {self.allowed:.3g})"
        )


@dataclass(frozen=True)
class Verdict:
    """The worst error over all outputs, and the first difference that is too large."""

    worst: float
    difference: Difference | None = None

    @property
    def agrees(self) -> bool:
        return self.difference is None


def judge(
    results: Sequence[Any],
    original: Sequence[Any],
    witness: Sequence[Any],
    *,
    exact: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
    rounded: bool = False,
) -> Verdict:
    """Compare results with the original's and the witness, output by output.

    Units:  rtol counts the output's largest element, atol is absolute.
    With `rounded`, for values that are rounded to codes on the way, an output that is as near to
    the witness in norm agrees as well.
    """
    worst = 0.0
    for i, (x, o, w) in enumerate(zip(results, original, witness, strict=True)):
        found = _one(i, x, o, w, exact, rtol, atol, rounded)
        if isinstance(found, Difference):
            return Verdict(max(worst, found.error), found)
        worst = max(worst, found)
    return Verdict(worst)


@dataclass(frozen=True)
class Element:
    """One element that is wrong, as the table of a message shows it."""

    index: tuple[int, ...]
    got: float
    original: float
    witness: float
    error: float
    allowed: float


def worst_elements(x: Any, o: Any, w: Any, allowed: float, count: int = 5) -> tuple[Element, ...]:
    """The elements of a result that are farthest from the witness, the worst first.

    An element that is not finite where the original's is, or the other way about, is infinitely
    far; where the witness cannot tell, the original stands in for it.
    """
    tensors = all(isinstance(t, torch.Tensor) for t in (x, o, w))
    if not tensors or x.shape != o.shape or not x.numel():
        return ()
    w = w if w.shape == o.shape else o
    if o.is_complex():
        x, o, w = (torch.view_as_real(t.resolve_conj()) for t in (x, o, w))
    x, o, w = (t.detach().cpu().double() for t in (x, o, w))
    w = torch.where(w.isfinite(), w, o)
    error = torch.where((x == w) | (x.isnan() & w.isnan()), 0.0, (x - w).abs())
    error = torch.where(error.isnan(), torch.inf, error).reshape(-1)
    # An exact promise may be broken by bits that the witness is too far away to see.
    order = error if bool((error > allowed).any()) else (x - o).abs().reshape(-1)
    found = []
    for at in order.topk(min(count, order.numel())).indices.tolist():
        index = tuple(int(n) for n in torch.unravel_index(torch.tensor(at), x.shape))
        got, original, witness = (float(t.reshape(-1)[at]) for t in (x, o, w))
        found.append(Element(index, got, original, witness, float(error[at]), allowed))
    wrong = [e for e in found if e.error > allowed]
    return tuple(wrong or (e for e in found if e.got != e.original))


def _one(
    i: int, x: Any, o: Any, w: Any, exact: bool, rtol: float, atol: float, rounded: bool
) -> Difference | float:
    if not isinstance(o, torch.Tensor):
        same = type(x) is type(o) and (x == o or (x != x and o != o))
        return 0.0 if same else Difference(i, f"got {x!r}, expected {o!r}", float("inf"), 0.0)
    if not isinstance(x, torch.Tensor) or x.dtype != o.dtype or x.shape != o.shape:
        return Difference(i, f"got {_brief(x)}, expected {_brief(o)}", float("inf"), 0.0)
    if not x.numel():
        return 0.0
    x, o = x.detach().cpu(), o.detach().cpu()
    codes = o.element_size() == 1  # of float8 too, for which torch has no arithmetic
    if exact or codes or not (o.is_floating_point() or o.is_complex()):
        return _equal(i, x, o)
    if w.shape != o.shape:
        w = o  # data decide the size, and in float64 a comparison went the other way
    if o.is_complex():
        x, o, w = (torch.view_as_real(t.resolve_conj()) for t in (x, o, w))
    found = _near(i, x, o, w.detach().cpu(), rtol, atol)
    if rounded and isinstance(found, Difference) and rounded_alike(x, o, w.detach().cpu()):
        return found.error
    return found


def _brief(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def _bits(x: torch.Tensor) -> torch.Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.contiguous()
    return x.view(integer[x.element_size()]) if x.is_floating_point() else x


def _equal(i: int, x: torch.Tensor, o: torch.Tensor) -> Difference | float:
    """Same bits; any NaN equals any NaN, because PyTorch promises no payload."""
    a, b = _bits(x), _bits(o)
    if torch.equal(a, b):
        return 0.0
    if x.is_complex():
        x, o = torch.view_as_real(x.resolve_conj()), torch.view_as_real(o.resolve_conj())
    wrong = a != b
    if x.is_floating_point():
        wrong &= ~(x.isnan() & o.isnan())
    if not bool(wrong.any()):
        return 0.0
    at = tuple(int(n) for n in wrong.nonzero()[0])
    got, expected = float(x[at]), float(o[at])
    return Difference(i, "bits changed", abs(got - expected), 0.0, at or (0,), got, expected)


def _near(
    i: int, x: torch.Tensor, o: torch.Tensor, w: torch.Tensor, rtol: float, atol: float
) -> Difference | float:
    wide = w.double()
    # The narrow type overflowed on the way, the witness did not, and neither did the result: it may
    # be more exact than the original, and is judged by the witness like any other element.
    better = ~o.isfinite() & wide.isfinite() & x.isfinite()
    finite = o.isfinite()
    moved = ((finite ^ x.isfinite()) | (o.isnan() ^ x.isnan())) & ~better
    if bool(moved.any()):
        at = tuple(int(n) for n in moved.nonzero()[0])
        got, expected = float(x[at]), float(o[at])
        return Difference(
            i, "a non-finite element moved", float("inf"), 0.0, at or (0,), got, expected
        )
    infinite = o.isinf() & ~better
    if bool(infinite.any()) and not torch.equal(x[infinite], o[infinite]):
        return Difference(i, "an infinity changed sign", float("inf"), 0.0)
    # Where float64 and the original differ in kind (overflow of the narrow type) nothing is said.
    known = finite & wide.isfinite()
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(known | better, (x.double() - wide).abs(), zero)
    own = float(torch.where(known, (o.double() - wide).abs(), zero).max())
    scale = float(torch.where(known, wide.abs(), zero).max())
    if not bool(known.any()):
        scale = float(torch.where(better, wide.abs(), zero).max())
    eps = torch.finfo(o.dtype).eps
    allowed = max(2 * own, ULPS * eps * scale, rtol * scale, atol)
    worst = float(error.max())
    if worst <= allowed:
        return worst
    at = tuple(int(n) for n in torch.unravel_index(error.argmax(), error.shape))
    return Difference(
        i, "too far from the witness", worst, allowed, at or (0,), float(x[at]), float(wide[at])
    )
