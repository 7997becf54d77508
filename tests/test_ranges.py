"""Ranges: what a streaming histogram knows, and what each way of clipping makes of it."""

import math

import pytest
import torch

from dfc.compress import ranges
from dfc.compress.ranges import (
    RANGES,
    UNIT,
    Histogram,
    Range,
    _relative_entropy,
    mse,
    percentile,
)
from dfc.errors import DfcError


def seen(*batches):
    h = Histogram("%x")
    for x in batches:
        h.update(x)
    return h


def normal(n, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)) * scale


def error(x, r):
    scale, zero = r.affine()
    q = (x / scale).round().add(zero).clamp(0, 255)
    return float(((q - zero) * scale - x).square().mean())


def test_counts_do_not_depend_on_batches():
    x = torch.cat([normal(1000, 0.01), normal(1000), normal(1000, 50.0)])
    one, many = seen(x), seen(*x.split(7))
    back = seen(*x.flip(0).split(100))
    for other in (many, back):
        for k, t in one.state().items():
            assert torch.equal(t, other.state()[k])
    assert int(one.counts.sum()) == 3000 and 2048 <= len(one.counts) <= 4096


def test_quantiles_are_those_of_all_values():
    x = normal(100_000)
    h = seen(*x.split(999))
    for q in (0.0001, 0.01, 0.5, 0.99, 0.9999):
        assert h.quantile(q) == pytest.approx(float(torch.quantile(x, q)), abs=0.02)


def test_a_state_is_taken_up():
    x = normal(500)
    first = seen(x[:100])
    second = Histogram("%x")
    second.load(first.state())
    second.update(x[100:])
    assert torch.equal(second.counts, seen(x).counts) and second.whole == seen(x).whole


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0])
def test_every_range_contains_zero_exactly(name, shift):
    r = RANGES[name](seen(normal(5000) * 0.5 + shift))
    scale, zero = r.affine()
    assert r.low <= 0 <= r.high and isinstance(zero, int) and 0 <= zero <= 255
    assert scale * (0 - zero) <= 0 <= scale * (255 - zero)


def test_outliers_are_clipped_where_it_pays():
    x = normal(200_000)
    x[0] = 40.0
    h = seen(x)
    whole, best = h.whole, mse(h)
    assert whole.high == 40.0 and best.high < 36
    assert error(x, best) < 0.9 * error(x, whole)
    assert percentile(h).high < 5


def test_mse_is_no_worse_than_any_other_range():
    x = torch.cat([normal(20_000), normal(2000, 4.0)])
    h = seen(x)
    errors = {name: error(x, RANGES[name](h)) for name in RANGES}
    assert errors["mse"] <= min(errors.values()) * 1.01


def test_entropy_keeps_the_bulk():
    x = normal(100_000)
    x[:20] = 30.0
    assert 3 < RANGES["entropy"](seen(x)).high < 20


@pytest.mark.parametrize("masked", [-1e4, torch.finfo(torch.float32).min, -math.inf])
def test_masked_scores_are_not_seen(masked):
    x = normal(1000)
    scores = torch.cat([x, x + masked])
    assert seen(scores).whole == seen(x).whole


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_by_name(bad):
    x = normal(10)
    x[3] = bad
    with pytest.raises(DfcError, match="1 number that is NaN or infinite in %x"):
        seen(x)


def test_what_is_always_zero_has_a_scale():
    assert RANGES["mse"](seen(torch.zeros(8))).affine() == (1.0, 0)
    assert Range(0.0, 0.0).affine() == (1.0, 0)
    assert seen().whole == Range(0.0, 0.0)


def test_softmax_has_the_scale_of_its_own():
    assert UNIT.affine() == (1 / 256, 0)


def test_zeros_do_not_let_entropy_clip_the_rest():
    """A ReLU's many zeros are exact in every range: numbers beside them decide."""
    for x in (normal(20_000).relu(), (normal(20_000) - 1.5).relu(), (-normal(20_000)).relu() * -1):
        h = seen(x)
        assert error(x, RANGES["entropy"](h)) < 10 * error(x, RANGES["mse"](h))
    empty = seen(torch.zeros(5))
    assert RANGES["entropy"](empty) == empty.whole == Range(0.0, 0.0)


def divergence(values, shares, r):
    """Bins clipped into a range against what the levels tell of them, bin by bin."""
    scale, zero = r.affine()
    inside = [i for i, v in enumerate(values) if r.low <= v <= r.high]
    p = {i: shares[i] for i in inside}
    level = {i: min(max(round(values[i] / scale) + zero, 0), 255) for i in inside}
    bins: dict[int, list[int]] = {}
    for i in inside:
        bins.setdefault(level[i], []).extend([i] if p[i] else [])
    q = {i: sum(shares[j] for j in bins[level[i]]) / max(len(bins[level[i]]), 1) for i in inside}
    q = {i: x if p[i] else 0.0 for i, x in q.items()}
    total = sum(q.values())
    p[inside[0]] += sum(s for v, s in zip(values, shares, strict=True) if v < r.low)
    p[inside[-1]] += sum(s for v, s in zip(values, shares, strict=True) if v > r.high)
    return sum(x * math.log(x / max(q[i] / total, 1e-12)) for i, x in p.items() if x)


@pytest.mark.parametrize("x", [normal(3000), normal(3000).relu() - 0.3, normal(3000) ** 3])
def test_entropy_is_what_its_definition_says(x):
    h = seen(x)
    values, counts = h.centres().tolist(), h.without_zeros().double()
    shares = (counts / counts.sum()).tolist()
    tried = []
    for r in (Range(-0.5, 1.0), RANGES["entropy"](h), h.whole, Range(-0.3, 0.2)):
        wanted = divergence(values, shares, r)
        mine = _relative_entropy(h.centres().numpy(), (counts / counts.sum()).numpy(), r)
        assert mine == pytest.approx(wanted, rel=1e-9)
        tried.append(wanted)
    assert tried[1] == min(tried)


def test_a_range_is_tried_once():
    tried = []

    def loss(values, shares, r):
        tried.append(r)
        return r.high

    x = normal(100).abs()
    ranges._best(seen(x), loss)
    assert len(tried) == len(set(tried)) == 81
