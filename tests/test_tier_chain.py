"""Disk to memory to device: plans by the reference's formulas, and both hops run for real."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from dfc.errors import DfcError
from dfc.planning.streaming import Hop, Layer, bound, evenly, stream
from dfc.planning.tier_advice import advice, limit
from dfc.planning.tier_chain import with_below
from dfc.planning.tiers import ALIGN, Tiers, plan_tiers
from tests.test_tiers_plan import MIB, READS, STEADY, N, model


def streaming_all(n: int, link: Fraction | int = Fraction(1, 1000 * MIB)) -> Tiers:
    """A plan by which every layer is copied to the device."""
    layers, weights = model(n)
    return Tiers(tuple(layers), tuple(weights), tuple(range(n)), Hop(link, name="link"), 4 * MIB)


@pytest.mark.parametrize(("n", "cached", "slots"), READS)
def test_the_lower_tier_reads_what_the_reference_says(n: int, cached: int, slots: int) -> None:
    *_, planned = READS[n, cached, slots]
    disk = Hop(Fraction(1, 10**6 * MIB), name="disk")  # so fast that one slot does
    found = with_below(streaming_all(n), cached * MIB, disk)
    assert found.below is not None and found.below.slots == slots
    assert found.below.bytes_per_pass == planned * MIB == (n - cached + slots) * MIB
    assert found.below.held_bytes == cached * MIB


@pytest.mark.parametrize(("copy", "count"), STEADY)
@pytest.mark.parametrize("slow", ["disk", "link"])
def test_steady_times_hold_over_both_hops(copy: int, count: int, slow: str) -> None:
    """The other hop is so fast that it is no different: the reference's times for one."""
    least, even, tail = STEADY[copy, count]
    layers = [Layer(1, 1)] * N
    quick = Fraction(1, 10**6)
    for placed, row in ((evenly([1] * N, count), even), (tuple(range(N - count, N)), tail)):
        for slots, expected in enumerate(row, 1):
            disk = Hop(copy if slow == "disk" else quick, name="disk", slots=slots)
            link = Hop(copy if slow == "link" else quick, name="link", slots=slots)
            found = stream(layers, placed, [disk, link])
            assert found.bound == least
            # Slots of the quick hop are slots too: it is never slower than with one hop.
            assert least <= found.pass_seconds <= expected + Fraction(count, 1000)


def test_what_is_in_memory_waits_for_no_disk() -> None:
    layers = [Layer(1, 1)] * N
    chosen = evenly([1] * N, 16)
    some = chosen[::2]
    disk, link = Hop(4, name="disk", carries=some), Hop(1, name="link")
    found = stream(layers, chosen, [disk, link])
    assert found.bound == bound(layers, chosen, [disk, link]) == 32  # 8 reads of 4
    assert found.pass_seconds == 32
    names = {lane: [x for x, *_ in spans] for lane, spans in found.lanes}
    assert len(names["disk"]) == 12 * 8 and len(names["link"]) == 12 * 16
    everything = stream(layers, chosen, [Hop(4, name="disk"), link])
    assert everything.bound == 64
    with pytest.raises(DfcError, match="N024"):
        stream(layers, some, [Hop(4, carries=chosen), link])


def test_slots_of_both_hops_are_never_written_before_they_are_read() -> None:
    rng = random.Random(0)
    for _ in range(20):
        layers = [Layer(rng.randint(1, 4), rng.randint(1, 9)) for _ in range(12)]
        chosen = tuple(sorted(rng.sample(range(12), 6)))
        some = tuple(sorted(rng.sample(chosen, 3)))
        low, high = rng.randint(1, 3), rng.randint(1, 3)
        hops = [Hop(rng.randint(1, 3), name="disk", slots=low, carries=some), Hop(1, slots=high)]
        found = stream(layers, chosen, hops, passes=4)
        (_, compute), (_, disk), (_, link) = found.lanes
        copies = {(p, i): link[p * 6 + chosen.index(i)] for p in range(4) for i in chosen}
        through = [copies[p, i] for p in range(4) for i in some]
        for q, (_, start, end) in enumerate(disk):
            assert end <= through[q][1]  # it is read before it goes on
            assert q < low or start >= through[q - low][2]
        read = [compute[p * 12 + i] for p in range(4) for i in chosen]
        for q, (_, start, end) in enumerate(link):
            assert end <= read[q][1]
            assert q < high or start >= read[q - high][2]


@pytest.mark.parametrize("seed", range(6))
def test_what_any_plan_of_three_tiers_keeps(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(6, 12)
    sizes = [ALIGN * rng.randint(1, 8) for _ in range(n)]
    layers = [Layer(rng.randint(1, 6), size) for size in sizes]
    weights = [{f"w{i}": size} for i, size in enumerate(sizes)]
    device = 2 * max(sizes) + sum(sizes) // 4
    upper = plan_tiers(layers, weights, device, Hop(Fraction(1, 4 * ALIGN), name="link"))
    disk = Hop(Fraction(1, 2 * ALIGN), name="disk")
    last: object = None
    for memory in range(2 * max(sizes), sum(sizes) + ALIGN, 2 * ALIGN):
        found = with_below(upper, memory, disk)
        below = found.below
        assert below is not None and below.held_bytes <= memory
        assert found.pass_seconds >= found.bound >= upper.bound
        held = sum(map(sum, (w.values() for i, w in enumerate(below.weights)
                             if i not in below.streamed)))  # fmt: skip
        assert held + below.bytes_per_pass == upper.bytes_per_pass
        assert below.streamed or found.pass_seconds == upper.pass_seconds
        assert last is None or found.pass_seconds <= last * Fraction(11, 10)  # type: ignore[operator]
        last = found.pass_seconds


def test_it_says_what_limits_and_what_would_be_faster() -> None:
    plan = with_below(streaming_all(16), 8 * MIB, Hop(Fraction(8, MIB), name="disk"))
    assert limit(plan) == "copies from disk"
    gains = dict(advice(plan))
    assert 1.5 < gains["twice the bandwidth of disk"] <= 2.01
    assert any("more of the host's memory" in what for what in gains)
    assert "twice the bandwidth of link" not in gains
    with pytest.raises(DfcError, match=r"N064.*1 MiB would do") as e:
        with_below(streaming_all(16), MIB // 2, Hop(1, name="disk"))
    assert e.value.status == 6
    roomy = with_below(streaming_all(16), 16 * MIB, Hop(1, name="disk"))
    assert roomy.below is not None and not roomy.below.streamed and len(roomy.hops) == 1
