"""Quantized linear layers on CUDA devices give what their ops mean, and take less memory.

On a machine without a device, Triton's interpreter runs what it can (f16 and f32):

    TRITON_INTERPRET=1 python -m pytest -m gpu tests/test_gpu_kernels.py
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.codes import pack4
from dfc.ops.linear_f8 import LinearF8
from dfc.ops.linear_quantized import LinearW4, LinearW8

pytest.importorskip("triton")
HAS_DEVICE = torch.cuda.is_available()
INTERPRETED = not HAS_DEVICE and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_DEVICE else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_DEVICE and not INTERPRETED, reason="no CUDA device"),
]
on_device = pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device")
NAMES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BF16 = "bf16" if HAS_DEVICE else "f16"  # interpreted bf16 is not multiplied
WITHIN = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
# Sizes that tiles divide, with parts along K; and ones that they do not, with a bias. Rows: one by
# one, tiles of several sizes, and unpacked weights. Each makes programs of its own, which take most
# of the time: types of numbers are spread over the cases.
WHOLE, RAGGED = (64, 1024), (70, 296)
MANY = (129, 300) if HAS_DEVICE else ()  # interpreted they take minutes


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())


class Layer:
    """A layer of random codes, and its op."""

    def __init__(
        self, op: str, n: int, k: int, group: int | None, dtype: str, *, rounded: bool = False,
        zeros: bool = False, bias: bool = False,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(n * 1000 + k)
        self.op, self.group, self.dtype, self.n, self.k = op, group, dtype, n, k
        groups = -(-k // group) if group else 1
        kind = NAMES[dtype]
        self.scale = (torch.rand(n, groups, generator=random) * 0.1 + 0.01).to(kind)
        self.bias = torch.randn(n, generator=random).to(kind) if bias else None
        self.zero = None
        self.activations = ("f8" if op == "linear_f8" else "int8") if rounded else "float"
        if op == "linear_w4":
            assert group is not None
            codes = torch.randint(0, 16, (n, groups * group), generator=random, dtype=torch.uint8)
            self.codes = pack4(codes)
            if zeros:
                points = torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8)
                self.zero = pack4(points)
        elif op == "linear_w8":
            self.codes = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
        else:
            self.codes = torch.randn(n, k, generator=random).to(torch.float8_e4m3fn)
        if group is None:
            self.scale = self.scale[:, 0].contiguous()

    def x(self, *rows: int) -> Tensor:
        random = torch.Generator().manual_seed(sum(rows))
        return torch.randn(*rows, self.k, generator=random).to(NAMES[self.dtype])

    def operands(self) -> list[Tensor | None]:
        zero = [self.zero] if self.op == "linear_w4" else []
        return [self.codes, self.scale, *zero, self.bias]

    def meaning(self, x: Tensor) -> Tensor:
        """In f64; where rows are rounded in f32, in which kernels divide too: ties fall alike."""
        wide = torch.float64 if self.activations == "float" else torch.float32
        given = [
            o.to(wide) if o is not None and o.dtype in NAMES.values() else o
            for o in self.operands()
        ]
        if self.op == "linear_f8":
            return LinearF8(self.activations).reference(x.to(wide), *given).double()
        make: Any = LinearW4 if self.op == "linear_w4" else LinearW8
        found: Tensor = make(self.group, self.activations).reference(x.to(wide), *given)
        return found.double()

    def run(self, x: Tensor) -> Tensor:
        from dfc.runtime.kernels.cuda import linear

        held = (self.codes, self.scale, self.zero, self.bias)
        codes, scale, zero, bias = (None if t is None else t.to(DEVICE) for t in held)
        bits, rounded = 4 if self.op == "linear_w4" else 8, self.activations != "float"
        assert codes is not None and scale is not None
        y = linear(x.to(DEVICE), codes, scale, zero, bias, bits, self.group or 0, int(rounded))
        return y.cpu()

    def graph(self) -> Graph:
        graph = Graph("layer", ranges={"B": (1, None)})
        x = graph.add_input("x", TensorType(DTYPES[self.dtype], (symbol("B"), self.k)))
        graph.arguments = (Argument("x", LEAF),)
        names = [f"w{i}" for i in range(4)]
        operands = [
            None if o is None else graph.add_constant(name, o)
            for name, o in zip(names, self.operands(), strict=False)
        ]
        attributes: dict[str, Any] = {"activations": self.activations}
        if self.op != "linear_f8":
            attributes["group"] = self.group
        node = graph.add(f"dfc.{self.op}", [x, *operands], attributes)
        graph.set_outputs([node.result])
        return graph


def off(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30))


def check(layer: Layer, *many: int) -> None:
    for rows in many:
        x = layer.x(rows)
        got = layer.run(x)
        assert got.dtype == x.dtype and got.shape == (rows, layer.n)
        assert off(got, layer.meaning(x)) <= WITHIN[layer.dtype], rows


def check_sizes(op: str, group: int | None, dtype: str, *, zeros: bool = False) -> None:
    check(Layer(op, *WHOLE, group, dtype, zeros=zeros), 1, 3, *MANY[:1])
    check(Layer(op, *RAGGED, group, dtype, zeros=zeros, bias=True), 1, 17, *MANY[1:])


@pytest.mark.parametrize(
    ("group", "zeros", "dtype"), [(16, True, "f32"), (32, False, BF16), (256, True, "f16")]
)
def test_int4_weights_are_multiplied_as_they_are_stored(
    group: int, zeros: bool, dtype: str
) -> None:
    check_sizes("linear_w4", group, dtype, zeros=zeros)


@pytest.mark.parametrize(("group", "dtype"), [(None, BF16), (None, "f16"), (64, "f32")])
def test_int8_weights_are_multiplied_as_they_are_stored(group: int | None, dtype: str) -> None:
    check_sizes("linear_w8", group, dtype)


@pytest.mark.parametrize(
    ("op", "group", "dtype"),
    [
        ("linear_w4", 32, BF16), ("linear_w4", 128, "f32"), ("linear_w8", None, "f16"),
        ("linear_w8", 64, BF16),
    ],
)  # fmt: skip
def test_rows_rounded_to_int8_are_multiplied_exactly(
    op: str, group: int | None, dtype: str
) -> None:
    zeros = group == 128
    check(Layer(op, *WHOLE, group, dtype, rounded=True, zeros=zeros), 1, *MANY[:1])
    check(Layer(op, *RAGGED, group, dtype, rounded=True, zeros=zeros, bias=True), 17)


@pytest.mark.parametrize("group", [None, 32])
def test_whole_numbers_are_exact(group: int | None) -> None:
    layer = Layer("linear_w8", 70, 296, group, "f32", rounded=True)
    layer.scale = torch.full_like(layer.scale, 0.5)
    for rows in (1, 17):
        x = torch.randint(-127, 128, (rows, 296)).float()
        x[:, :: group or 296] = 127
        assert torch.equal(layer.run(x).double(), layer.meaning(x))


@pytest.mark.parametrize(
    ("rounded", "dtype"), [(False, BF16), (False, "f32"), pytest.param(True, BF16, marks=on_device)]
)
def test_weights_of_eight_bit_floats(rounded: bool, dtype: str) -> None:
    if HAS_DEVICE and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device does not multiply eight-bit floats")
    check(Layer("linear_f8", *RAGGED, None, dtype, rounded=rounded), 1, 17)
    check(Layer("linear_f8", *WHOLE, None, dtype, rounded=rounded), *MANY[:1])


@pytest.mark.parametrize("rounded", [False, True])
def test_rows_of_any_layout_and_none(rounded: bool) -> None:
    layer = Layer("linear_w8", 70, 296, None, "f16", rounded=rounded)
    cube = layer.x(2, 3)
    assert layer.run(cube).shape == (2, 3, 70)
    assert layer.run(cube[0, :0]).shape == (0, 70)
    across = layer.x(5).T.contiguous().T
    assert torch.equal(layer.run(across), layer.run(across.contiguous()))
    wide = torch.randn(5, 400).half()
    assert torch.equal(layer.run(wide[:, 50:346]), layer.run(wide[:, 50:346].contiguous()))


def test_what_is_not_finite_stays_in_its_row() -> None:
    for op, group, rounded in (("linear_w4", 32, False), ("linear_w8", None, True)):
        layer = Layer(op, 70, 296, group, "f32", rounded=rounded)
        x = layer.x(5)
        want = layer.run(x)
        x[1, 40], x[3, 7] = torch.nan, torch.inf
        got = layer.run(x)
        assert not got[[1, 3]].isfinite().any()
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


@on_device
@pytest.mark.parametrize(
    "engine", ["eager", "inductor", "eager:cuda_graph", "eager:floats", "eager:floats:cuda_graph"]
)
def test_engines_call_the_kernels_with_any_number_of_rows(engine: str) -> None:
    layers = (("linear_w4", 32, False), ("linear_w8", None, True))
    for op, group, rounded in layers[:1] if engine == "inductor" else layers:
        layer = Layer(op, *WHOLE, group, "bf16", rounded=rounded)
        compiled = dfc.compile(layer.graph(), (layer.x(3),), engine=engine, device="cuda")
        for rows in (3, 1, 129):
            x = layer.x(rows)
            assert off(compiled(x.cuda()), layer.meaning(x)) <= WITHIN["bf16"]


@on_device
@pytest.mark.parametrize(
    ("op", "group", "share"), [("linear_w4", 32, 0.30), ("linear_w8", None, 0.51)]
)
def test_weights_on_the_device_are_as_small_as_promised(op: str, group: Any, share: float) -> None:
    """Shares of what bf16 would take; scales of four bits in groups of 32 are an eighth more."""
    from dfc.runtime.engines import find_engine

    n, k = 4096, 2048
    layer = Layer(op, n, k, group, "bf16")
    some = torch.ones(300, 300, dtype=torch.bfloat16, device="cuda")
    torch.nn.functional.linear(some, some)  # cuBLAS takes its own memory once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run = find_engine("eager").build(layer.graph(), "cuda")
    run([layer.x(1).cuda()])
    run([layer.x(300).cuda()])
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated() - before
    assert taken <= share * n * k * 2, taken


@on_device
def test_what_kernels_do_not_take_is_unpacked_once() -> None:
    from dfc.emit.fx import to_fx
    from dfc.runtime.kernels.graph import kernels

    layer = Layer("linear_w4", 64, 256, 32, "f32")
    layer.dtype = "f64"
    NAMES.setdefault("f64", torch.float64)
    try:
        module = to_fx(layer.graph(), "cuda", kernels("cuda"))
        x = torch.randn(3, 256, dtype=torch.float64)
        assert off(module(x.cuda())[0], layer.meaning(x)) < 1e-12
        assert any(n.target is torch.ops.aten.linear.default for n in module.graph.nodes)
    finally:
        NAMES.pop("f64")
