"""Attention on the layout that projections give: heads side by side in the last dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
class MultiHeadAttention(Op):
    """`softmax(q @ k.T * scale + mask) @ v` for each head; heads share keys in groups.

    Query head h reads key head `h * num_kv_heads // num_heads`. A scale of None is `1 / sqrt(D)`.
    A boolean mask says where to look, a float mask is added; a row that may look nowhere gives
    zeros. Causal: row i sees the columns up to i, counted from the first of both.

    Shapes:  q: float[B, S, H*D], k: float[B, T, G*D], v: float[B, T, G*E], mask: [B, H, S, T]?
             -> float[B, S, H*E]
    C1:      q, k and v are [B, S, H*D], [B, T, G*D] and [B, T, G*E] with one B and T.
    C2:      num_heads is a positive multiple of num_kv_heads.
    C3:      num_heads divides q's last size into D, num_kv_heads k's into D and v's into E.
    C4:      q, k and v have one float dtype.
    C5:      mask is boolean or of q's dtype.
    C6:      mask has 2 to 4 dimensions that broadcast to [B, H, S, T].
    C7:      mask and is_causal exclude each other.
    Source:  torch.nn.functional.scaled_dot_product_attention with enable_gqa.
    """

    name = "multi_head_attention"
    precision = "half"
    cases = (
        "q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] num_heads=4 num_kv_heads=4",
        "q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] num_heads=2 num_kv_heads=2 is_causal=True",
        "q=f32[2,5,16] k=f32[2,7,16] v=f32[2,7,12] num_heads=4 num_kv_heads=4 is_causal=True",
        "q=f32[2,7,16] k=f32[2,5,8] v=f32[2,5,8] num_heads=4 num_kv_heads=2 scale=0.5",
        "q=f32[2,5,16] k=f32[2,5,8] v=f32[2,5,8] num_heads=4 num_kv_heads=2 is_causal=True",
        "q=f32[2,5,16] k=f32[2,7,4] v=f32[2,7,3] mask=bool[2,1,5,7] num_heads=4 num_kv_heads=1",
        "q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=f32[2,1,1,5] num_heads=4 num_kv_heads=4",
        "q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=f32[2,4,5,5] num_heads=4 num_kv_heads=4",
        "q=f32[1,5,16] k=f32[1,5,16] v=f32[1,5,16] mask=bool[5,5] num_heads=2 num_kv_heads=2",
        "q=f64[2,3,8] k=f64[2,4,8] v=f64[2,4,8] mask=bool[2,1,1,4] num_heads=2 num_kv_heads=2",
        "q=f32[B,S,16] k=f32[B,S,8] v=f32[B,S,8] num_heads=4 num_kv_heads=2 is_causal=True",
        "q=f32[B,S,8] k=f32[B,D,8] v=f32[B,D,8] mask=bool[B,1,1,D] num_heads=2 num_kv_heads=2",
        "q=f32[B,1,8] k=f32[B,D,8] v=f32[B,D,8] mask=f32[B,1,1,D] num_heads=2 num_kv_heads=2",
    )
    rejects = (
        "C1 q=f32[2,4,5,4] k=f32[2,4,5,4] v=f32[2,4,5,4] num_heads=4 num_kv_heads=4",
        "C1 q=f32[2,5,16] k=f32[1,5,16] v=f32[1,5,16] num_heads=4 num_kv_heads=4",
        "C1 q=f32[2,5,16] k=f32[2,7,16] v=f32[2,6,16] num_heads=4 num_kv_heads=4",
        "C2 q=f32[2,5,16] k=f32[2,5,12] v=f32[2,5,12] num_heads=4 num_kv_heads=3",
        "C2 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] num_heads=4 num_kv_heads=0",
        "C3 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] num_heads=3 num_kv_heads=3",
        "C3 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] num_heads=4 num_kv_heads=2",
        "C3 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,6] num_heads=4 num_kv_heads=4",
        "C3 q=f32[2,5,K] k=f32[2,5,K] v=f32[2,5,K] num_heads=4 num_kv_heads=4",
        "C4 q=f32[2,5,16] k=f16[2,5,16] v=f32[2,5,16] num_heads=4 num_kv_heads=4",
        "C4 q=i32[2,5,16] k=i32[2,5,16] v=i32[2,5,16] num_heads=4 num_kv_heads=4",
        "C5 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=i64[5,5] num_heads=4 num_kv_heads=4",
        "C6 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=bool[2,5] num_heads=4 num_kv_heads=4",
        "C6 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=bool[5] num_heads=4 num_kv_heads=4",
        "C6 q=f32[B,S,8] k=f32[B,D,8] v=f32[B,D,8] mask=f32[D,S] num_heads=2 num_kv_heads=2",
        "C7 q=f32[2,5,16] k=f32[2,5,16] v=f32[2,5,16] mask=bool[5,5] num_heads=4 num_kv_heads=4 "
        "is_causal=True",
    )

    num_heads: int
    num_kv_heads: int
    scale: float | None = None
    is_causal: bool = False

    def infer(
        self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None
    ) -> TensorType:
        flat = q.rank == k.rank == v.rank == 3
        fits = flat and q.shape[0] == k.shape[0] and k.shape[:2] == v.shape[:2]
        self.require("C1", fits, f"q is {q}, k is {k}, v is {v}")
        h, g = self.num_heads, self.num_kv_heads
        self.require("C2", g > 0 and h > 0 and h % g == 0, f"{h} heads share {g} key heads")
        q_size, k_size, v_size = (t.shape[2] for t in (q, k, v))
        whole = isinstance(q_size, int) and isinstance(k_size, int) and isinstance(v_size, int)
        fits = whole and q_size % h == 0 and k_size * h == q_size * g and v_size % g == 0
        self.require("C3", fits, f"q is {q}, k is {k}, v is {v} for {h} and {g} heads")
        one = q.dtype.is_float and q.dtype == k.dtype == v.dtype
        self.require("C4", one, f"q is {q}, k is {k}, v is {v}")
        fits = mask is None or mask.dtype in (DTYPES["bool"], q.dtype)
        self.require("C5", fits, f"mask is {mask}, q is {q}")
        scores = (q.shape[0], h, q.shape[1], k.shape[1])
        fits = mask is None or (
            2 <= mask.rank <= 4
            and all(m in (1, s) for m, s in zip(mask.shape[::-1], scores[::-1], strict=False))
        )
        self.require("C6", fits, f"mask is {mask}, the scores are {list(scores)}")
        self.require("C7", mask is None or not self.is_causal, f"mask is {mask}, is_causal is set")
        assert isinstance(v_size, int)
        return q.with_shape((*q.shape[:2], v_size // g * h))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        import torch.nn.functional as F

        h, g = self.num_heads, self.num_kv_heads
        query, key, value = (
            x.reshape(*x.shape[:2], n, x.shape[2] // n).transpose(1, 2)
            for x, n in ((q, h), (k, g), (v, g))
        )
        y = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.is_causal, scale=self.scale, enable_gqa=h != g
        )
        return y.transpose(1, 2).flatten(2)

    def decompose(
        self, b: Builder, q: Value, k: Value, v: Value, mask: Value | None = None
    ) -> Value:
        h, g = self.num_heads, self.num_kv_heads
        heads = []
        for x, n in ((q, h), (k, g), (v, g)):
            batch, tokens, size = x.tensor_type.shape
            split = b("aten.view.default", x, size=(batch, tokens, n, size // n))
            heads.append(b("aten.transpose.int", split, dim0=1, dim1=2))
        y = b(
            "aten.scaled_dot_product_attention.default", *heads, mask,
            is_causal=self.is_causal, scale=self.scale, enable_gqa=h != g,
        )  # fmt: skip
        turned = b("aten.transpose.int", y, dim0=1, dim1=2)
        batch, tokens, _, size = turned.tensor_type.shape
        return b("aten.view.default", turned, size=(batch, tokens, h * size))

    def to_onnx(
        self, b: OnnxBuilder, q: Val, k: Val, v: Val, mask: Val | None = None
    ) -> Val | None:
        heads = (self.num_heads, self.num_kv_heads)
        return b.attention(q, k, v, mask, self.scale, self.is_causal, heads)

    def cost(
        self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None
    ) -> Cost:
        y = self.infer(q, k, v, mask)
        t, scores = k.shape[1], q.shape[0] * self.num_heads * q.shape[1] * k.shape[1]
        products = 2 * t * (q.numel + y.numel)
        softmax = 5 + (mask is not None)  # scale, maximum, subtract, exp, divide; add the mask
        return Cost(products + softmax * scores, total_bytes(q, k, v, mask), y.nbytes)
