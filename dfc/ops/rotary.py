"""Rotary position embedding: pairs of elements turned by an angle that grows with the position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.expr import Size
from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, TensorType, total_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.emit.onnx_builder import Builder as OnnxBuilder
    from dfc.emit.onnx_builder import Val
    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


@declare
@dataclass(frozen=True)
class RotaryEmbedding(Op):
    """Turn the pairs of the first R elements of each head: `(a cos - b sin, a sin + b cos)`.

    A pair is elements i and i + R/2, or, interleaved, 2i and 2i + 1. Elements from R on pass.

    Shapes:  x: float[B, H, T, D], cos: float[B, T, R/2], sin: float[B, T, R/2] -> float[B, H, T, D]
             with positions: int[B, T], cos and sin are float[M, R/2], a row for each position
    C1:      x is [B, H, T, D].
    C2:      cos is [B, T, R/2], or [M, R/2] with positions.
    C3:      sin has the type of cos.
    C4:      cos has x's float dtype.
    C5:      R is at most D.
    C6:      positions is i64 or i32 [B, T].
    Source:  ONNX RotaryEmbedding-23 with a 4-dimensional input.
    Why:     R is read off cos, so an attribute cannot contradict it.
    """

    name = "rotary_embedding"
    precision = "follow"
    cases = (
        "x=f32[2,3,5,8] cos=f32[2,5,4] sin=f32[2,5,4]",
        "x=f32[2,3,5,8] cos=f32[2,5,4] sin=f32[2,5,4] interleaved=True",
        "x=f32[2,3,5,8] cos=f32[2,5,3] sin=f32[2,5,3]",
        "x=f32[1,2,3,7] cos=f32[1,3,2] sin=f32[1,3,2] interleaved=True",
        "x=f64[2,3,5,8] cos=f64[7,4] sin=f64[7,4] positions=i64[2,5]",
        "x=f32[B,3,S,8] cos=f32[B,S,4] sin=f32[B,S,4]",
        "x=f32[B,3,S,8] cos=f32[7,2] sin=f32[7,2] positions=i64[B,S] interleaved=True",
    )
    rejects = (
        "C1 x=f32[2,5,8] cos=f32[2,5,4] sin=f32[2,5,4]",
        "C2 x=f32[2,3,5,8] cos=f32[1,5,4] sin=f32[1,5,4]",
        "C2 x=f32[B,3,S,8] cos=f32[S,B,4] sin=f32[S,B,4]",
        "C2 x=f32[2,3,5,8] cos=f32[2,5,4] sin=f32[2,5,4] positions=i64[2,5]",
        "C3 x=f32[2,3,5,8] cos=f32[2,5,4] sin=f32[2,5,3]",
        "C4 x=f16[2,3,5,8] cos=f32[2,5,4] sin=f32[2,5,4]",
        "C5 x=f32[2,3,5,8] cos=f32[2,5,8] sin=f32[2,5,8]",
        "C5 x=f32[2,3,5,D] cos=f32[2,5,4] sin=f32[2,5,4]",
        "C6 x=f32[2,3,5,8] cos=f32[7,4] sin=f32[7,4] positions=i64[5]",
        "C6 x=f32[2,3,5,8] cos=f32[7,4] sin=f32[7,4] positions=f32[2,5]",
    )

    interleaved: bool = False

    def infer(
        self,
        x: TensorType,
        cos: TensorType,
        sin: TensorType,
        positions: TensorType | None = None,
    ) -> TensorType:
        self.require("C1", x.rank == 4, f"x is {x}")
        batch, _, tokens, d = x.shape
        fits = cos.shape[:-1] == (batch, tokens) if positions is None else cos.rank == 2
        self.require("C2", fits, f"cos is {cos}, x is {x}")
        self.require("C3", sin == cos, f"sin is {sin}, cos is {cos}")
        self.require("C4", x.dtype.is_float and cos.dtype == x.dtype, f"cos is {cos}, x is {x}")
        r = 2 * cos.shape[-1]
        inside = r <= d if isinstance(r, int) and isinstance(d, int) else r == d
        self.require("C5", inside, f"cos is {cos}, x is {x}")
        fits = positions is None or (
            positions.shape == (batch, tokens) and positions.dtype in (DTYPES["i64"], DTYPES["i32"])
        )
        self.require("C6", fits, f"positions is {positions}, x is {x}")
        return x

    def reference(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]  # one angle for all heads
        turned = x.clone()
        if self.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)
        a, b = x[..., first], x[..., second]
        turned[..., first] = a * cos - b * sin
        turned[..., second] = a * sin + b * cos
        return turned

    def decompose(
        self, b: Builder, x: Value, cos: Value, sin: Value, positions: Value | None = None
    ) -> Value:
        if positions is not None:
            cos = b("aten.embedding.default", cos, positions)
            sin = b("aten.embedding.default", sin, positions)
        half, d = cos.tensor_type.shape[-1], x.tensor_type.shape[-1]
        r = half * 2
        cos, sin = (b("aten.unsqueeze.default", c, dim=1) for c in (cos, sin))
        head = x if r == d else b("aten.slice.Tensor", x, dim=3, start=0, end=r)
        turn = _interleaved if self.interleaved else _halves
        doubled, across = turn(b, head, cos, sin, half)
        turned = b("aten.add.Tensor", doubled, across)
        if r == d:
            return turned
        rest = b("aten.slice.Tensor", x, dim=3, start=r, end=d)
        return b("aten.cat.default", [turned, rest], dim=3)

    def to_onnx(
        self, b: OnnxBuilder, x: Val, cos: Val, sin: Val, positions: Val | None = None
    ) -> Val | None:
        """ONNX's op from opset 23 on; its kernels take no float64."""
        if b.root.opset < 23 or b.type(x).dtype.name == "f64":
            return None
        if positions is not None:
            positions = b.cast_to(positions, DTYPES["i64"])
        r, (_, heads, _, d) = 2 * b.dim(cos, -1), b.type(x).shape
        part = {} if r == d else {"rotary_embedding_dim": r, "num_heads": heads}
        if not all(isinstance(size, int) for size in part.values()):
            return None
        options = {"interleaved": int(self.interleaved), **part}
        return b.op("RotaryEmbedding", x, cos, sin, positions, **options)  # type: ignore[no-any-return]

    def cost(
        self,
        x: TensorType,
        cos: TensorType,
        sin: TensorType,
        positions: TensorType | None = None,
    ) -> Cost:
        batch, heads, tokens, _ = x.shape
        pairs = batch * heads * tokens * cos.shape[-1]
        return Cost(6 * pairs, total_bytes(x, cos, sin, positions), x.nbytes)


def _halves(b: Builder, x: Value, cos: Value, sin: Value, half: Size) -> tuple[Value, Value]:
    """`x * cat(cos, cos)` and `cat(-x2, x1) * cat(sin, sin)`, as models write it by hand."""
    first = b("aten.slice.Tensor", x, dim=3, start=0, end=half)
    second = b("aten.slice.Tensor", x, dim=3, start=half, end=2 * half)
    across = b("aten.cat.default", [b("aten.neg.default", second), first], dim=3)
    twice = [b("aten.cat.default", [c, c], dim=3) for c in (cos, sin)]
    return b("aten.mul.Tensor", x, twice[0]), b("aten.mul.Tensor", across, twice[1])


def _interleaved(b: Builder, x: Value, cos: Value, sin: Value, half: Size) -> tuple[Value, Value]:
    """The same with the pairs side by side."""
    shape = x.tensor_type.shape
    pairs = b("aten.view.default", x, size=(*shape[:3], half, 2))
    first, second = (b("aten.select.int", pairs, dim=4, index=i) for i in (0, 1))
    crossed = b("aten.stack.default", [b("aten.neg.default", second), first], dim=4)
    across = b("aten.view.default", crossed, size=shape)
    twice = []
    for c in (cos, sin):
        size = (*c.tensor_type.shape[:3], 2 * half)
        both = b("aten.stack.default", [c, c], dim=4)
        twice.append(b("aten.view.default", both, size=size))
    return b("aten.mul.Tensor", x, twice[0]), b("aten.mul.Tensor", across, twice[1])
