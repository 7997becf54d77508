"""Graphs that round values to codes while they run: how far their results may be."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Graph

# How far results may be from the reference's, of the largest element, where values are rounded: a
# kernel that adds in another order gives some values the next code.
ROUNDED_RTOL = 0.05
_ROUNDED_NORM = 1.5  # times the original's own distance from the witness
FARTHEST_OWN = 0.3  # an original farther than this proves nothing


def rounded_alike(result: Tensor, original: Tensor, witness: Tensor) -> bool:
    """Whether a result is about as near to the witness as the original is: both in norm.

    Why:  one code more in an outlier's row sends the row elsewhere, in float64 too. Such rows are
          few, and which ones is chance: the largest element says nothing then, the norm does.
    """
    scale = float(witness.double().norm())
    own = float((original.double() - witness.double()).norm())
    error = float((result.double() - witness.double()).norm())
    return isfinite(scale) and own <= FARTHEST_OWN * scale and error <= _ROUNDED_NORM * own


def rounds_values(graph: Graph) -> bool:
    """Whether values that are computed are rounded to codes while the graph runs."""
    from dfc.ir.graph import Parameter

    return any(
        (n.op == "dfc.quantize" and not isinstance(n.inputs[0], Parameter))
        or n.attributes.get("activations") in ("int8", "f8")
        for n in graph.walk()
    )


def coarsest(graph: Graph) -> float:
    """How far 1 is from the next number in the coarsest floats that nodes of the graph give.

    Why:  a result in float32 is no nearer than the bfloat16 numbers that it was made of.
    """
    from torch import finfo

    from dfc.ir.types import TensorType

    types = {r.type for n in graph.walk() for r in n.results if isinstance(r.type, TensorType)}
    found = {t.dtype for t in types if t.dtype.is_float and t.dtype.bits >= 16}  # others are codes
    return max((finfo(d.to_torch()).eps for d in found), default=0.0)
