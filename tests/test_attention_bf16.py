"""Attention in bf16 means what PyTorch's means, and takes the casts around it along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.emit.fx import to_fx
from dfc.ir.graph import Graph, Node
from dfc.runtime.kernels import attention_bf16
from dfc.runtime.kernels.attention_bf16 import attention
from dfc.runtime.kernels.graph import kernels

needs_bf16 = pytest.mark.skipif(
    not attention_bf16.can_run(), reason="needs a CPU with AVX-512 BF16, without AMX"
)
pytestmark = needs_bf16


def heads(b: int, h: int, g: int, s: int, t: int, d: int, e: int) -> list[Tensor]:
    """q, k and v as projections leave them: heads lie side by side in each row."""
    random = torch.Generator().manual_seed(b * 100 + s * 10 + t + d)

    def one(n: int, rows: int, width: int) -> Tensor:
        return torch.randn(b, rows, n, width, generator=random).transpose(1, 2)

    return [one(h, s, d), one(g, t, d), one(g, t, e)]


def meaning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """In float64, of what was rounded to bf16; zeros for rows that see nothing."""
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.nan_to_num(0.0)


SHAPES = (
    (1, 12, 12, 128, 128, 64, 64), (2, 4, 2, 33, 47, 40, 24), (2, 4, 1, 150, 300, 7, 9),
    (1, 2, 2, 17, 1, 256, 256), (1, 2, 2, 1, 130, 64, 64), (3, 2, 2, 270, 129, 96, 80),
)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_near_as_torchs(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = heads(*shape)
    want = meaning(q, k, v, None, causal)
    y = attention(q, k, v, None, shape[5] ** -0.5, causal, False)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        *(x.bfloat16() for x in (q, k, v)), is_causal=causal, enable_gqa=shape[1] != shape[2]
    )
    error, its = ((x.double() - want).norm() / want.norm() for x in (y, torchs))
    assert y.dtype == torch.bfloat16 and error <= 1.1 * its + 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_are_rounded_on_their_way_and_rows_do_not_depend_on_threads(
    shape: tuple[int, ...],
) -> None:
    q, k, v = heads(*shape)
    half = [x.bfloat16() for x in (q, k, v)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found += [attention(*x, None, 0.2, False, w) for x in ((q, k, v), half) for w in (0, 1)]
    finally:
        torch.set_num_threads(before)
    assert {y.dtype for y in found} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(y.float(), found[0].float()) for y in found)


@pytest.mark.parametrize("kind", ["bool", "keys", "column", "float", "half"])
def test_masks_of_any_kind(kind: str) -> None:
    q, k, v = heads(2, 3, 3, 20, 140, 16, 16)
    random = torch.Generator().manual_seed(0)
    mask = {
        "bool": torch.rand(2, 1, 20, 140, generator=random) > 0.4,
        "keys": torch.rand(2, 1, 1, 140, generator=random) > 0.4,
        "column": torch.rand(20, 1, generator=random) > 0.4,
        "float": torch.randn(3, 20, 140, generator=random),
        "half": torch.randn(2, 3, 20, 140, generator=random).bfloat16(),
    }[kind]
    if kind == "bool":
        mask[1, 0, 3] = False  # a row that sees nothing
    y = attention(q, k, v, mask, 0.25, False, True)
    want = meaning(q, k, v, mask, False)
    assert (y.double() - want).norm() <= 4e-3 * want.norm()
    if kind == "bool":
        assert not y[1, :, 3].any()


def test_what_is_not_finite_stays_in_its_row_and_large_scores_do_not_overflow() -> None:
    q, k, v = heads(1, 2, 2, 9, 200, 32, 32)
    q[0, 0, 4, 3] = torch.nan
    q[0, 1] *= 1e4
    y = attention(q, k, v, None, 1.0, False, True)
    assert y[0, 0, 4].isnan().all()
    want = meaning(q, k, v, None, False)
    assert y[0, 1].isfinite().all() and y[0, 0, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    assert (y[0, 1].abs() <= v[0, 1].abs().max() * 1.01).all() and want.shape == y.shape


def test_what_does_not_fit_is_refused() -> None:
    attention_bf16.register()
    q, k, v = heads(1, 2, 2, 4, 4, 16, 16)
    for given in ((q, k.bfloat16(), v), (q.double(), k.double(), v.double()), (q[0], k, v),
                  (q, k[:, :, :2], v), (q[..., :8], k, v), (q, k[:, :1], v)):  # fmt: skip
        with pytest.raises(RuntimeError, match="dfc attention"):
            torch.ops.dfc.attention_bf16(*given, None, 1.0, False, False)
    with pytest.raises(RuntimeError, match="dfc attention"):
        attention(*heads(1, 1, 1, 2, 2, 257, 16), None, 1.0, False, False)


def test_the_op_keeps_torchs_rules() -> None:
    q, k, v = heads(1, 2, 1, 4, 6, 16, 8)
    attention_bf16.register()
    for wide in (False, True):
        arguments = (q, k, v, torch.ones(4, 6, dtype=torch.bool), 0.25, False, wide)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.dfc.attention_bf16.default, arguments, test_utils=checks)


# In a graph


class Model(nn.Module):
    def __init__(self, reads_half: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.reads_half = reads_half

    def forward(self, x: Tensor) -> Any:
        q, k, v = (y.view(*x.shape[:2], 4, 16).transpose(1, 2) for y in self.qkv(x).split(64, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).flatten(2)


RECIPE = "dfc 1\nrecipe r {\n  quantize int8 with scheme=dynamic\n  autocast bf16\n}"


def called(module: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def of_attention(graph: Graph) -> Node:
    (node,) = [n for n in graph.nodes if n.op == attention_bf16.NAME]
    return node


def test_casts_around_attention_are_left_to_the_kernel() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    compiled = dfc.compile(Model(), (x,), recipe=RECIPE, engine="eager")
    casts = [n for n in compiled.graph.nodes if n.op == "aten._to_copy.default"]
    assert len(casts) == 4
    module = to_fx(compiled.graph, kernels=kernels("cpu"))
    assert attention in called(module)
    assert torch.ops.aten._to_copy.default not in called(module)
    left_out = to_fx(compiled.graph, kernels={})
    (got,), (want,) = module(x), left_out(x)
    assert (got - want).norm() <= 5e-3 * want.norm()
    assert called(to_fx(compiled.graph, kernels=kernels("cpu", traced=True))).count(
        torch.ops.dfc.attention_bf16.default
    )


def test_what_is_also_read_in_bf16_stays_so() -> None:
    x = torch.randn(2, 5, 64)
    compiled = dfc.compile(Model(), (x,), recipe=RECIPE, engine="eager", verify="none")
    graph = compiled.graph.copy()
    node = of_attention(graph)
    graph.set_outputs([node.result])
    call = attention_bf16.kernel(node, traced=False)
    assert call is not None and call.operands[-1] is False
    (y,) = to_fx(graph, kernels=kernels("cpu"))(x)
    assert y.dtype == torch.bfloat16


def test_attention_of_f32_is_left_to_torch() -> None:
    compiled = dfc.compile(Model(), (torch.randn(2, 5, 64),), engine="eager", verify="none")
    assert attention_bf16.kernel(of_attention(compiled.graph), traced=False) is None
