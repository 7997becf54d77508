"""A device that multiplies float32 with 10 bits of mantissa: the processor, made to do so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dfc
from dfc.recipe import bench, choose, short_products
from dfc.recipe.bench import Bench
from dfc.rewrite.probe import make_probes

SAID = "convolutions (torch.backends.cudnn.allow_tf32)"


class Short(TorchDispatchMode):
    """Convolutions of numbers that have so many bits of mantissa."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            args = tuple(self._short(x) for x in args)
        return func(*args, **(kwargs or {}))

    def _short(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        half, mask = 1 << (self.dropped - 1), -1 << self.dropped
        return ((x.contiguous().view(torch.int32) + half) & mask).view(torch.float32)


def made() -> tuple[Any, Bench]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    graph = dfc.trace(model, (x,))
    return graph, Bench(graph, make_probes(graph, [x]))


def test_engines_are_held_to_what_eager_mode_gives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plain = made()
    next(iter(plain.probes.ready()))  # the witness is not short
    with Short(10):
        assert plain.ready(graph, "eager").wrong is not None  # where PyTorch allows none of it
        monkeypatch.setattr(bench.short_products, "short_products", lambda *_: [SAID])
        _, there = made()
        there.probes = plain.probes
        assert there.ready(graph, "eager").wrong is None
        runner = bench.find_engine("eager").build(graph, "cpu")

        def shorter(inputs: Any) -> Any:
            with Short(7):
                return runner(inputs)

        standard = bench.standard_on("cpu", there.probes, graph)
        verdict = bench.judge_engine(standard, graph, shorter, 0.0)
        assert "too far" in str(verdict.difference)  # with 7 bits


def test_what_eager_mode_gives_is_no_standard_when_it_is_farther(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, plain = made()
    monkeypatch.setattr(bench.short_products, "short_products", lambda *_: [SAID])
    next(iter(plain.probes.ready()))
    with Short(3):
        assert plain.ready(graph, "eager").wrong is not None


def test_the_setting_is_named_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, there = made()
    assert short_products.short_products(graph, "cpu") == []
    monkeypatch.setattr(short_products, "_allowed", lambda device: {"conv", "matmul"})
    assert short_products.short_products(graph, "cuda:0") == [SAID]
    there.device = "cuda:0"
    (note,) = choose.precision_notes(there, bench.Ready(graph, None, None))  # type: ignore[arg-type]
    assert note == f"float32 {SAID} have 10 bits of mantissa on cuda:0 (TF32)"
    half = dfc.trace(nn.Conv2d(3, 8, 3).half(), (torch.randn(2, 3, 8, 8).half(),))
    assert short_products.short_products(half, "cuda:0") == []


def test_settings_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert short_products._allowed("cuda:0") == {"conv", "rnn"}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert short_products._allowed("cuda:0") == {"conv", "rnn", "matmul"}
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert short_products._allowed("cuda:0") == set()
