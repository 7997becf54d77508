"""Quantized ops where their maths is of whole numbers: equal to the last one, ties included."""

from __future__ import annotations

import torch

from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ops.builder import Builder
from dfc.ops.codes import pack4, unpack4
from dfc.ops.embedding_quantized import EmbeddingW4, EmbeddingW8
from dfc.ops.linear_f8 import LinearF8
from dfc.ops.linear_quantized import LinearW4, LinearW8
from dfc.ops.quantized import Dequantize, Quantize
from dfc.rewrite.pass_ import Context, find_pass

TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 300.0, -128.5, -300.0])


def test_ties_go_to_the_even_code_before_the_zero_point_is_added() -> None:
    one = torch.ones(())
    plain = Quantize().reference(TIES, one)
    assert plain.tolist() == [-2, -2, 0, 0, 2, 2, 126, 127, 127, -128, -128]
    odd = Quantize(dtype="u8").reference(TIES, one, torch.tensor(3, dtype=torch.uint8))
    assert odd.tolist() == [1, 1, 3, 3, 5, 5, 129, 131, 255, 0, 0]  # not round(x + 3)
    narrow = Quantize(low=-127).reference(TIES, one)
    assert narrow.tolist()[-2:] == [-127, -127]


def test_x_is_divided_and_not_multiplied_with_the_inverse() -> None:
    x = torch.arange(-127, 128).float()
    for step in (0.1, 0.3, 1 / 3):
        scale = torch.tensor(step)
        assert Quantize().reference(x * scale, scale).tolist() == x.to(torch.int8).tolist()


def test_float8_saturates() -> None:
    x = torch.tensor([1e6, -1e6, 449.0, 0.3])
    codes = Quantize(dtype="f8e4m3fn").reference(x, torch.ones(()))
    assert Dequantize().reference(codes, torch.ones(())).tolist() == [448, -448, 448, 0.3125]


def test_dot_products_are_those_of_whole_numbers() -> None:
    """At the largest codes, and for rows longer than float32 could sum exactly."""
    generator = torch.Generator().manual_seed(0)
    for k, group in ((64, None), (64, 16), (4096, None), (4096, 256), (40, 32)):
        x = torch.randint(-127, 128, (3, k), generator=generator).float()
        x[:, ::16] = 127  # so that the scale of each row, and of each group, is one
        x[0], x[1] = 127, -127
        weight = torch.randint(-128, 128, (5, k), generator=generator, dtype=torch.int8)
        weight[0], weight[1] = 127, -128
        groups = -(-k // group) if group else 1
        scale = torch.ones(5) if group is None else torch.ones(5, groups)
        y = LinearW8(group=group, activations="int8").reference(x, weight, scale)
        assert torch.equal(y.long(), x.long() @ weight.long().T)


def test_sums_of_codes_pass_what_16_bit_floats_hold() -> None:
    """A sum of 64 products of codes is a million, and f16 ends at 65504."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 64, generator=generator)
    w8 = torch.randint(-128, 128, (5, 64), generator=generator, dtype=torch.int8).abs_()
    w4, w8_scale = torch.full((5, 32), 0xEE, dtype=torch.uint8), torch.full((5,), 0.01)
    for dtype in (torch.float16, torch.bfloat16):
        for layer, codes, scale in (
            (LinearW8(activations="int8"), w8, w8_scale),
            (LinearW8(32, activations="int8"), w8, w8_scale.repeat(2, 1).T),
            (LinearW4(64, activations="int8"), w4, w8_scale[:, None]),
        ):
            narrow, s = x.to(dtype), scale.to(dtype)
            want = layer.reference(narrow.double(), codes, s.double()).to(dtype)
            torch.testing.assert_close(layer.reference(narrow, codes, s), want)
        layer, f8, s = LinearF8("f8"), torch.full((5, 64), 400.0), torch.full((5,), 1e-3)
        codes, bias, narrow = f8.to(torch.float8_e4m3fn), torch.ones(5, dtype=dtype), x.to(dtype)
        want = layer.reference(narrow.double(), codes, s.double(), bias.double()).to(dtype)
        torch.testing.assert_close(layer.reference(narrow, codes, s.to(dtype), bias), want)


def test_zero_rows_have_the_scale_one() -> None:
    x = torch.zeros(2, 32)
    weight = torch.ones(3, 32, dtype=torch.int8)
    y = LinearW8(activations="int8").reference(x, weight, torch.ones(3))
    assert torch.equal(y, torch.zeros(2, 3))


def test_codes_are_packed_low_nibble_first() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack4(codes).tolist()[:2] == [0x10, 0x32]
    assert torch.equal(unpack4(pack4(codes)), codes)
    assert pack4(codes[:3]).tolist() == [0x10, 0x02]


def test_a_tied_table_is_the_weight_of_the_linear_layer() -> None:
    """Looking rows up and multiplying with the identity give the same numbers."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 32), generator=generator, dtype=torch.uint8)
    points = torch.randint(0, 16, (6, 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(6, 2, generator=generator)
    packed, zero = pack4(codes), pack4(points)
    rows = EmbeddingW4(group=16).reference(torch.arange(6), packed, scale, zero)
    tied = LinearW4(group=16).reference(torch.eye(32), packed, scale, zero)
    assert torch.equal(rows, tied.T)
    table = torch.randint(-128, 128, (6, 32), generator=generator, dtype=torch.int8)
    rows = EmbeddingW8().reference(torch.arange(6), table, scale[:, 0])
    tied = LinearW8().reference(torch.eye(32), table, scale[:, 0])
    assert torch.equal(rows, tied.T)


def test_constant_folding_leaves_packed_weights_alone() -> None:
    graph = Graph()
    b = Builder(graph)
    codes = graph.add_constant("codes", torch.ones(4, 4, dtype=torch.int8))
    scale = graph.add_constant("scale", torch.ones(4))
    x = graph.add_input("x", TensorType.of(torch.ones(4, 4)))
    weight = b("dfc.dequantize", codes, scale, axis=0)
    graph.set_outputs([b("aten.linear.default", x, weight, None)])
    ctx = Context(decisions=[])
    assert find_pass("fold_constants").run(graph, ctx) == 0
    assert ctx.decisions and "unpacks weights" in ctx.decisions[0].reason
