"""Wrong rewrites are found one by one, told by rule and line, left out; the rest is kept."""

from __future__ import annotations

import pytest

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import EXACT, find_pass
from tests.seeded import BUGS, Bug, Seeded, host

NODES = 27


def bug(name: str) -> Bug:
    return next(b for b in BUGS if b.name == name)


# Seeded bugs


@pytest.mark.parametrize("b", BUGS, ids=str)
def test_a_seeded_bug_is_caught_and_blamed_on_its_rewrite(b: Bug) -> None:
    graph, probes = host()
    outcome = run_passes(graph, [Seeded((b,))], probes=probes)
    (report,) = outcome.reports
    (out,) = report.left_out
    assert report.verdict == "proved" and report.changes == NODES - 1, report.reason
    assert out.number == line_of(graph, b.at) - 1
    if b.by_results or out.node:  # what fails half-way may not have come to its node
        assert out.node == b.at
        assert out.place == f"host.py:{line_of(graph, b.at)} ({module_of(graph, b.at)})"
    assert bool(out.elements) == bool(out.probe) == b.by_results
    assert probes.check(outcome.graph, EXACT).agrees


def line_of(graph: Graph, name: str) -> int:
    return next(n.loc.line for n in graph.nodes if n.results[0].name == name and n.loc)


def module_of(graph: Graph, name: str) -> str:
    return next(n.loc.module for n in graph.nodes if n.results[0].name == name and n.loc)


PAIRS = [
    ("swap the operands of sub", "believe that the batch is 1"),
    ("drop a random op", "raise on the way"),
    ("softmax over another dimension", "state another type"),
    ("another gelu", "forget eps", "ignore alpha", "write an op that does not exist"),
]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("mode", ["each", "end"])
def test_several_bugs_are_all_left_out(names: tuple[str, ...], mode: str) -> None:
    graph, probes = host()
    bugs = tuple(map(bug, names))
    steps = [Seeded(bugs), find_pass("dce")]
    outcome = run_passes(graph, steps, probes=probes, mode=mode)
    report = outcome.reports[0]
    wanted = sorted(line_of(graph, b.at) - 1 for b in bugs)
    assert sorted(x.number for x in report.left_out) == wanted
    assert report.changes == NODES - len(bugs) and report.verdict == "proved"
    assert outcome.left_out == list(report.left_out)
    assert probes.check(outcome.graph, EXACT).agrees


@pytest.mark.parametrize("b", [BUGS[0], BUGS[21]], ids=str)
def test_strict_stops_at_the_rewrite(b: Bug) -> None:
    graph, probes = host()
    with pytest.raises(DfcError, match="pass `seeded`") as error:
        run_passes(graph, [Seeded((b,))], probes=probes, strict=True)
    text = error.value.render()
    number = line_of(graph, b.at)
    assert (error.value.code, error.value.status) == ("V030", 4)
    assert f"change {number}" in text
    if b.by_results:
        assert f"traced from host.py:{number}" in text and "witness" in text


def test_the_worst_elements_are_shown_in_a_table() -> None:
    graph, probes = host()
    outcome = run_passes(graph, [Seeded((bug("sum for mean"),))], probes=probes)
    (out,) = outcome.left_out
    assert len(out.elements) == 5
    assert [e.error for e in out.elements] == sorted((e.error for e in out.elements), reverse=True)
    lines = out.lines()
    assert lines[0] == "seeded: change 18 at %mean = aten.mean.dim, traced from host.py:18 (pool)"
    assert lines[2].split() == ["index", "got", "original", "witness", "error", "allowed"]
    first = out.elements[0]
    assert lines[3].split()[-5] == f"{first.got:.9g}"
    assert abs(first.got - first.witness) == pytest.approx(first.error)
    assert len({len(line) for line in lines[2:]}) == 1, "the columns stand below each other"


def test_a_bug_of_one_size_alone_is_found_on_its_probe() -> None:
    graph, probes = host()
    labels = {p.label: p for p in probes.probes}
    example = labels["the example"]
    example.inputs = [x[:1] for x in example.inputs]  # at batch 1 it is right
    outcome = run_passes(graph, [Seeded((bug("believe that the batch is 1"),))], probes=probes)
    (out,) = outcome.left_out
    assert out.node == "batch" and out.probe == "B=4" != "the example"
