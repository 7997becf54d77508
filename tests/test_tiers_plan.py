"""Plans of memory tiers: the reference's figures as equalities, and what any plan must keep."""

from __future__ import annotations

import itertools
import json
import random
from fractions import Fraction

import pytest

from dfc.errors import DfcError
from dfc.planning.stream_picture import chrome_trace, svg_timeline
from dfc.planning.streaming import Hop, Layer, bound, break_even, evenly, stream
from dfc.planning.tier_advice import advice, limit
from dfc.planning.tiers import ALIGN, Tiers, plan_tiers

N = 32
# (seconds of a copy, how many are streamed): the bound, evenly in 1 and 2 slots, tail in 1 to 4.
STEADY = {
    (2, 16): (32, (48, 32), (62, 46, 44, 42)),
    (4, 8): (32, (40, 32), (60, 50, 46, 42)),
    (3, 8): (32, (32, 32), (53, 44, 41, 38)),
    (2, 8): (32, (32, 32), (46, 38, 36, 34)),
    (6, 8): (48, (56, 48), (74, 62, 56, 50)),
}
# Layers, how many are cached: what least recently used, the best possible, and a plan read.
READS = {(20, 14, 1): (20, 6.32, 7), (32, 16, 1): (32, 16.5, 17), (32, 31, 1): (32, 1.03, 2),
         (80, 8, 1): (80, 72.9, 73)}  # fmt: skip
MIB = 1 << 20


def model(n: int, size: int = MIB) -> tuple[list[Layer], list[dict[str, int]]]:
    return [Layer(1, size, f"l{i}") for i in range(n)], [{f"w{i}": size} for i in range(n)]


@pytest.mark.parametrize(("copy", "count"), STEADY)
@pytest.mark.parametrize("part", [1, Fraction(1, 3), 0.25], ids=["int", "fraction", "float"])
def test_steady_times_are_those_of_the_reference(copy: int, count: int, part: Fraction) -> None:
    least, even, tail = STEADY[copy, count]
    layers = [Layer(part, 1)] * N
    chosen = evenly([part] * N, count)
    assert len(chosen) == count
    assert bound(layers, chosen, [Hop(copy * part)]) == least * part
    for slots, expected in enumerate(even, 1):
        found = stream(layers, chosen, [Hop(copy * part, slots=slots)])
        assert found.pass_seconds == expected * part
        assert found.bound == least * part
    for slots, expected in enumerate(tail, 1):
        found = stream(layers, range(N - count, N), [Hop(copy * part, slots=slots)])
        assert found.pass_seconds == expected * part


def lru(n: int, cached: int) -> int:
    """Reads of one cyclic pass with the least recently used dropped: as a page cache does."""
    held: list[int] = []
    misses = []
    for _ in range(6):
        missed = 0
        for i in range(n):
            missed += i not in held
            held = [*(x for x in held if x != i), i][-cached:]
        misses.append(missed)
    return misses[-1]


def belady(n: int, cached: int) -> float:
    """Reads of a cyclic pass with that dropped which is used last, in the mean of many."""
    held: set[int] = set()
    passes, missed = 4 * (n - 1), 0
    for p, i in itertools.product(range(passes), range(n)):
        if i not in held:
            missed += p >= n - 1
            if len(held) == cached:
                held.remove(max(held, key=lambda x: (x - i) % n))
            held.add(i)
    return missed / (passes - (n - 1))


@pytest.mark.parametrize(("n", "cached", "slots"), READS)
def test_a_plan_reads_what_the_reference_says(n: int, cached: int, slots: int) -> None:
    least_recently, best, planned = READS[n, cached, slots]
    layers, weights = model(n)
    plan = plan_tiers(layers, weights, cached * MIB, Hop(Fraction(1, MIB)), slots=slots)
    assert plan.bytes_per_pass == planned * MIB == (n - cached + slots) * MIB
    assert plan.held_bytes == cached * MIB
    assert lru(n, cached) == least_recently
    assert belady(n, cached) == pytest.approx(best, rel=5e-3)


def test_break_even_is_the_least_that_hides_the_copies() -> None:
    for per_byte in (Fraction(1, 3), 1, 2, Fraction(7, 2)):
        chosen, hops = evenly([1] * N, 16), [Hop(per_byte)]
        k = break_even([Layer(1, 1)] * N, chosen, hops)

        def hidden(times: int, chosen: tuple[int, ...] = chosen, hops: list[Hop] = hops) -> bool:
            return bound([Layer(times, 1)] * N, chosen, hops) == times * N

        assert hidden(k) and (k == 1 or not hidden(k - 1))


@pytest.mark.parametrize("seed", range(8))
def test_what_any_plan_keeps(seed: int) -> None:
    """Within memory; never under the bound; more memory, bandwidth or speed never hurt."""
    rng = random.Random(seed)
    n = rng.randint(6, 12)
    sizes = [ALIGN * rng.randint(1, 8) for _ in range(n)]
    layers = [Layer(rng.randint(0, 6), size) for size in sizes]
    weights = [{f"w{i}": size} for i, size in enumerate(sizes)]
    hop = Hop(Fraction(rng.randint(1, 5), 2 * ALIGN))
    whole = sum(sizes)
    for memory in range(2 * max(sizes), whole + ALIGN, ALIGN * 2):
        plan = plan_tiers(layers, weights, memory, hop)
        assert plan.held_bytes <= memory
        assert plan.pass_seconds >= plan.bound
        assert plan.bytes_per_pass == sum(sizes[i] for i in plan.streamed)
        assert set(plan.resident) | {n for w in plan.loads for n in w} == {
            f"w{i}" for i in range(n)
        }
        faster = plan_tiers(layers, weights, memory, Hop(hop.per_byte / 2))
        assert faster.pass_seconds <= plan.pass_seconds * Fraction(1003, 1000)
        assert plan.streamed or plan.held_bytes == whole


def test_weights_of_several_layers_are_counted_once_where_they_stay() -> None:
    layers = [Layer(1, 4 * MIB), *[Layer(1, MIB)] * 8, Layer(1, 4 * MIB)]
    weights = [{"tied": 4 * MIB}, *({f"w{i}": MIB} for i in range(8)), {"tied": 4 * MIB}]
    plan = plan_tiers(layers, weights, 12 * MIB, Hop(1))
    assert not plan.streamed and plan.held_bytes == 12 * MIB
    plan = plan_tiers(layers, weights, 9 * MIB, Hop(1))
    assert "tied" in plan.resident  # with large slots more would be streamed
    both = Tiers(tuple(layers), tuple(weights), (0, 9), Hop(1, slots=1), 12 * MIB)
    assert both.bytes_per_pass == 8 * MIB and both.resident_bytes == 8 * MIB
    one = Tiers(tuple(layers), tuple(weights), (0, 1), Hop(1, slots=1), 12 * MIB)
    assert one.loads == ({}, {"w0": MIB})  # the other reader has it


def test_a_memory_that_is_too_small_is_told_with_what_would_do() -> None:
    layers, weights = model(4)
    with pytest.raises(DfcError, match="N064") as e:
        plan_tiers(layers, weights, MIB // 2, Hop(1), fixed=MIB)
    assert e.value.status == 6
    assert "it takes 2 MiB, 1.5 MiB more" in str(e.value) and "`l0` with 1 MiB" in str(e.value)
    assert plan_tiers(layers, weights, 2 * MIB, Hop(1), fixed=MIB).held_bytes == 2 * MIB


def test_two_hops_are_as_slow_as_the_slower_one() -> None:
    layers = [Layer(1, 1)] * N
    chosen = evenly([1] * N, 8)
    for disk, link in ((2, 1), (6, 1), (1, 6), (5, 5)):
        hops = [Hop(disk, name="disk", slots=3), Hop(link, name="link")]
        found = stream(layers, chosen, hops)
        assert found.bound == max(32, 8 * disk, 8 * link)
        assert found.bound <= found.pass_seconds <= 1.2 * found.bound


def test_slots_are_never_written_before_they_are_read() -> None:
    rng = random.Random(0)
    for _ in range(20):
        layers = [Layer(rng.randint(1, 4), rng.randint(1, 9)) for _ in range(12)]
        chosen = tuple(sorted(rng.sample(range(12), 5)))
        slots = rng.randint(1, 3)
        found = stream(layers, chosen, [Hop(1, slots=slots)], passes=4)
        compute, copies = found.lanes[0][1], found.lanes[1][1]
        read = [compute[p * 12 + i] for p in range(4) for i in chosen]
        for q, (_, start, end) in enumerate(copies):
            assert end <= read[q][1]
            if q >= slots:
                assert start >= read[q - slots][2]


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(DfcError, match="N024"):
        stream([Layer(1, 1)], [1], [Hop(1)])
    with pytest.raises(DfcError, match="N024"):
        stream([Layer(1, 1)], [0], [Hop(1, slots=0)])


def test_pictures_and_words_say_what_happens() -> None:
    layers, weights = model(8)
    plan = plan_tiers(layers, weights, 4 * MIB, Hop(Fraction(6, MIB), name="disk"))
    trace = chrome_trace(plan.simulation)["traceEvents"]
    names = [e["args"]["name"] for e in trace if e["ph"] == "M"]
    assert names == ["compute", "disk"] and json.dumps(trace)
    assert sum(e["ph"] == "X" and e["tid"] == 1 for e in trace) == 12 * len(plan.streamed)
    picture = svg_timeline(plan.simulation, "<it>")
    assert picture.startswith("<svg") and "&lt;it&gt;" in picture and "disk" in picture
    assert limit(plan) == "copies from disk"
    gains = dict(advice(plan))
    assert 1.5 < gains["twice the bandwidth of disk"] <= 2.0
    assert any("holds all weights" in what for what in gains)
    whole = plan_tiers(layers, weights, 9 * MIB, Hop(1))
    assert not advice(whole) and limit(whole) == "computing"
