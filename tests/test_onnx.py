"""ONNX export, trap by trap: each model's file runs in stock ONNX Runtime and equals PyTorch."""

# ruff: noqa: E501  (a trap is one line of a table)

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfc.ops  # noqa: F401
from dfc.capture.torch_export import trace
from dfc.emit.onnx import build_onnx, input_names, output_names
from dfc.emit.onnx_export import Written, compare, export_onnx, prove
from dfc.emit.onnx_run import Session
from dfc.emit.onnx_ties import ties
from dfc.errors import DfcError
from dfc.runtime.engines.onnxruntime_ import ENGINE

NAN, INF = math.nan, math.inf


class Of(nn.Module):
    """A function as a module, with tensors to own."""

    def __init__(self, function: Callable[..., Any], **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def leaves(x: Any) -> list[Any]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(x) if leaf is not None]


def check(
    tmp_path: Path, model: Any, *calls: tuple[Any, ...], dynamic: bool = True, exact: bool = False
) -> Written:
    """Export with PyTorch's own results as the truth; then run the engine on every call, twice."""
    if not isinstance(model, nn.Module):
        model = Of(lambda self, *args, f=model: f(*args))
    model.eval()
    shapes = None
    if dynamic:
        dim = torch.export.Dim("batch", min=1, max=64)
        inner = tuple(
            {0: dim} if isinstance(x, torch.Tensor) and x.dim() else None for x in calls[0]
        )
        shapes = inner if not isinstance(model, Of) else {"args": inner}
    expected = [leaves(copy.deepcopy(model)(*copy.deepcopy(c))) for c in calls]
    with torch.no_grad():
        graph = trace(model, calls[0], None, shapes)
    count = len(graph.outputs)
    probes = [(list(c), e) for c, e in zip(calls, expected, strict=True)]
    written = export_onnx(graph, tmp_path / "m.onnx", probes=())
    names = output_names(graph)
    for level in ("none", "all"):
        session = Session(written.path, graph, level=level)
        for _ in range(2):
            for inputs, want in probes:
                got = session.run(inputs)[:count]
                if exact:
                    for a, e in zip(got, want, strict=True):
                        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
                compare(graph, inputs, want, got, names)
    run = ENGINE.build(graph)
    for inputs, want in probes:
        compare(graph, inputs, want, run(inputs)[:count], names)
    return written


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def i(*shape: int, low: int = 0, high: int = 10, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(low, high, shape, generator=g).to(dtype)


NANS = torch.tensor([[1.0, NAN, -2.0, INF], [-INF, 0.0, NAN, 3.0], [2.0, 2.0, -1.0, 2.0]])
TIES = torch.tensor(
    [[3.0, 1.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 5.0, 4.0, 5.0]]
)
Z = torch.complex(x(3, 4), x(3, 4, seed=1))

TRAPS: dict[str, tuple[Any, ...]] = {
    "scalar_first": (lambda v: (1.0 - v, 2 / v, 2**v, 7 // v, 3 % v), x(3, 4)),
    "small_constant_survives": (lambda v: 1 / (v.relu() + 1e-8), x(3, 4)),
    "int8_wraps": (lambda v: (v + 100, v * 3, v - 100, -v), i(3, 4, low=100, high=128, dtype=torch.int8)),
    "uint8_wraps": (lambda v: (v + 200, v * 2, v - 50), i(3, 4, high=256, dtype=torch.uint8)),
    "int32_wraps": (lambda v: (v * v, v + 2**30), i(3, 4, low=2**30, high=2**31 - 1, dtype=torch.int32)),
    "int64_sums_are_exact": (lambda v: (v.sum(), v.sum(1), v.cumsum(1)), i(3, 4, low=2**53, high=2**60)),
    "int_division": (
        lambda v: (v // 3, v % 3, v // -3, v % -3, torch.div(v, -3, rounding_mode="trunc"), v.fmod(3), v / 3),
        i(3, 4, low=-9, high=9),
    ),
    "float_division": (
        lambda v: (v // 0.3, v % 0.3, v % -0.3, torch.div(v, 0.3, rounding_mode="trunc"), v.fmod(-0.3)),
        x(3, 4),
    ),
    "shifts": (lambda v: (v << 2, v >> 1, ~v, v & 3, v | 4, v ^ 5), i(3, 4, low=-9, high=9, dtype=torch.int32)),
    "round_half_even": (lambda v: (v.round(), v.trunc(), v.frac()), torch.tensor([[0.5, 1.5, -0.5, -2.5]] * 3)),
    "float_to_int": (lambda v: (v.to(torch.uint8), v.long(), v.bool()), torch.tensor([[300.7, 2.5, 0.0]] * 3)),
    "promotion": (lambda v, n: (v + n, n * 2.5, n > 0.5, torch.where(v > 0, v, n), n + True), x(3, 4), i(3, 4)),
    "argmax_first_of_ties": (lambda v: (v.argmax(-1), v.argmin(-1), v.max(1), v.argmax()), TIES),
    "stable_sort": (
        lambda v: (*v.sort(dim=-1, stable=True), *v.sort(dim=-1, descending=True, stable=True)), TIES),
    "sort_nan_last": (lambda v: (*v.sort(-1), *v.sort(-1, descending=True)), NANS),
    "nan_in_extremes": (
        lambda v: (v.clamp(-1, 1), v.clamp_min(0), v.amax(-1), v.amin(-1), v.max(-1), v.relu(),
                   torch.maximum(v, -v), torch.fmax(v, v.flip(1)), torch.fmin(v, v.flip(1))), NANS),
    "clamp_crossed": (lambda v: v.clamp(1.0, -1.0), x(3, 4)),
    "nan_compares": (lambda v: (v == v, v != v, v.isnan(), v.isinf(), v.isfinite(), v.sign()), NANS),
    "cumulative": (lambda v: (v.cumprod(1), *v.cummax(1), *v.cummin(1), v.cumsum(1)), TIES),
    "cummax_over_batch": (lambda v: (*v.cummax(0), *v.cummin(0), v.cumprod(0)), TIES),
    "cummax_nan": (lambda v: (*v.cummax(1), *v.cummin(1)), NANS),
    "erfinv": (lambda v: (v.tanh().erfinv(), v.erf(), v.lgamma(), v.log1p(), v.expm1()), x(3, 4).abs() * 0.7),
    "tiny_log1p": (lambda v: (v.log1p(), v.expm1()), torch.tensor([[1e-10, -1e-9, 0.0, 1e-4]] * 3)),
    "max_pool_pads_minus_infinity": (lambda v: F.max_pool2d(v - 10, 3, 2, 1), x(2, 3, 7, 7)),
    "max_pool_of_padded_with_zeros": (
        lambda v: (F.max_pool2d(F.pad(v - 10, (1, 1, 1, 1)), 3, 2), F.max_pool1d(F.pad(v[0] - 10, (1, 1)), 3)), x(2, 3, 6, 7)),
    "pool_ceil_mode": (
        lambda v: (F.max_pool2d(v, 3, 2, 1, ceil_mode=True), F.avg_pool2d(v, 3, 2, 1, ceil_mode=True),
                   F.avg_pool2d(v, 3, 2, 1, True, False), F.avg_pool2d(v, 2, divisor_override=3)), x(2, 3, 8, 7)),
    "pool_indices": (lambda v: F.max_pool2d(v, 2, return_indices=True), x(2, 3, 6, 6)),
    "adaptive_pools": (
        lambda v: (F.adaptive_avg_pool2d(v, (3, 2)), F.adaptive_max_pool2d(v, (3, 2)),
                   F.adaptive_max_pool2d(v, 2, return_indices=True)[1], F.adaptive_avg_pool2d(v, 1)), x(2, 3, 7, 5)),
    "zero_d": (lambda v: (v.sum(), v.mean() * 2, v.sum().softmax(0), v[0, 0].reshape(1)), x(3, 4)),
    "empty": (lambda v: (v[:, :0].sum(1), v[:, :0].mean(1), v[:, :0].any(1), torch.cat([v, v[:, :0]], 1)), x(3, 4)),
    "constant_output": (lambda v: (torch.zeros(2), torch.arange(3), v + 1), x(3, 4)),
    "same_output_twice": (lambda v: ((y := v + 1), y, v, v), x(3, 4)),
    "constant_where": (lambda v: (torch.where(v > 0, 1.0, 0.0), torch.where(v > 0, v, -INF)), x(3, 4)),
    "dtype_views": (
        lambda v: (v.view(torch.int32), v.half().view(torch.int16), v.view(torch.uint8), v.view(torch.int16)),
        torch.tensor([[1.0, -0.0, 1e-40, -3.5e38], [INF, 1e30, -1e-3, 7.0]])),
    "bits_to_float": (lambda v: (v.view(torch.float32), v.view(torch.uint8)), i(3, 4, low=-(2**30), high=2**30, dtype=torch.int32)),
    "scatters": (
        lambda v, n: (v.scatter(1, n, 7.0), v.scatter_add(1, n, v), v.scatter_reduce(1, n, v, "amax"),
                      v.scatter_reduce(1, n, v, "mean", include_self=False), v.scatter_reduce(1, n, v, "prod")),
        x(3, 4), i(3, 4, high=4)),
    "index_put": (
        lambda v, n: (v.index_put((n,), torch.ones(4), accumulate=True), v.index_put((torch.tensor([0, -1]),), v[:2] * 2),
                      v.masked_fill(v > 0, -1), torch.where(v > 0, v, 0).masked_scatter(v > 0, v.flip(0))),
        x(3, 4), i(3, high=3)),
    "indexing": (
        lambda v, n: (v[n], v[:, n], v[n, n], v[:, None, n], v[..., [0, -1]], v[[-1]]), x(4, 4), i(4, high=4)),
    "masks": (lambda v: (v[v > 0], (v > 0).nonzero(), v.masked_select(v > 1)), x(3, 4)),
    "unique": (lambda v: torch.unique(v, return_inverse=True, return_counts=True), i(3, 4, high=4)),
    "search": (
        lambda v: (torch.bucketize(v, torch.tensor([-1.0, 0.0, 1.0])),
                   torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), v, right=True)), x(3, 4)),
    "roll_flip_unfold": (lambda v: (v.roll(1, 1), v.roll(2), v.flip(1), v.unfold(1, 2, 1), v.diagonal()), x(4, 4)),
    "attention": (
        lambda q: (F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        x(2, 2, 5, 4)),
    "attention_masked_row": (
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril(-1)),
        x(2, 2, 5, 4)),
    "matrix_times_vector": (lambda v, w: (v.T @ w, v @ v.T @ w, w @ w), x(3, 4), x(3)),
    "linear_algebra": (
        lambda v: (lambda m: (m.inverse(), torch.linalg.det(m), torch.linalg.solve(m, v), torch.linalg.cholesky(
            m @ m.mT), *torch.linalg.qr(v)))(v @ v.mT + 3 * torch.eye(4)), x(2, 4, 3)),
    "norms": (lambda v: (v.norm(dim=1), v.std(1), v.var(0, correction=0), v.logsumexp(1), F.normalize(v)), x(3, 4)),
    "interpolation": (
        lambda v: (F.interpolate(v, scale_factor=2), F.interpolate(v, size=(9, 5), mode="bilinear"),
                   F.interpolate(v, size=(9, 5), mode="bicubic", align_corners=True),
                   F.interpolate(v, scale_factor=1.7, mode="nearest-exact")), x(2, 3, 6, 7)),
    "pads": (
        lambda v: (F.pad(v, (1, 2)), F.pad(v, (1, 1, 2, 0), mode="reflect"), F.pad(v, (1, 1), mode="replicate"),
                   F.pad(v, (2, 1), mode="circular"), F.pad(v, (-1, 1), value=-INF)), x(2, 3, 6)),
    "half": (lambda v: (v @ v.mT, v.softmax(-1), F.gelu(v), v + 1.1, v.cumsum(1)), x(3, 4).half()),
    "brain_half": (lambda v: (v @ v.mT, v.softmax(-1), v.exp(), v + 1.1, v.view(-1), v > 0), x(3, 4).bfloat16()),
    "double": (lambda v: (v @ v.mT, v.erf(), F.gelu(v), v + 1e-12, v.tan()), x(3, 4).double()),
    "complex_arithmetic": (
        lambda z: (z * z.conj(), z.abs(), z.angle(), z + 1, 2 * z, z / (z + 2), z.real, z.exp(), z.sum(1)), Z),
    "complex_in_and_out": (lambda v: torch.view_as_real(torch.view_as_complex(v) * torch.polar(v[..., 0].abs(), v[..., 1])), x(3, 4, 2)),
    "fourier": (
        lambda v: (torch.fft.rfft(v).abs(), torch.fft.irfft(torch.fft.rfft(v)), torch.fft.fft2(v).real,
                   torch.fft.ifft(torch.fft.fft(v)).real), x(3, 8)),
    "vmap": (lambda v: torch.func.vmap(lambda r: r.softmax(0) * r.sum())(v), x(3, 4)),
}  # fmt: skip


def smaller(value: Any) -> Any:
    return value[:2] if isinstance(value, torch.Tensor) and value.dim() else value


# A batch that the model itself relates to another size, or that it bakes in.
STATIC = {"indexing", "roll_flip_unfold", "matrix_times_vector", "index_put"}


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, tmp_path: Path) -> None:
    function, *inputs = TRAPS[name]
    calls = [tuple(inputs)]
    if name not in STATIC:
        calls.append(tuple(map(smaller, inputs)))
        if all(v.shape[0] > 1 for v in inputs):
            calls.append(tuple(torch.cat([v, v.flip(0)]) for v in inputs))
    check(tmp_path, function, *calls, dynamic=name not in STATIC)


def test_layers_with_another_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.GroupNorm(2, 8),
        nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(128, 6), nn.LayerNorm(6), nn.GELU(),
    )  # fmt: skip
    check(tmp_path, model, (x(2, 3, 8, 8),), (x(1, 3, 8, 8),), (x(5, 3, 8, 8),))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True)
    check(tmp_path, model, (x(2, 7, 4),), dynamic=False)


def test_control_flow(tmp_path: Path) -> None:
    def function(v: torch.Tensor) -> Any:
        a = torch.cond(v.sum() > 0, lambda t: t.sin(), lambda t: t - 1, (v,))
        _, b = torch.while_loop(
            lambda k, t: k < 3, lambda k, t: (k + 1, t * 2), (torch.tensor(0), v)
        )
        return a, b

    check(tmp_path, function, (x(3, 4),), (-x(3, 4),), (x(2, 4, seed=3),))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        self.seen += v.sum(0)
        return v + self.seen


def test_state_goes_in_and_comes_out(tmp_path: Path) -> None:
    import onnxruntime

    graph = trace(Counter(), (x(3, 2),))
    written = export_onnx(graph, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(written.path))
    assert [o.name for o in session.get_outputs()] == ["output", "seen.new"]
    assert [o.name for o in session.get_overridable_initializers()] == ["seen"]
    model, state = Counter(), {}
    for seed in range(3):
        v = x(3, 2, seed=seed)
        out, new = session.run(None, {"v": v.numpy(), **state})
        torch.testing.assert_close(torch.from_numpy(out), model(v))
        state = {"seen": new}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.tied = self.inner

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return {"last": self.tied(self.inner(input_ids)) * mask, "pair": (mask + 1, input_ids)}


def test_names_places_and_tied_weights(tmp_path: Path) -> None:
    dim = torch.export.Dim("batch", max=64)
    shapes = {"input_ids": {0: dim}, "mask": {0: dim}}
    graph = trace(Named(), (x(3, 4), x(3, 1)), None, shapes)
    assert input_names(graph) == ["input_ids", "mask"]
    assert output_names(graph) == ["last", "pair.0", "pair.1"]
    model = build_onnx(graph)
    assert set(model.graph.initializers) == {"inner.weight", "inner.bias"}
    assert [str(s) for s in model.graph.inputs[0].shape] == ["batch", "4"]
    gemms = [n for n in model.graph if n.op_type == "Gemm"]
    assert len(gemms) == 2
    # one module under two names: torch tells either
    assert {n.metadata_props["dfc.module"] for n in gemms} <= {"inner", "tied"}
    assert all("test_onnx.py:" in n.metadata_props["dfc.loc"] or "linear.py" in n.metadata_props["dfc.loc"] for n in gemms)  # fmt: skip
    weight = model.graph.initializers["inner.weight"].const_value
    assert weight.raw.data_ptr() == graph.parameters["inner.weight"].data.tensor().data_ptr()


def test_only_standard_ops(tmp_path: Path) -> None:
    model = build_onnx(
        trace(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (x(2, 3, 8),))
    )
    assert {n.domain for n in model.graph} == {""}
    assert not model.functions


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardtanh(-1.0, 2.0), lambda v: v.clamp(0, 6)])
def test_bounds_are_one_op_that_convolutions_take_in(act: Any) -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return act(self.conv(v))

    model = build_onnx(trace(Bounded().eval(), (x(1, 3, 8, 8),)))
    kinds = [n.op_type for n in model.graph if n.op_type != "Constant"]
    assert kinds == ["Conv", "Clip"]


def test_external_data_is_named_by_content(tmp_path: Path) -> None:
    model = nn.Linear(64, 64).eval()
    graph = trace(model, (x(3, 64),))
    probes = [([x(3, 64)], [model(x(3, 64)).detach()])]
    written = export_onnx(graph, tmp_path / "m.onnx", probes=probes, data_above_bytes=1000)
    assert written.data is not None and written.data.stat().st_size >= 64 * 64 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.onnx", written.data.name])
    again = export_onnx(
        graph, tmp_path / "m.onnx", probes=probes, data_above_bytes=1000, force=True
    )
    assert again.data == written.data
    assert prove(graph, written.path, probes) < 1e-5


def test_a_wrong_result_leaves_no_file(tmp_path: Path) -> None:
    graph = trace(nn.Linear(64, 4), (x(3, 64),))
    with pytest.raises(DfcError) as caught:
        export_onnx(
            graph,
            tmp_path / "m.onnx",
            probes=[([x(3, 64)], [torch.zeros(3, 4)])],
            data_above_bytes=100,
        )
    assert (caught.value.code, caught.value.status) == ("X003", 4)
    assert "`output`" in caught.value.message
    assert not list(tmp_path.iterdir())


class Picks(nn.Module):
    """The boxes of the best scores, as detectors have them; untrained, all scores are equal."""

    def __init__(self, equal: bool) -> None:
        super().__init__()
        self.score, self.box = nn.Linear(16, 5), nn.Linear(16, 4)
        if equal:
            nn.init.zeros_(self.score.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = torch.topk(self.score(x).max(-1).values, 6, dim=1).indices
        return self.box(x.gather(1, best.unsqueeze(-1).expand(-1, -1, 16)))


@pytest.mark.parametrize("equal", [True, False])
def test_equal_values_where_an_operator_chooses_are_told(tmp_path: Path, equal: bool) -> None:
    net, given = Picks(equal).eval(), x(2, 40, 16)
    graph = trace(net, (given,))
    wrong = [([given], [net(given).detach() + (0 if equal else 1)])]
    with pytest.raises(DfcError) as caught:
        export_onnx(graph, tmp_path / "m.onnx", probes=wrong)
    told = caught.value.render()
    assert caught.value.code == "X003"
    assert ("aten.topk.default" in told and "12 values that it reads are equal" in told) == equal
    assert ("is not defined" in told) == equal


@pytest.mark.parametrize(
    ("pick", "rows", "count"),
    [
        (lambda x: x.argmax(1), [[1, 3, 3], [5, 4, 4]], 1),
        (lambda x: x.argmin(1), [[1, 3, 3], [5, 4, 4]], 1),
        (lambda x: x.argmax(), [[1, 3, 3], [5, 4, 4]], 0),
        (lambda x: x.max(1).indices, [[1, 3, 3], [5, 4, 4]], 1),
        (lambda x: x.max(), [[3, 3, 3]], 0),
        (lambda x: x.sort(1).indices, [[1, 3, 3], [5, 4, 4]], 2),
        (lambda x: x.topk(2, largest=False).indices, [[1, 3, 3], [5, 4, 4]], 2),
        (lambda x: x.topk(1).indices, [[1, 3, 3], [5, 4, 4]], 1),
        (lambda x: (x * 1e30).argsort(0), [[1, 3], [4, 3]], 1),
    ],
)
def test_what_ties_is_what_is_compared(pick: Any, rows: list[list[int]], count: int) -> None:
    class Pick(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return pick(x)

    given = torch.tensor(rows, dtype=torch.float32)
    told = ties(trace(Pick(), (given,)), [given])
    assert (f"{count} value" in told) if count else not told, told


def test_an_op_without_translation_is_named(tmp_path: Path) -> None:
    graph = trace(Of(lambda self, v: torch.linalg.svd(v)[0]), (x(3, 3),))
    with pytest.raises(DfcError) as caught:
        export_onnx(graph, tmp_path / "m.onnx")
    assert caught.value.code == "X001" and caught.value.status == 3
    assert "svd" in caught.value.message and "test_onnx.py" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [0, 6, 99, "20"])
def test_an_opset_that_is_none_is_refused(opset: Any) -> None:
    with pytest.raises(DfcError, match="an opset is a whole number from 7 to") as caught:
        build_onnx(trace(nn.ReLU(), (x(3),)), opset=opset)
    assert caught.value.status == 2


def test_an_opset_that_is_too_old_is_told(tmp_path: Path) -> None:
    graph = trace(nn.GELU(), (x(3),))
    with pytest.raises(DfcError, match="opset 13 cannot express the model") as caught:
        export_onnx(graph, tmp_path / "m.onnx", opset=13)
    assert caught.value.code == "X001" and "write opset 20" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
        inputs = (torch.empty(3, 4),)
    with pytest.raises(DfcError, match="X004"):
        build_onnx(trace(model, inputs))


def test_the_engine_says_what_it_cannot_run() -> None:
    graph = trace(Of(lambda self, v: (torch.linalg.eigh(v)[0], v + 1)), (x(3, 3),))
    reasons = {n.op: ENGINE.supports(n) for n in graph.nodes}
    assert any(op.startswith("aten.add.") and why is None for op, why in reasons.items())
    assert any("eigh" in op and why for op, why in reasons.items())


def test_the_engine_shares_the_weights() -> None:
    model = nn.Linear(512, 512).eval()
    graph = trace(model, (x(3, 512),))
    run = ENGINE.build(graph, threads=1)
    torch.testing.assert_close(run([x(3, 512)])[0], model(x(3, 512)).detach(), rtol=1e-4, atol=1e-5)


class Drawn(nn.Module):
    """As many rows as are drawn, as speech models that draw the lengths of sounds give."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = x[torch.rand(x.shape[0]) > 0.5]
        return kept, x + 1


def test_a_size_that_is_drawn_is_no_difference_and_what_is_fixed_is(tmp_path: Path) -> None:
    x = torch.arange(64.0).reshape(32, 2)
    graph = trace(Drawn(), (x,), None, None)
    expected = [x[:16], x + 1]
    assert export_onnx(graph, tmp_path / "m.onnx", probes=[([x], expected)]).proved
    names = output_names(graph)
    with pytest.raises(DfcError, match="instead of float32"):
        compare(graph, [x], expected, [x[:5], x[:5]], names, random=True)
    with pytest.raises(DfcError, match="instead of float32"):
        compare(graph, [x], expected, [x[:5, 0], x + 1], names, random=True)
