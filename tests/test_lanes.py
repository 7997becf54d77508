"""Lanes run any program: in its order, with bounded memory, and end whatever happens."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch

from dfc.emit.onnx import is_random
from dfc.errors import DfcError
from dfc.ir.interpret import interpret
from dfc.planning.actions import Action, Kind, Program, parse_program
from dfc.planning.schedules import forward_program, schedule
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.lanes import Lanes, Values
from dfc.runtime.pipeline.local import Pipeline, rank_threads, thread_shares
from dfc.runtime.pipeline.routes import SLOTS, Edge, routes
from tests.random_graphs import random_graph, random_inputs


class Sums:
    """Stages that add: what F hands on counts the stages before, what I hands back those after."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.kept: dict[tuple[int, int], Any] = {}
        self.done: list[str] = []

    def edges(self) -> list[Edge]:
        last = self.stages - 1
        found = [Edge(HOST, 0, ("x0",)), Edge(last, HOST, (f"x{last + 1}",))]
        for s in range(last):
            found.append(Edge(s, s + 1, (f"x{s + 1}",)))
            found.append(Edge(s + 1, s, (f"g{s + 1}",), backward=True))
        if last > 1:
            found.append(Edge(0, last, ("x1",)))  # a skip
        return [*found, Edge(0, HOST, ("g0",), backward=True)]

    def run(self, action: Action, values: Values) -> Values:
        kind, s, b = action[:3]
        self.done.append(str(action))
        if kind == Kind.F:
            self.kept[s, b] = values[f"x{s}"]
            if s == self.stages - 1 > 1:
                assert values["x1"] == values[f"x{s}"] - s + 1
            return {f"x{s + 1}": values[f"x{s}"] + 1, "spare": None}
        if kind != Kind.W:
            assert self.kept[s, b] == 100 * b + s
        if kind != Kind.I:
            del self.kept[s, b]
        return {} if kind == Kind.W else {f"g{s}": values.get(f"g{s + 1}", 0) + 1}


TRAINED = ["gpipe", "1f1b", "zb1p", "interleaved", "interleaved_zb", "breadth_first", "zb_v",
           "dualpipe_v"]  # fmt: skip


@pytest.mark.parametrize("name", ["forward", *TRAINED])
@pytest.mark.parametrize("ranks, m", [(1, 2), (2, 4), (3, 6)])
def test_every_schedule_is_run_as_it_is(name: str, ranks: int, m: int) -> None:
    program = schedule(name, ranks, m)
    sums = Sums(program.stages)
    with Lanes(sums.edges(), sums.run, [1] * ranks) as lanes:
        for _ in range(3):
            sums.done.clear()
            step = lanes.step(program, [{"x0": 100 * b} for b in range(m)])
            n = program.stages
            for b, found in enumerate(step.results):
                assert found == {f"x{n}": 100 * b + n, **({"g0": n} if program.trains else {})}
            assert Counter(sums.done) == {str(a): 1 for r in range(ranks) for a in
                                          program.actions(r)}  # fmt: skip
            for rank in range(ranks):
                mine = [s.action for s in step.spans if s.rank == rank]
                assert [str(a) for a in mine] == [str(a) for a in program.actions(rank)]
        assert not sums.kept or not program.trains


def test_stages_may_share_a_rank_in_any_placement() -> None:
    for placement in ((0, 0, 1), (1, 0, 1, 0), (0, 1, 2, 0, 1, 2)):
        ranks = 1 + max(placement)
        sums = Sums(len(placement))
        with Lanes(sums.edges(), sums.run, [1] * ranks) as lanes:
            for m in (1, 4, 5):
                step = lanes.step(forward_program(placement, m), [{"x0": b} for b in range(m)])
                last = f"x{len(placement)}"
                assert [r[last] for r in step.results] == [b + len(placement) for b in range(m)]


def test_a_rank_waits_for_a_reader_that_is_behind() -> None:
    """Rank 0 may be as many microbatches ahead as there are slots, and the one it has just made."""
    ahead: list[int] = []
    counts = Counter[int]()

    def run(action: Action, values: Values) -> Values:
        counts[action.stage] += 1
        ahead.append(counts[0] - counts[1])
        if action.stage:
            time.sleep(0.005)
        return {"x": torch.zeros(3)}

    edges = [Edge(0, 1, ("x",))]
    with Lanes(edges, run, [1, 1]) as lanes:
        step = lanes.step(schedule("forward", 2, 12), [{} for _ in range(12)])
    assert max(ahead) <= SLOTS + 2
    assert step.bytes[edges[0]] == 12 * 3 * 4


def test_an_edge_has_the_slots_that_its_program_needs() -> None:
    """Rank 1 reads everything of stage 1 before anything of stage 0: all of it must wait."""
    text = "0: F(0,0) F(0,1) F(0,2) F(0,3) F(1,0) F(1,1) F(1,2) F(1,3)\n1: {}\n"
    late = " ".join([f"F(2,{b})" for b in range(4)])
    edges = [Edge(0, 2, ("a",)), Edge(0, 1, ("c",)), Edge(1, 2, ("b",))]
    found = routes(parse_program(text.format(late)), edges)
    assert found.slots == (4, None, SLOTS)

    def run(action: Action, values: Values) -> Values:
        return {k: (action.stage, action.microbatch) for k in "abc"}

    with Lanes(edges, run, [1, 1]) as lanes:
        lanes.step(found.program, [{} for _ in range(4)])


def test_what_cannot_end_is_refused_before_it_starts() -> None:
    sums = Sums(2)
    with Lanes(sums.edges(), sums.run, [1, 1]) as lanes:
        deadlock = parse_program("0: F(0,1) F(0,0) B(0,0) B(0,1)\n1: F(1,0) B(1,0) F(1,1) B(1,1)")
        lanes.step(deadlock, [{"x0": 0}, {"x0": 100}])  # this one ends
        sums.done.clear()
        deadlock = parse_program("0: F(0,0) B(0,0) F(0,1) B(0,1)\n1: F(1,1) F(1,0) B(1,0) B(1,1)")
        with pytest.raises(DfcError, match="N020"):
            lanes.step(deadlock, [{"x0": 0}, {"x0": 100}])
        with pytest.raises(DfcError, match=r"N022.*F\(1,1\) is missing"):
            lanes.step(parse_program("0: F(0,0) F(0,1)\n1: F(1,0)"), [{}, {}])
        with pytest.raises(DfcError, match=r"N054.*2 ranks and 3 microbatches"):
            lanes.step(schedule("1f1b", 2, 3), [{}])
        assert not sums.done
    with pytest.raises(DfcError, match="N021"):
        routes(schedule("1f1b", 2, 1), [Edge(1, 0, ("x",))])


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("no"), SystemExit(3),
                                   DfcError("K003", "no")], ids=repr)  # fmt: skip
@pytest.mark.parametrize("where", ["F(1,2)", "B(0,1)", "B(2,0)"])
def test_a_failure_is_named_and_ends_the_step(error: BaseException, where: str) -> None:
    program = schedule("1f1b", 3, 5)
    given = [{"x0": 100 * b} for b in range(5)]
    sums = Sums(3)

    def run(action: Action, values: Values) -> Values:
        if str(action) == where:
            raise error
        return sums.run(action, values)

    before = threading.active_count()
    with Lanes(sums.edges(), run, [1, 1, 1]) as lanes:
        what = "the backward pass of " if where[0] == "B" else ""
        with pytest.raises(DfcError, match=rf"K050.*stage {where[2]} failed on {what}microbatch "
                           rf"{where[4]}: .*(no|3)") as found:  # fmt: skip
            lanes.step(program, given)
        assert found.value.status == 8 and found.value.__cause__ is error
        where = "nowhere"
        assert len(lanes.step(program, given).results) == 5
    assert threading.active_count() == before


def test_a_caller_that_is_interrupted_before_all_ranks_know_gets_its_lanes_back() -> None:
    program, given = schedule("forward", 2, 50), [{"x0": b} for b in range(50)]
    sums = Sums(2)

    class Interrupts:
        """The queue of the second rank, at the moment of Ctrl-C."""

        def put(self, job: object) -> None:
            raise KeyboardInterrupt

    with Lanes(sums.edges(), sums.run, [1, 1]) as lanes:
        work = lanes._work[1]
        lanes._work[1] = Interrupts()
        with pytest.raises(KeyboardInterrupt):
            lanes.step(program, given)
        lanes._work[1] = work
        assert [r["x2"] for r in lanes.step(program, given).results] == list(range(2, 52))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_caller_gets_its_lanes_back() -> None:
    """Ctrl-C while ranks work: the step ends at once, ranks after what they do."""
    program = schedule("forward", 2, 50)
    given = [{"x0": b} for b in range(50)]
    sums, under_way, interrupted = Sums(2), threading.Event(), threading.Event()
    waited: list[bool] = []

    def run(action: Action, values: Values) -> Values:
        if action == (Kind.F, 0, 3, False):
            under_way.set()
            waited.append(interrupted.wait(60))
        return sums.run(action, values)

    def interrupt() -> None:
        under_way.wait(60)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    with Lanes(sums.edges(), run, [1, 1]) as lanes:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            lanes.step(program, given)
        assert not waited  # the rank is still at it
        interrupted.set()
        thread.join()
        assert [r["x2"] for r in lanes.step(program, given).results] == list(range(2, 52))
        assert len(sums.done) < 120  # what was interrupted did not go on


def test_memory_does_not_grow_with_the_number_of_microbatches() -> None:
    """What is alive at once: slots, and what each rank is at."""
    alive: set[int] = set()
    most = 0
    lock = threading.Lock()

    class Held:
        def __init__(self) -> None:
            nonlocal most
            with lock:
                alive.add(id(self))
                most = max(most, len(alive))

        def __del__(self) -> None:
            with lock:
                alive.discard(id(self))

    def run(action: Action, values: Values) -> Values:
        return {f"x{action.stage}": Held()}

    edges = [Edge(0, 1, ("x0",)), Edge(1, 2, ("x1",)), Edge(0, 2, ("x0",))]
    with Lanes(edges, run, [1, 1, 1]) as lanes:
        lanes.step(schedule("forward", 3, 300), [{} for _ in range(300)])
    assert not alive and most <= 2 * (SLOTS + 1) + SLOTS + 1 + 3


def test_any_graph_cut_anywhere_gives_the_same_bits() -> None:
    """Skips, several results of an operator, sizes and unread values, on ranks in any order."""
    tried = 0
    for seed in range(20):
        graph = random_graph(seed, 24)
        if is_random(graph) or graph.mutations:
            continue
        tried += 1
        inputs = random_inputs(graph, seed, 4)
        rng = random.Random(seed)
        nodes = list(graph.nodes)
        bounds = sorted(rng.sample(range(1, len(nodes)), 3))
        placed = {n: sum(i >= b for b in bounds) for i, n in enumerate(nodes)}
        placement = rng.choice([(0, 1, 2, 3), (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 0, 0)])
        expected = interpret(graph, inputs)
        with Pipeline(graph, placed, placement=placement, microbatches=1) as pipeline:
            for f, e in zip(pipeline.run_flat(inputs), expected, strict=True):
                assert f.dtype == e.dtype and f.shape == e.shape, seed
                assert torch.equal(f.nan_to_num(), e.nan_to_num()), seed
    assert tried >= 8


def test_a_value_that_a_stage_does_not_make_is_named() -> None:
    with (
        Lanes([Edge(0, 1, ("x",))], lambda action, values: {}, [1, 1]) as lanes,
        pytest.raises(DfcError, match="stage 0 failed on microbatch 0: KeyError: 'x'"),
    ):
        lanes.step(schedule("forward", 2, 3), [{}, {}, {}])


def test_each_rank_has_its_threads_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    seen: dict[int, int] = {}

    def run(action: Action, values: Values) -> Values:
        torch.ones(200, 200) @ torch.ones(200, 200)
        seen[action.stage] = torch.get_num_threads()
        return {}

    with Lanes([], run, [2, 1, 3]) as lanes:
        lanes.step(forward_program((0, 1, 2), 2), [{}, {}])
    assert seen == {0: 2, 1: 1, 2: 3} and torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_threads_go_where_the_work_is() -> None:
    assert thread_shares(5, [1, 1, 1]) == [2, 2, 1]
    assert thread_shares(2, [1, 1, 1]) == [1, 1, 1]
    assert thread_shares(6, [4, 1, 1]) == [4, 1, 1]


def test_devices_leave_the_processors_ranks_what_they_do_not_need():
    assert rank_threads(2, [0, 1], ["cpu", "cuda:0"]) == [1, 1]
    assert rank_threads(4, [0, 1], ["cpu", "cuda:0"]) == [3, 1]
    assert rank_threads(16, [0, 1, 2], ["cpu", "cuda:0", "cuda:0"]) == [14, 1, 1]
    assert rank_threads(16, [0, 1, 2], ["cuda:0", "cpu", "cuda:1"]) == [1, 12, 1]
    assert rank_threads(9, [0, 1, 2, 2], ["cpu", "cuda:0", "cpu"]) == [3, 1, 4]
    assert rank_threads(3, [0, 1], ["cuda:0", "cuda:0"]) == [1, 1]
    assert rank_threads(5, [0, 1], ["cpu", "cpu"]) == [3, 2]
    assert sum(thread_shares(7, [3, 2])) == 7


def test_programs_and_microbatches_may_change_between_steps() -> None:
    sums = Sums(4)
    programs: list[Program] = [schedule("zb_v", 2, m) for m in (4, 6)]
    programs += [schedule("interleaved", 2, 4), forward_program((0, 1, 1, 0), 3)]
    with Lanes(sums.edges(), sums.run, [1, 1]) as lanes:
        names = {t.name for t in threading.enumerate()}
        for program in programs * 2:
            given = [{"x0": 100 * b} for b in range(program.microbatches)]
            assert len(lanes.step(program, given).results) == program.microbatches
            sums.kept.clear()
        assert {t.name for t in threading.enumerate()} == names
