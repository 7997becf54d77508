"""What a sample of a rule gives to its names: types with marks, numbers, words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfc.ir.types import DTYPES, TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.conditions import evaluate
from dfc.rewrite.deciding import Facts, Undecided
from dfc.rewrite.rule import CONSTANTS, walk

MAX_ELEMENTS = 200_000  # of one tensor of a sample
MAX_RANK = 12


class Unbuildable(Exception):
    """The sample's types do not make a graph of this pattern, and why."""


class Refused(Unbuildable):
    """An op refuses the operands that the sample gives it."""


@dataclass(frozen=True)
class Spec:
    """The type of one input of a sample, and its mark.

    `constant` is a parameter with data. `moderate` is what activations are: finite and not large.
    `halves` and `pairs` hold everything twice along the last dimension.
    """

    type: TensorType
    mark: str = ""

    @property
    def constant(self) -> bool:
        return self.mark == "constant"

    def __str__(self) -> str:
        return f"{self.type}{self.mark and ' '}{self.mark}"


MARKS = ("constant", "moderate", "halves", "pairs")


Given = Any  # Spec | tuple of Spec, of a tail | number, text, dtype or tuple of an attribute
Case = Mapping[str, Given]


def case_of(sample: s.Sample) -> dict[str, Given]:
    """What a sample gives to the rule's names. A named size stands for a number of its own.

    Raises:  Unbuildable for a dimension or a value that is no constant.
    """
    sizes: dict[str, int] = {}
    found: dict[str, Given] = {}
    for g in sample.given:
        if isinstance(g, s.Typed):
            dtype = DTYPES.get(g.type.dtype.name)
            if dtype is None:
                raise Unbuildable(f"`{g.type.dtype.name}` is no element type")
            shape = tuple(_number(d, sizes) for d in g.type.dims)
            if any(not isinstance(d, int) or d < 0 for d in shape):
                raise Unbuildable(f"`{g.name.name}` has a size that is no number")
            if math.prod(shape) > MAX_ELEMENTS or len(shape) > MAX_RANK:
                limits = f"{MAX_ELEMENTS} elements and {MAX_RANK} dimensions"
                raise Unbuildable(f"`{g.name.name}` is too large for a sample: at most {limits}")
            mark = "" if g.mark is None else g.mark.name
            if mark and mark not in MARKS:
                raise Unbuildable(f"`{mark}` is no mark; there are {', '.join(MARKS)}")
            found[g.name.name] = Spec(TensorType(dtype, shape), mark)
        else:
            found[g.name.name] = _number(g.value, sizes)
    return found


def _number(x: s.Expr, sizes: dict[str, int]) -> Any:
    if isinstance(x, s.Number | s.Text):
        return x.value
    if isinstance(x, s.Word):
        if x.name in CONSTANTS:
            return CONSTANTS[x.name]
        return sizes.setdefault(x.name, (5, 7, 3, 6, 4)[len(sizes) % 5] + 6 * (len(sizes) // 5))
    if isinstance(x, s.Several):
        return tuple(_number(i, sizes) for i in x.items)
    if isinstance(x, s.Unary | s.Binary) and not any(isinstance(w, s.Call) for w in walk(x)):
        names = {w.name: _number(w, sizes) for w in walk(x) if isinstance(w, s.Word)}
        try:
            return evaluate(x, names, Facts())
        except Undecided as e:
            raise Unbuildable(str(e)) from None
    raise Unbuildable(f"`{expression_text(x)}` is no constant")
