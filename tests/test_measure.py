"""Which of two runners is faster: the decision on numbers, and the loop on a clock of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from dfc.runtime.measure import (
    compare,
    judge_pairs,
    measure,
    ratio_interval,
    timing,
    wait_until_quiet,
)
from tests.work_clock import WorkClock


def noisy(ratio: float, count: int, seed: int, noise: float = 0.1) -> tuple[list[float], ...]:
    """Times of two runners in pairs, with a common drift, noise of their own, and outliers."""
    draw = random.Random(seed)

    def one(drift: float) -> float:
        outlier = 5.0 if draw.random() < 0.05 else 1.0
        return drift * outlier * draw.lognormvariate(0, noise)

    drifts = [1 + 0.5 * math.sin(i / 7) for i in range(count)]
    return [one(d) for d in drifts], [ratio * one(d) for d in drifts]


def test_the_interval_of_the_median_by_hand() -> None:
    before, after = [1.0] * 10, [float(i) for i in range(1, 11)]
    found = ratio_interval(before, after, 0.95)
    # one ratio may be left out on each side: 2 * (1 + 10) / 2**10 = 2.1 %
    assert (found.ratio, found.low, found.high) == (5.5, 2.0, 9.0)
    few = ratio_interval(before[:5], after[:5], 0.95)
    assert (few.low, few.high) == (0.0, math.inf)


def test_thousands_of_pairs_have_an_interval() -> None:
    found = ratio_interval(*noisy(0.9, 3000, 1), 0.99)
    assert 0.85 < found.low < found.ratio < found.high < 0.95


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.3])
def test_the_interval_holds_the_true_ratio(ratio: float) -> None:
    held = 0
    for seed in range(200):
        found = ratio_interval(*noisy(ratio, 48, seed), 0.99)
        held += found.low <= ratio <= found.high
    assert held >= 194


def test_verdicts() -> None:
    assert judge_pairs(*noisy(0.8, 96, 1)).verdict == "faster"
    assert judge_pairs(*noisy(1.25, 96, 2)).verdict == "slower"
    assert judge_pairs(*noisy(1.0, 768, 3, noise=0.01)).verdict == "same"
    assert judge_pairs(*noisy(1.0, 24, 4)).verdict == "undecided"
    assert judge_pairs([1.0] * 48, [0.999] * 48).verdict == "same"  # no gain worth the name


def test_equal_runners_are_hardly_ever_told_apart() -> None:
    wrong = 0
    for seed in range(300):
        before, after = noisy(1.0, 192, seed)
        looks = [judge_pairs(before[:n], after[:n]).verdict for n in (12, 24, 48, 96, 192)]
        wrong += bool({"faster", "slower"} & set(looks))
    assert wrong <= 5


class Clock:
    """Time that passes only while a runner works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: Sequence[float]) -> Any:
        steps = iter(range(10**9))

        def run(inputs: Sequence[Any]) -> list[Any]:
            self.calls.append(name)
            self.now += seconds[next(steps) % len(seconds)]
            return []

        return run


def test_a_clear_difference_stops_the_measuring_early() -> None:
    clock = Clock()
    a, b = clock.runner("a", [0.010, 0.011]), clock.runner("b", [0.005, 0.006])
    found = compare(a, b, [], clock=clock)
    assert (found.verdict, found.runs) == ("faster", 12)
    assert found.before_ms == pytest.approx(10.5) and 0.4 < found.ratio < 0.65
    assert "1.9" in str(found) or "2.0" in str(found)
    # after warm-up and one run that sets the length of a sample, pairs take turns in their order
    order = "".join(clock.calls[5:13])
    assert order == "abbaabba"


def test_measuring_ends_in_time_and_says_undecided() -> None:
    clock = Clock()
    spread = [0.010, 0.020, 0.013, 0.017, 0.011, 0.019, 0.012]
    found = compare(clock.runner("a", spread), clock.runner("b", spread[::-1]), [], seconds=1,
                    clock=clock)  # fmt: skip
    assert found.verdict in ("undecided", "same") and clock.now < 2.5


def test_slow_runners_get_pairs_enough_within_ten_times_the_limit() -> None:
    clock = Clock()
    found = compare(clock.runner("a", [1.0]), clock.runner("b", [0.5]), [], seconds=2, clock=clock)
    assert (found.verdict, found.runs) == ("faster", 12)
    clock = Clock()
    found = compare(clock.runner("a", [9.0]), clock.runner("b", [9.0]), [], seconds=2, clock=clock)
    assert found.verdict == "undecided" and found.runs == 2
    assert "".join(clock.calls) == "ababba"  # no run but the first ones is for nothing


def test_short_runs_are_timed_several_at_once() -> None:
    clock = Clock()
    compare(clock.runner("a", [1e-4]), clock.runner("b", [2e-4]), [], question="slower",
            clock=clock)  # fmt: skip
    assert "".join(clock.calls[5:25]) == "a" * 10 + "b" * 10


def test_the_question_decides_when_to_stop() -> None:
    def runs(question: str) -> int:
        clock = Clock()
        a = clock.runner("a", [0.010])
        return compare(a, clock.runner("b", [0.020]), [], question=question, clock=clock).runs

    assert runs("faster") == runs("slower") == runs("either") == 12


def test_percentiles_are_of_the_runs_themselves() -> None:
    found = timing([float(i) for i in range(1, 101)])
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.mean_ms) == (50.5, 95.0, 99.0, 50.5)
    assert timing([3.0]).p99_ms == 3.0


def test_runners_take_turns() -> None:
    seen: list[str] = []
    names = ("a", "b")
    runners = {n: (lambda inputs, n=n: seen.append(n) or []) for n in names}
    found = measure(runners, [], seconds=0.0, least=3)
    assert seen == ["a", "a", "b", "b"] * 4  # each timed run after one that is not
    assert all(t.runs == 3 for t in found.values())


@pytest.mark.parametrize("took, timed", [(20.0, 3), (1.5, 5), (0.5, 5)])
def test_slow_runners_are_not_run_more_often_than_a_median_needs(
    took: float, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = WorkClock(monkeypatch), 0

    def run(inputs: Sequence[Any]) -> list[Any]:
        nonlocal calls
        calls += 1
        clock.sleep(took)
        return []

    found = measure({"a": run, "b": run}, [], seconds=0.1)["a"]
    assert found.runs == timed and found.p50_ms == pytest.approx(1e3 * took, rel=1e-3)
    assert calls == 2 * (timed + (1 if took > 1 else 2))  # a long second run counts


def test_runners_apart_begin_when_the_others_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        busy = WorkClock(patch, busy_until=0.012)
        wait_until_quiet()
        assert 0.012 < busy.now < 0.015
        wait_until_quiet()
        assert busy.now < 0.018
        never = WorkClock(patch, busy_until=9.0)  # whoever never rests is not waited for
        wait_until_quiet()
        assert 0.03 <= never.now < 0.04

    clock = Clock()
    a, b = clock.runner("a", [0.010]), clock.runner("b", [0.005])
    found = compare(a, b, [], apart=True, clock=clock)
    assert found.verdict == "faster" and "".join(clock.calls[5:13]) == "aabbbbaa"


class Device:
    """A device beside the host: a launch takes the host's time, and the work begins after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = WorkClock(monkeypatch)
        self.idle_at = 0.0
        monkeypatch.setattr("dfc.runtime.measure._synchronize", self.wait)

    def wait(self, inputs: Sequence[Any]) -> None:
        self.clock.now = max(self.clock.now, self.idle_at)

    def runner(self, launches: int, launch_s: float, work_s: float) -> Any:
        def run(inputs: Sequence[Any]) -> list[Any]:
            for _ in range(launches):
                self.clock.now += launch_s
                self.idle_at = max(self.idle_at, self.clock.now) + work_s / launches
            return []

        return run


def test_a_device_has_ended_the_run_before_when_a_timed_one_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host is done with a recorded run at once, and with one of many launches when the device
    nearly is: what the device still has to do belongs to neither's next run.
    """
    device = Device(monkeypatch)
    many = device.runner(launches=100, launch_s=60e-6, work_s=5e-3)  # as eager runs: 6 ms
    one = device.runner(launches=1, launch_s=10e-6, work_s=5.5e-3)  # as it is recorded
    found = measure({"many": many, "one": one}, [], seconds=0.1)
    assert found["many"].p50_ms == pytest.approx(6.06, abs=0.05)
    assert found["one"].p50_ms == pytest.approx(5.51, abs=0.05)
    compared = compare(many, one, [], clock=device.clock.perf_counter)
    assert compared.verdict == "faster"
    assert (compared.before_ms, compared.after_ms) == pytest.approx((6.06, 5.51), abs=0.05)
