"""The kernels compute what their ops mean, on every path, and touch no memory of others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.emit.fx import to_fx
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.codes import pack4
from dfc.ops.linear_quantized import LinearW4, LinearW8
from dfc.runtime.kernels import build, library, linear, memory, packed
from dfc.runtime.kernels.graph import kernels, why_not

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
DRIVER = ROOT / "tests" / "kernels" / "drive.cpp"
SHAPES = ((1, 16, 128), (1, 5, 40), (3, 33, 200), (9, 20, 160), (2, 1, 7), (130, 17, 96))
MANY = ((130, 17, 96), (33, 40, 1100), (70, 3, 2050))  # rows, whose small codes have lanes


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """CI has a compiler, and has installed dfc with it: there the kernels must be there."""
    found = library.state()
    if not found.built and not IN_CI:
        pytest.skip(f"{found.reason}; {found.advice}")
    assert found.built, f"{found.reason}; {found.advice}"
    linear.register()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed._held.clear()
    yield tmp_path / "cache" / "dfc" / "packed"


def paths() -> tuple[str, ...]:
    return library.state().paths or ("portable",)


def each_path() -> Any:
    return pytest.mark.parametrize("path", paths())


class Layer:
    """A linear layer of random codes; with `whole` all sums of floats are exact as well.

    Then scales are powers of two, and each group of x has the largest magnitude 127 times one.
    """

    def __init__(self, bits: int, group: int | None, shape: tuple[int, int, int], **o: Any) -> None:
        self.bits, self.group = bits, group
        rows, n, k = shape
        random = torch.Generator().manual_seed(rows * 1000 + n * 10 + k + bits)
        groups = -(-k // group) if group else 1
        self.bias = torch.randint(-9, 9, (n,), generator=random).float() if o.get("bias") else None
        self.zero = None
        if bits == 4:
            assert group is not None
            codes = torch.randint(0, 16, (n, groups * group), generator=random, dtype=torch.uint8)
            self.codes = pack4(codes)
            if o.get("zeros"):
                points = torch.randint(0, 16, (n, groups), generator=random, dtype=torch.uint8)
                self.zero = pack4(points)
        else:
            self.codes = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8)
            if o.get("small"):  # as trained weights are: most codes far below the largest
                wide = torch.randn(n, k, generator=random) * 30
                self.codes = wide.round().clamp(-128, 127).to(torch.int8)
        if o.get("whole"):
            self.scale = 2.0 ** torch.randint(-2, 2, (n, groups), generator=random).float()
            self.x = torch.randint(-127, 128, (rows, k), generator=random).float()
            self.x[:, :: group or k] = 127
            self.x *= 2.0 ** torch.randint(-2, 2, (rows, 1), generator=random).float()
        else:
            self.scale = torch.rand(n, groups, generator=random) * 0.1 + 0.01
            self.x = torch.randn(rows, k, generator=random)
        if group is None:
            self.scale = self.scale[:, 0]
        if o.get("half"):
            self.scale = self.scale.half()

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    def pack(self) -> Tensor:
        if self.bits == 8:
            return linear.pack_w8(self.codes, self.scale, self.group)
        assert self.group is not None
        return linear.pack_w4(self.codes, self.scale, self.zero, self.x.shape[1], self.group)

    def run(self, path: str | None = None, before: int = 0) -> Tensor:
        return linear.linear(self.x, self.pack(), self.bias, self.n, before, path)

    def meaning(self) -> Tensor:
        if self.bits == 8:
            op8 = LinearW8(self.group, "int8")
            return op8.reference(self.x, self.codes, self.scale, self.bias)
        assert self.group is not None
        op4 = LinearW4(self.group, "int8")
        return op4.reference(self.x, self.codes, self.scale, self.zero, self.bias)


def layers(**options: Any) -> list[Layer]:
    fours = product((4,), (16, 32, 64, 128), SHAPES, (False, True))
    eights = product((8,), (None, 16, 32, 128), SHAPES, (False,))
    return [
        Layer(bits, group, shape, zeros=zeros, bias=i % 2, half=i % 3 == 0, **options)
        for i, (bits, group, shape, zeros) in enumerate([*fours, *eights])
    ] + [Layer(8, None, shape, small=True, bias=True, **options) for shape in MANY]


# Meaning


@each_path()
def test_whole_numbers_are_exact(path: str) -> None:
    for layer in layers(whole=True):
        assert torch.equal(layer.run(path), layer.meaning()), (layer.bits, layer.group)


@each_path()
def test_a_layer_means_what_its_op_means(path: str) -> None:
    for layer in layers():
        torch.testing.assert_close(layer.run(path), layer.meaning(), rtol=1e-5, atol=1e-5)


def test_every_path_gives_the_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    wide = [Layer(b, g, (rows, 400, 512)) for b, g in ((4, 32), (8, None)) for rows in (1, 70)]
    try:
        for layer in [*layers(), *wide]:
            torch.set_num_threads(1)
            want = layer.run("portable")
            for path, threads in product(paths(), (1, 2, 3)):
                torch.set_num_threads(threads)
                assert torch.equal(layer.run(path), want), (path, threads)
    finally:
        torch.set_num_threads(before)


def test_codes_are_rounded_as_after_a_division() -> None:
    """Halves and their neighbours: what is off by one unit in the last place has another code."""
    eye = linear.pack_w8(torch.eye(128).to(torch.int8), torch.ones(128))
    random = torch.Generator().manual_seed(0)
    largest = torch.rand(2000, 1, generator=random) * 10.0 ** torch.randint(
        -36, 36, (2000, 1), generator=random
    )
    scale = largest / 127
    x = (torch.randint(-126, 126, (2000, 128), generator=random) + 0.5) * scale
    bits = x.view(torch.int32) + torch.randint(-2, 3, x.shape, generator=random, dtype=torch.int32)
    x = bits.view(torch.float32)
    x[:, :1] = largest
    want = (x / scale).round() * scale
    for path in paths():
        assert torch.equal(linear.linear(x, eye, None, 128, 0, path), want), path


@each_path()
def test_gelu_before_a_layer_is_exact_to_a_millionth(path: str) -> None:
    one = linear.pack_w8(torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-3e38, -1e4, 0.0, 1e4, 3e38])])
    got = linear.linear(x[:, None], one, None, 1, linear.GELU, path)[:, 0].double()
    want = torch.nn.functional.gelu(x.double())
    assert ((got - want).abs() <= 2e-6 + 1e-6 * want.abs()).all()
    assert not got[x < -6].any()


def test_gelu_gives_the_same_bits_on_every_path_and_stays_near_its_meaning() -> None:
    for layer in layers():
        want = layer.run("portable", linear.GELU)
        assert all(torch.equal(layer.run(path, linear.GELU), want) for path in paths())
        layer.x = torch.nn.functional.gelu(layer.x)
        error = (want - layer.meaning()).norm() / layer.meaning().norm()
        assert error < 2e-3  # a code here and there is the next one


@each_path()
def test_what_is_not_finite_stays_in_its_row(path: str) -> None:
    for bits, group in ((4, 32), (8, 32), (8, None)):
        layer = Layer(bits, group, (5, 20, 96))
        want = layer.run(path)
        for row, bad in ((0, torch.nan), (2, torch.inf), (3, -torch.inf)):
            layer.x[row, 40] = bad
        got = layer.run(path)
        assert not got[[0, 2, 3]].isfinite().any()
        assert torch.equal(got[[1, 4]], want[[1, 4]])


@each_path()
def test_tiny_and_zero_rows_are_numbers(path: str) -> None:
    layer = Layer(4, 32, (3, 20, 64))
    layer.x[0], layer.x[1] = 0, 1e-44
    got = layer.run(path)
    assert torch.equal(got[0], torch.zeros(20)) and got.isfinite().all()


def test_scales_that_f16_cannot_hold_are_kept_as_f32() -> None:
    wide, half = Layer(4, 32, (1, 16, 64)), Layer(4, 32, (1, 16, 64), half=True)
    assert wide.pack().numel() - half.pack().numel() == 2 * 16 * 2
    wide.scale[0, 0] = 1e30
    torch.testing.assert_close(wide.run(), wide.meaning())


def test_subnormal_scales_are_exact() -> None:
    layer = Layer(4, 32, (2, 16, 64), half=True)
    layer.scale = (torch.arange(32).reshape(16, 2) * 2.0**-24).half()
    for path in paths():
        torch.testing.assert_close(layer.run(path), layer.meaning(), rtol=1e-5, atol=0)


def test_rows_of_any_layout_are_taken() -> None:
    layer = Layer(8, None, (6, 20, 40))
    want = layer.run()
    weight = layer.pack()
    across = layer.x.T.contiguous().T
    assert torch.equal(linear.linear(across, weight, None, 20), want)
    wide = torch.cat([layer.x, -layer.x], dim=1)  # parts of it are read where they lie
    assert torch.equal(linear.linear(wide[:, :40], weight, None, 20), want)
    parts = wide.reshape(2, 3, 80)[..., :40]
    assert torch.equal(linear.linear(parts, weight, None, 20), want.reshape(2, 3, 20))
    parts = wide.reshape(3, 2, 80)[:, 1, :40]
    assert torch.equal(linear.linear(parts, weight, None, 20), want[1::2])
    same = layer.x[:1].expand(3, 40)
    assert torch.equal(linear.linear(same, weight, None, 20), want[:1].expand(3, 20))
    cube = layer.x.reshape(2, 3, 40)
    assert torch.equal(linear.linear(cube, weight, None, 20), want.reshape(2, 3, 20))
    bound, bias = linear.Bound(weight, 20, 40), torch.arange(40.0)[::2]
    assert torch.equal(bound.run(across, None), want)
    assert torch.equal(bound.run(wide[:, :40], None), want)
    assert torch.equal(bound.run(cube, bias), want.reshape(2, 3, 20) + bias)
    with pytest.raises(RuntimeError, match=r"x is not f32\[.., 40\] on the CPU"):
        bound.run(layer.x[:, :39], None)
    assert linear.linear(layer.x[:0], weight, None, 20).shape == (0, 20)


# Bad input


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer(4, 32, (2, 20, 64))
    weight = layer.pack()
    changed = weight.clone()
    changed[8] = 8  # says that it holds eight bits
    for bad in (weight[:-1].clone(), weight[:10].clone(), changed, torch.zeros_like(weight)):
        with pytest.raises(RuntimeError, match="packed weight does not fit"):
            linear.linear(layer.x, bad, None, 20)
    with pytest.raises(RuntimeError, match="does not fit"):
        linear.linear(layer.x[:, :32], weight, None, 20)
    with pytest.raises(RuntimeError, match="x is not f32"):
        linear.linear(layer.x.double(), weight, None, 20)
    with pytest.raises(RuntimeError, match=r"bias is not f32\[20\]"):
        linear.linear(layer.x, weight, torch.zeros(19), 20)
    with pytest.raises(RuntimeError, match="no such path"):
        linear.linear(layer.x, weight, None, 20, path="sse9")
    with pytest.raises(ValueError, match="no packed layout for 20 x 64 of 4 bits in groups of 24"):
        linear.pack_w4(layer.codes, layer.scale, None, 64, 24)
    with pytest.raises(ValueError, match="zero points"):
        linear.pack_w4(layer.codes, layer.scale, torch.zeros(3, dtype=torch.uint8), 64, 32)


def test_most_codes_fit_lanes_and_files_that_name_other_places_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, wide = Layer(8, None, (33, 40, 1100), small=True), Layer(8, None, (33, 40, 1100))
    flags = [linear._lanes(layer.codes)[0] for layer in (small, wide)]
    if paths()[0] == "avx2":
        assert flags == [library.LANES_OF_4, 0]
    else:  # it has no use for lanes, and takes weights that were packed with them
        assert flags == [0, 0]
        monkeypatch.setattr(linear, "_lanes", lambda codes: (library.LANES_OF_4, codes.numel()))
    for path in paths():
        assert torch.equal(small.run(path), small.run("portable"))
    weight = small.pack()
    assert linear.is_packed(weight, 8, 40, 1100, 0)
    panels = 3 * (64 + 1120 * 16)  # scales and codes
    begin = library.HEADER + panels + 64  # behind offsets
    (count,) = weight[begin + 64 : begin + 68].view(torch.int32).tolist()
    assert count > 0
    for at, value in ((begin + 64, 127), (begin, 1), (begin + 128 + 1, 0xFF)):
        broken = weight.clone()
        broken[at : at + 4] = value
        assert not linear.is_packed(broken, 8, 40, 1100, 0), at


# Memory: the driver ends every buffer where a page without rights begins


def drive(tmp_path: Path, *flags: str) -> str:
    sources = [build.FOLDER / s for s in build.SOURCES] + [DRIVER]
    extra = ("-O1", "-w", f"-I{build.FOLDER}", *flags)
    try:
        program = build.build(tmp_path / "drive", extra, sources)
    except build.BuildError as e:
        if IN_CI and build.compiler() is None:
            raise
        pytest.skip(str(e).splitlines()[0])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failures: 0" in done.stdout
    return done.stdout


def test_nothing_outside_of_a_buffer_is_touched(tmp_path: Path) -> None:
    said = drive(tmp_path)
    assert f"paths: {' '.join(paths())}\n" in said
    compared = re.search(r"compared: (\d+)", said)
    assert compared is not None and int(compared[1]) >= 390 * len(paths())


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    drive(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


EMULATED = ("-DDFC_SIMDE", "-Wno-psabi", "-O0")  # optimized, it compiles for longer than it runs
needs_simde = pytest.mark.skipif(
    not Path("/usr/include/simde/x86/avx512.h").exists(), reason="needs SIMDe: libsimde-dev"
)


@needs_simde
def test_paths_for_other_cpus_give_the_same_bits_when_emulated(tmp_path: Path) -> None:
    assert "paths: amx avx512vnni avx2 portable" in drive(tmp_path, *EMULATED)


@pytest.mark.slow  # a minute of compiling
@needs_simde
def test_sanitizers_find_nothing_in_paths_for_other_cpus(tmp_path: Path) -> None:
    drive(tmp_path, *EMULATED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


# Threads


def test_there_is_one_pool_of_threads() -> None:
    """In a process of its own: torch starts its pool, and the kernels then run on that."""
    code = """
import re, os, torch
from dfc.runtime.kernels import library, linear
torch.set_num_threads(3)
torch.randn(2000, 2000).exp().sum()
torch.nn.functional.linear(torch.randn(64, 2048), torch.randn(2048, 2048))
before = len(os.listdir('/proc/self/task'))
codes = torch.randint(-128, 128, (4096, 2048), dtype=torch.int8)
weight = linear.pack_w8(codes, torch.ones(4096))
for rows in (1, 64):
    linear.linear(torch.randn(rows, 2048), weight, None, 4096)
assert library.library().shares_threads
print(before, len(os.listdir('/proc/self/task')))
maps = open('/proc/self/maps').read()
print(sorted(set(re.findall(r'lib(?:gomp|iomp5|omp)[-.\\w]*', maps))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
    )
    assert done.returncode == 0, done.stderr
    counts, libraries = done.stdout.splitlines()[-2:]
    before, after = map(int, counts.split())
    assert before >= 3 and before == after
    assert libraries.count("'") == 2, libraries


# In PyTorch


def test_the_ops_keep_torchs_rules() -> None:
    layer = Layer(4, 32, (3, 20, 64), bias=True)
    arguments: tuple[Any, ...] = (layer.x, layer.pack(), layer.bias, 20, 32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dfc.linear_w4.default, arguments, test_utils=checks)
    eight = Layer(8, None, (3, 20, 64))
    arguments = (eight.x, eight.pack(), None, 20, 0, linear.GELU)
    torch.library.opcheck(torch.ops.dfc.linear_w8.default, arguments, test_utils=checks)


# In a graph


def graph_of(layer: Layer, activations: str = "int8", dtype: str = "f32") -> Graph:
    graph = Graph("layer", ranges={"B": (1, None)})
    x = graph.add_input("x", TensorType(DTYPES[dtype], (symbol("B"), layer.x.shape[1])))
    graph.arguments = (Argument("x", LEAF),)
    weight = graph.add_constant("weight", layer.codes)
    scale = graph.add_constant("scale", layer.scale)
    bias = None if layer.bias is None else graph.add_constant("bias", layer.bias)
    if layer.bits == 4:
        zero = None if layer.zero is None else graph.add_constant("zero", layer.zero)
        operands = [x, weight, scale, zero, bias]
    else:
        operands = [x, weight, scale, bias]
    attributes = {"group": layer.group, "activations": activations}
    node = graph.add(f"dfc.linear_w{layer.bits}", operands, attributes)
    graph.set_outputs([node.result])
    return graph


def called(module: torch.fx.GraphModule) -> list[Any]:
    size = torch.ops.aten.sym_size.int
    functions = [n.target for n in module.graph.nodes if n.op == "call_function"]
    return [f for f in functions if f is not size]


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None), (8, 64)])
def test_a_compiled_graph_runs_on_the_kernels(bits: int, group: int | None) -> None:
    layer = Layer(bits, group, (3, 20, 96), zeros=True, bias=True)
    graph = graph_of(layer)
    (target,) = called(to_fx(graph, kernels=kernels("cpu")))
    assert isinstance(target.__self__, linear.Bound)
    module = to_fx(graph, kernels=kernels("cpu", traced=True))
    assert called(module) == [getattr(torch.ops.dfc, f"linear_w{bits}").default]
    assert sum(b.numel() for b in module.buffers()) == layer.pack().numel() + 20  # and bias
    compiled = dfc.compile(graph, (layer.x,), engine="eager")
    torch.testing.assert_close(compiled(layer.x), layer.meaning(), rtol=1e-5, atol=1e-5)
    assert compiled(layer.x[:1]).shape == (1, 20)


def test_a_gelu_that_a_layer_alone_reads_is_left_to_it() -> None:
    layer = Layer(8, None, (3, 20, 96), bias=True)
    graph = graph_of(layer)
    (node,) = graph.nodes
    x = graph.add("aten.mul.Scalar", [graph.inputs[0]], {"other": 2.0}, before=node).result
    gelu = graph.add("aten.gelu.default", [x], {"approximate": "none"}, before=node).result
    graph.set_inputs_of(node, [gelu, *node.inputs[1:]])
    (want,) = to_fx(graph, kernels={})(layer.x)
    mul, target = called(module := to_fx(graph, kernels=kernels("cpu")))
    assert mul is torch.ops.aten.mul.Scalar and target.__self__.before == linear.GELU
    torch.testing.assert_close(module(layer.x)[0], want, rtol=1e-2, atol=1e-2)
    (traced,) = to_fx(graph, kernels=kernels("cpu", traced=True))(layer.x)
    assert torch.equal(traced, module(layer.x)[0])
    graph.set_outputs([node.result, gelu])
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 3
    graph.set_outputs([node.result])
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 2
    graph.set_attributes(gelu.node, approximate="tanh")
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 3


def test_layers_of_one_weight_share_what_is_packed() -> None:
    graph = graph_of(Layer(8, None, (3, 20, 96)))
    (node,) = graph.nodes
    again = graph.add(node.op, node.inputs, node.attributes)
    graph.set_outputs([node.result, again.result])
    assert len(list(to_fx(graph, kernels=kernels("cpu", traced=True)).buffers())) == 1
    one, other = called(to_fx(graph, kernels=kernels("cpu")))
    assert one.__self__.packed is other.__self__.packed


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (torch.nn.Linear(64, n, bias=False) for n in (64, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ torch.cat([self.k(x), self.v(x)], -1).mT, -1)


def test_projections_are_merged_and_then_quantized_for_one_call() -> None:
    recipe = "dfc 1\nrecipe r {\n  fuse\n  quantize int4 with scheme=dynamic, group=32\n}"
    compiled = dfc.compile(Attention(), (torch.randn(1, 5, 64),), recipe=recipe, engine="eager")
    (target,) = [
        f
        for f in called(to_fx(compiled.graph, kernels=kernels("cpu")))
        if isinstance(getattr(f, "__self__", None), linear.Bound)
    ]
    assert (target.__self__.n, target.__self__.k) == (128, 64)


def test_what_kernels_do_not_take_is_left_to_torch() -> None:
    graph = graph_of(Layer(4, 32, (3, 20, 64)), dtype="f64")
    (node,) = graph.nodes
    assert "f64" in str(why_not(node))
    module = to_fx(graph, kernels=kernels("cpu"))
    assert len(list(module.buffers())) == 2  # codes and scales as they are
    assert kernels("xla") == {}


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None), (8, 64)])
def test_weights_that_are_multiplied_as_floats_are_unpacked_once(
    bits: int, group: int | None
) -> None:
    layer = Layer(bits, group, (3, 20, 96), zeros=True, bias=True)
    graph = graph_of(layer, activations="float")
    one, other = (to_fx(graph, kernels=kernels("cpu")) for _ in range(2))
    assert called(one) == [torch.ops.aten.linear.default]
    shapes = sorted(tuple(b.shape) for b in one.buffers())
    assert shapes == [(20,), (20, 96)]  # bias and floats: the codes are let go
    (want,) = interpret(graph, [layer.x])
    assert torch.equal(one(layer.x)[0], want)
    pointers = [{b.data_ptr() for b in m.buffers() if b.dim() == 2} for m in (one, other)]
    assert pointers[0] == pointers[1]


@pytest.mark.slow  # the C++ compiler of torch.compile takes half a minute
def test_inductor_calls_the_kernels() -> None:
    layer = Layer(4, 32, (3, 20, 64), bias=True)
    compiled = dfc.compile(graph_of(layer), (layer.x,), engine="inductor")
    torch.testing.assert_close(compiled(layer.x), layer.meaning(), rtol=1e-5, atol=1e-5)


# What is packed is kept


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)


def keep(layer: Layer, digests: tuple[str, ...] = ("a",)) -> Tensor:
    group = layer.group or 0
    sizes = layer.bits, layer.n, layer.x.shape[1], group
    return packed.packed_weight(digests, *sizes, layer.pack)


def test_packed_weights_lie_on_pages_of_their_own_size() -> None:
    """A small one shares a chunk with others, a large one has its own; none overlaps another."""
    sizes = (1, 63, 64, 65, 5 << 20, 40 << 20)
    parts = [memory.huge(size) for size in sizes]
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert part.numel() == size and part.data_ptr() % memory.LINE == 0
        part.fill_(i + 1)
    assert all(bool((part == i + 1).all()) for i, part in enumerate(parts))


@pytest.mark.usefixtures("small")
def test_a_packed_weight_is_written_once_and_read(own_cache: Path) -> None:
    layer = Layer(4, 32, (3, 20, 64))
    want = keep(layer)
    assert keep(layer) is want
    (file,) = own_cache.iterdir()
    packed._held.clear()
    layer.pack = None  # type: ignore[assignment,method-assign]  # a second time there is no need
    assert torch.equal(keep(layer), want)
    assert file.stat().st_mode & 0o077 == 0 or own_cache.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("small")
def test_a_file_that_is_not_whole_is_written_anew(own_cache: Path) -> None:
    layer = Layer(8, None, (3, 20, 64))
    want = keep(layer).clone()
    (file,) = own_cache.iterdir()
    for broken in (b"", b"x" * 100, file.read_bytes()[:-1]):
        packed._held.clear()
        file.write_bytes(broken)
        assert torch.equal(keep(layer), want)
        assert file.read_bytes() == bytes(want.numpy())


@pytest.mark.usefixtures("small")
def test_a_folder_that_others_can_write_to_is_passed_by(own_cache: Path) -> None:
    layer = Layer(8, None, (3, 20, 64))
    want = keep(layer).clone()
    (file,) = own_cache.iterdir()
    file.write_bytes(bytes(len(file.read_bytes())))
    own_cache.chmod(0o777)
    packed._held.clear()
    assert torch.equal(keep(layer), want)
    assert file.read_bytes()[:4] == bytes(4)


@pytest.mark.usefixtures("small")
def test_what_was_not_used_for_longest_goes_first(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(8, None, (3, 20, 64))
    size = keep(layer).numel()
    (old,) = own_cache.iterdir()
    os.utime(old, (1, 1))
    monkeypatch.setattr(packed, "MOST_BYTES", size)
    keep(layer, ("b",))
    assert not old.exists() and len(list(own_cache.iterdir())) == 1
