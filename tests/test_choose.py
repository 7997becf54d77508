"""The last choice of `auto`: engines, the graph's form, the layout of images; all in the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.ir.graph import Graph
from dfc.recipe.bench import Bench
from dfc.runtime.measure import Timing
from tests.work_clock import WorkClock


class Padded(nn.Module):
    """What every preset shortens: a product with one, a reshape to the same shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x * 1).reshape(3))


class Scaled(nn.Linear):
    """What quantization leaves of it is one operator."""

    def __init__(self) -> None:
        super().__init__(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> WorkClock:
    return WorkClock(monkeypatch)


def registered(
    clock: WorkClock, one: Callable[[bool], float], other: Callable[[bool], float]
) -> str:
    for name, times in (("one", one), ("other", other)):
        make(clock, name, times)
    return "one,other"


def is_long(graph: Graph) -> bool:
    return len(graph) > 1


def make(
    clock: WorkClock, name: str, milliseconds: Callable[[Any], float],
    kind: Callable[[Graph], Any] = is_long,
) -> None:  # fmt: skip
    """An engine that takes so long by the kind of graph: as captured, or a shorter one."""
    from dfc.runtime.engines import find_engine

    class Sleepy:
        devices = ("cpu",)

        def supports(self, node: Any) -> None:
            return None

        def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Any:
            inner = find_engine("eager").build(graph, device)
            seconds = milliseconds(kind(graph)) / 1000

            def run(inputs: Any) -> Any:
                clock.sleep(seconds)
                return inner(inputs)

            return run

    Sleepy.name = name  # type: ignore[attr-defined]
    dfc.engine(Sleepy)


def test_the_captured_graph_on_another_engine_may_win(clock: WorkClock, tmp_path: Path) -> None:
    """`one` is faster with the rewritten graph; `other` would be faster still without."""
    names = registered(
        clock, lambda captured: 8 if captured else 4, lambda captured: 1 if captured else 5
    )
    compiled = dfc.compile(Padded(), (torch.randn(3),), engine=names)
    assert compiled.engine.name == "other" and len(compiled.graph) > 1
    told = {e.label: e.verdict for e in compiled.report.engines}
    assert told == {"one": "slower", "other": "slower", "other, as captured": "chosen"}
    decision = compiled.report.decisions[-1]
    assert decision.verdict == "reverted" and "the captured graph on `other`" in decision.reason
    compiled.save(tmp_path / "m.dfcpkg")
    held = dfc.load(tmp_path / "m.dfcpkg", engine="eager")
    assert [(e.label, e.p50_ms) for e in held.report.engines] == [
        (e.label, e.p50_ms) for e in compiled.report.engines
    ]


def test_what_is_not_faster_beyond_noise_is_not_called_slower(clock: WorkClock) -> None:
    names = registered(
        clock, lambda captured: 8 if captured else 4, lambda captured: 3.97 if captured else 5
    )
    compiled = dfc.compile(Padded(), (torch.randn(3),), engine=names)
    last = compiled.report.engines[-1]
    assert compiled.engine.name == "one" and last.label == "other, as captured"
    assert last.verdict == "not faster" and last.reason.startswith("in turns with `one` 1.01x")


def test_an_engine_far_behind_is_not_built_twice(clock: WorkClock) -> None:
    names = registered(clock, lambda captured: 3 if captured else 1, lambda captured: 9)
    compiled = dfc.compile(Padded(), (torch.randn(3),), engine=names)
    assert compiled.engine.name == "one" and len(compiled.graph) == 1
    assert [e.label for e in compiled.report.engines] == ["one", "other"]


def test_where_the_result_is_reverted_every_engine_is_asked(clock: WorkClock) -> None:
    """How long a rewritten graph takes on an engine says nothing of the captured one there."""
    names = registered(
        clock, lambda captured: 3 if captured else 4, lambda captured: 1 if captured else 9
    )
    compiled = dfc.compile(Padded(), (torch.randn(3),), engine=names)
    assert compiled.engine.name == "other" and len(compiled.graph) > 1
    told = {e.label: e.verdict for e in compiled.report.engines}
    assert told == {
        "one": "slower", "one, as captured": "slower",
        "other": "slower", "other, as captured": "chosen",
    }  # fmt: skip
    assert compiled.report.after_ms == pytest.approx(1, rel=0.1)


def test_a_reverted_result_is_timed_as_what_runs(clock: WorkClock) -> None:
    names = registered(clock, lambda captured: 3 if captured else 4, lambda captured: 9)
    report = dfc.compile(Padded(), (torch.randn(3),), engine=names).report
    (chosen,) = [e for e in report.engines if e.verdict == "chosen"]
    assert chosen.label == "one, as captured"
    assert chosen.p50_ms == report.after_ms == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(("other", "chosen", "captured_ms"), [(9, "one", 3), (1, "other", 1)])
def test_before_and_after_are_of_the_same_minute(
    clock: WorkClock, monkeypatch: pytest.MonkeyPatch, other: float, chosen: str, captured_ms: float
) -> None:
    """Each time that the bench measures, the machine has twice as much else to do."""
    load, times = 1.0, Bench.times

    def loaded(self: Bench, *args: Any, **limits: Any) -> list[Timing]:
        nonlocal load
        load *= 2
        return [replace(t, p50_ms=t.p50_ms * load) for t in times(self, *args, **limits)]

    names = registered(
        clock, lambda captured: 3 if captured else 4, lambda captured: other if captured else 9
    )
    model, x = Padded(), torch.randn(3)
    idle = dfc.compile(model, (x,), engine=names).report
    monkeypatch.setattr(Bench, "times", loaded)
    compiled = dfc.compile(model, (x,), engine=names)
    report = compiled.report
    assert compiled.engine.name == chosen and report.after_ms is not None
    assert idle.before_ms and idle.after_ms == pytest.approx(captured_ms, rel=0.1)
    assert report.after_ms > 2 * idle.after_ms
    assert report.before_ms == pytest.approx(idle.before_ms * report.after_ms / idle.after_ms)


def test_versions_of_other_arithmetic_are_measured_each_on_its_own_engine(clock: WorkClock) -> None:
    """`one` is the faster with floats, and slower with integers; `other` is faster with them."""
    names = registered(
        clock, lambda captured: 4 if captured else 6, lambda captured: 8 if captured else 2
    )
    body = "remove_noops\n  q: quantize int8 keep if faster"
    compiled = dfc.compile(
        Scaled(), (torch.randn(3, 64),), engine=names, recipe=f"dfc 1\nrecipe r {{ {body} }}"
    )
    assert compiled.engine.name == "other" and compiled.report.lossy
    (decision,) = [d for d in compiled.report.decisions if d.step.startswith("q:")]
    assert decision.verdict == "kept" and decision.engine == "other"
    assert decision.reason.endswith("on `other` as before it on `one`")
    assert decision.ratio == pytest.approx(2 / 6, rel=0.1)


def test_a_search_measures_what_would_run(clock: WorkClock) -> None:
    """Scales of rows or of halves of them: on `one`, the original's fastest, both would lose."""

    def scales(graph: Graph) -> str:
        found = [p.tensor_type.rank for n, p in graph.parameters.items() if n.endswith("scale")]
        return ("of rows", "of groups")[found[0] - 1] if found else "none"

    make(clock, "one", {"none": 4, "of rows": 6, "of groups": 7}.__getitem__, scales)
    make(clock, "other", {"none": 5, "of rows": 3, "of groups": 1}.__getitem__, scales)
    recipe = "dfc 1\nrecipe r { minimize latency\n  quantize int8 with group=tune(none, 32) }"
    compiled = dfc.compile(
        nn.Linear(64, 64), (torch.randn(3, 64),), engine="one,other", recipe=recipe
    )
    assert compiled.engine.name == "other"
    values = {t.choices["quantize.group"]: t.values["latency"] for t in compiled.report.tried}
    assert values == {"none": pytest.approx(3e-3, rel=0.1), "32": pytest.approx(1e-3, rel=0.1)}


def test_sizes_are_compared_without_an_example_or_an_engine() -> None:
    graph = dfc.trace(Padded(), (torch.randn(3),))
    body = "remove_noops keep if size <= before\n  when size < 1KiB { dce }"
    report = dfc.compile(graph, recipe=f"dfc 1\nrecipe r {{ {body} }}").report
    assert [d.verdict for d in report.decisions] == ["kept", "taken"]
    assert not any(d.engine for d in report.decisions)


def test_of_another_arithmetic_every_engine_is_asked(clock: WorkClock) -> None:
    """An engine may be slow with integers, and the quickest of all with floats."""
    names = registered(
        clock, lambda captured: 8 if captured else 4, lambda captured: 1 if captured else 9
    )
    model = Scaled()
    recipe = "dfc 1\nrecipe r { minimize latency\n  remove_noops\n  quantize int8 }"
    compiled = dfc.compile(model, (torch.randn(3, 64),), engine=names, recipe=recipe)
    assert compiled.engine.name == "other" and len(compiled.graph) > 1


def test_the_users_own_steps_stand_whatever_is_faster(clock: WorkClock) -> None:
    """Only what dfc chose by itself is taken back."""
    names = registered(
        clock, lambda captured: 8 if captured else 4, lambda captured: 1 if captured else 5
    )
    compiled = dfc.compile(
        Padded(), (torch.randn(3),), engine=names, recipe="dfc 1\nrecipe r { remove_noops }"
    )
    assert compiled.engine.name == "one" and len(compiled.report.engines) == 2


def test_auto_tries_channels_last_where_there_are_images() -> None:
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    report = dfc.compile(images, (torch.randn(1, 3, 12, 12),)).report
    tried = {e.name: e for e in report.engines}
    assert tried["eager:channels_last"].p50_ms and tried["eager"].p50_ms
    words = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Linear(10, 4)).eval()
    report = dfc.compile(words, (torch.randn(1, 3, 12),)).report
    assert "eager:channels_last" not in {e.name for e in report.engines}
