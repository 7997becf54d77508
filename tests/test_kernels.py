"""The kernels compute what their ops mean, on every path, and refuse what does not fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from dfc.runtime.kernels import library, linear
from tests.kernel_layers import Layer, each_path, layers, needs_kernels, paths


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    needs_kernels()


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


# In PyTorch


def test_the_ops_keep_torchs_rules() -> None:
    layer = Layer(4, 32, (3, 20, 64), bias=True)
    arguments: tuple[Any, ...] = (layer.x, layer.pack(), layer.bias, 20, 32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dfc.linear_w4.default, arguments, test_utils=checks)
    eight = Layer(8, None, (3, 20, 64))
    arguments = (eight.x, eight.pack(), None, 20, 0, linear.GELU)
    torch.library.opcheck(torch.ops.dfc.linear_w8.default, arguments, test_utils=checks)
