"""A graph as a pipeline in one process: a batch is cut into microbatches that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral
from typing import Any, Protocol

from dfc.calling import build_outputs, flat_inputs, own_outputs
from dfc.ending import noticed
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import bind_inputs
from dfc.lang.units import byte_count
from dfc.planning.actions import Action, Program
from dfc.planning.cost import default_sizes
from dfc.planning.engine import Engine, Runner
from dfc.planning.microbatches import batch_dim, batch_dims, checked_batch, joined, parts_of
from dfc.planning.schedules import forward_program
from dfc.planning.stages import StageGraph, split
from dfc.planning.tiers import Tiers
from dfc.planning.torch_device import check_device
from dfc.runtime.allocation import keep_pages
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.lanes import Lanes, Run, Step, Values
from dfc.runtime.pipeline.recorded import RecordedSteps, inner_engines
from dfc.runtime.pipeline.reporting import Report, report_of
from dfc.runtime.pipeline.routes import Edge, stage_edges
from dfc.runtime.pipeline.streams import Streams, device_names, drivers_of, on_stream
from dfc.runtime.tiers.stages import (
    STREAMS,
    Brought,
    Memory,
    Ranks,
    build_stage,
    check_engines,
    close_all,
    plan_stages,
    rank_memories,
)

MICROBATCHES = 8  # by default
_MANY = 8  # threads, of which two for a device are few


def _check_count(microbatches: object) -> None:
    if not isinstance(microbatches, Integral) or int(microbatches) < 1:
        message = f"`microbatches` is a number of at least 1, not {microbatches!r}"
        raise DfcError("N053", message, status=2)


def thread_shares(total: int, loads: Sequence[float]) -> list[int]:
    """Threads for each rank: one at least, the others where the load per thread is greatest.

    Ensures: they add up to `total` wherever that is no less than the ranks.
    """
    shares = [1] * len(loads)
    for _ in range(total - len(loads)):
        shares[max(range(len(loads)), key=lambda r: loads[r] / shares[r])] += 1
    return shares


class Runs(Protocol):
    """What runs a pipeline's programs, wherever its ranks are."""

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        """Run a program; `given` holds the host's values for each microbatch."""
        ...

    def close(self) -> None:
        """End the ranks."""
        ...


class Pipeline:
    """Stages of one graph on threads of this process; called like the model, with whole batches.

    `placement[s]` is the rank, and so the thread, of stage s: by default each has its own. Each
    stage may have an engine of its own, or `build` makes what runs it from its number, its graph
    and its threads. Where all engines record (`eager:cuda_graph`) and all ranks are on one device,
    whole steps are recorded. `threads` are those of all ranks together, or of each. `devices` are
    those of the ranks: `cpu`, `cuda:0`, ...; results lie where they were made. `program` makes the
    program for a number of microbatches. With a `memory`, of each rank or one for all, ranks take
    no more for weights and what is computed of a microbatch: stages that do not fit stream their
    weights, once for each microbatch; `example` are flat inputs by which that is timed and planned.
    With a `host` memory, that is all that weights take of this machine's: what ranks on devices
    stream and it does not hold is read from files, over both hops beside each other.
    Needs:   a graph with a dynamic batch dimension, unless every call is one microbatch.
    Ensures: results equal those of the stages run one after another on the same microbatches.
    Raises:  DfcError N064 (status 6) for a memory that is too small, K070 for weights that are in
             no file, K073 for an engine that cannot stream, K074 for a host's memory without a
             memory, or without a device.
    """

    def __init__(
        self,
        graph: Graph,
        stage_of: Mapping[Node, int],
        *,
        engine: str | Sequence[str] = "eager",
        batch: str | None = None,
        microbatches: int = MICROBATCHES,
        threads: int | Sequence[int] | None = None,
        placement: Sequence[int] | None = None,
        devices: str | Sequence[str] = "cpu",
        program: Callable[[int], Program] | None = None,
        build: Callable[[int, StageGraph, int], Runner] | None = None,
        memory: Memory | None = None,
        host: str | int | None = None,
        example: Sequence[Any] | None = None,
    ) -> None:
        keep_pages()  # of what is put together here, whatever runs the stages
        _check_count(microbatches)
        self.graph = graph
        self.stages: list[StageGraph] = split(graph, stage_of)
        self.placement = _checked(placement, len(self.stages))
        ranks = 1 + max(self.placement)
        self.devices = device_names(one_each(devices, ranks, "devices", "ranks"))
        for device in self._devices_here():
            check_device(device)
        self.threads = _threads(threads, self.placement, self.devices)
        self.engines = one_each(engine, len(self.stages), "engines", "stages")
        self.microbatches = microbatches
        self.batch = checked_batch(graph, batch)
        self._dims = batch_dims(graph, self.batch, microbatches)
        self._program = program or (lambda m: forward_program(self.placement, m))
        self._programs: dict[int, Program] = {}
        self.edges = stage_edges(self.stages, graph.outputs)
        self._build = build or self._on_engine
        if host is not None and memory is None:
            help = 'give memory=["8GiB", "8GiB"], host="16GiB"'
            raise DfcError("K074", "`host` goes with `memory`", help=help, status=2)
        self.tiers = [] if memory is None else self._within(memory, host, example)
        self._runners: list[Runner] = []
        self._lanes = self._start()
        self.last: tuple[Program, Step] | None = None

    def _within(
        self, memory: Memory, host: str | int | None, example: Sequence[Any] | None
    ) -> list[Tiers]:
        """What each stage streams, by the memory of its rank and of the host."""
        memories = rank_memories(memory, len(self.threads))
        below = byte_count(host) if host is not None else None
        ranks = Ranks(self.stages, self.placement, self.devices, self.threads, memories, below)
        sizes, given = default_sizes(self.graph), None
        if example is not None:
            given = self.cut(example)[0]
            sizes.update(bind_inputs(self.graph, [given[v] for v in self.graph.inputs]))
        found = self._planned(ranks, sizes, given)
        check_engines(found, self.engines)
        return found

    def _planned(
        self, ranks: Ranks, sizes: dict[str, int], given: Mapping[Value, Any] | None
    ) -> list[Tiers]:
        return plan_stages(ranks, sizes, given)

    def _on_engine(self, index: int, stage: StageGraph, threads: int) -> Runner:
        name, device = self.engines[index], self.devices[self.placement[index]]
        if self.tiers and name == STREAMS:
            return build_stage(stage.graph, self.tiers[index], device)
        return on_stream(name, find_engine(name).build(stage.graph, device, threads), device)

    def _devices_here(self) -> Sequence[str]:
        """The devices of this machine that are asked for."""
        return self.devices

    def _start(self) -> Runs:
        """What runs programs: here threads of this process."""
        inner = self._recorded()
        with ExitStack() as failing:
            failing.callback(close_all, self._runners)
            for i, (s, rank) in enumerate(zip(self.stages, self.placement, strict=True)):
                if inner is not None:
                    made = inner[i].build(s.graph, self.devices[rank], self.threads[rank])
                else:
                    made = self._build(i, s, self.threads[rank])
                self._runners.append(made)
            failing.pop_all()
        run = stage_runner(self.stages, self._runners)
        lanes = Computing(self.edges, run, self.threads, self.placement, self.devices)
        if inner is not None:
            return lanes.recorded(" and ".join(sorted(set(self.engines))))
        return Counted(lanes, Brought(dict(enumerate(self._runners)))) if self.tiers else lanes

    def _recorded(self) -> list[Engine] | None:
        """The engines inside of those that record, where whole steps are recorded instead."""
        if self.tiers or self._build != self._on_engine:
            return None
        engines = [find_engine(name) for name in self.engines]
        return inner_engines(engines, self.stages, [self.devices[r] for r in self.placement])

    @property
    def leads(self) -> bool:
        """Whether this process is the one that calls; others of a launcher serve it."""
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch in microbatches, whose sizes differ by one item at most.

        Raises:  DfcError K010.. for arguments that do not fit, K050 for a stage that fails, N051
                 for an output that is not one of a batch.
        """
        inputs = flat_inputs(self.graph, args, kwargs)
        leaves = own_outputs(self.run_flat(inputs), inputs, frozenset())
        return build_outputs(self.graph, inputs, iter(leaves))

    def run_flat(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat inputs to output leaves."""
        parts = self.cut(inputs)
        dims = [self._output_dim(v) if len(parts) > 1 else None for v in self.graph.outputs]
        program = self._programs.get(len(parts))
        if program is None:
            program = self._programs[len(parts)] = self._program(len(parts))
        try:
            self.last = program, self._lanes.step(program, parts)
        except KeyboardInterrupt:
            noticed()
            raise
        step = self.last[1]
        pairs = list(zip(step.results, parts, strict=True))
        return [
            joined([_value(out, made, part) for made, part in pairs], dim)
            for out, dim in zip(self.graph.outputs, dims, strict=True)
        ]

    def cut(self, inputs: Sequence[Any]) -> list[dict[Value, Any]]:
        """The microbatches: each gives every input of the graph its part."""
        return parts_of(self.graph, self.batch, inputs, self._dims, self.microbatches)

    def _output_dim(self, out: Value) -> int | None:
        dim = batch_dim(out, self.batch)
        if dim is None and getattr(out.type, "rank", None) is not None and out.node is not None:
            raise DfcError(
                "N051",
                f"the output %{out.name} {out.type} has no dimension `{self.batch}`: its parts "
                "cannot be put together",
                help="run it with microbatches=1, or let the model return one result an item",
            )
        return dim

    def report(self) -> Report:
        """What the last call took.

        Raises:  DfcError N052 before the first call.
        """
        if self.last is None:
            raise DfcError("N052", "the pipeline has not run yet")
        return report_of(*self.last)

    def close(self) -> None:
        """End the ranks."""
        self._lanes.close()
        close_all(self._runners)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        noticed(kind)
        self.close()


class Computing:
    """Lanes of ranks on devices; the spans of a step are those of the devices' own clocks.

    `placement[s]` is the rank of stage s, `devices[r]` the device of rank r.
    """

    def __init__(
        self, edges: Sequence[Edge], run: Run, threads: Sequence[int], placement: Sequence[int],
        devices: Sequence[str],
    ) -> None:  # fmt: skip
        self._streams = None if set(devices) == {"cpu"} else Streams(devices)
        if self._streams is None:
            self.lanes = Lanes(edges, run, threads)
            return
        paced = self._streams.paced(run, placement)
        self.lanes = Lanes(edges, paced, threads, self._streams, drivers_of(devices))

    def recorded(self, name: str) -> RecordedSteps:
        """The same, each step recorded as one CUDA graph; `name` is that of the engines."""
        assert self._streams is not None
        return RecordedSteps(self.lanes, self._streams, name)

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        step = self.lanes.step(program, given)
        return step if self._streams is None else self._streams.timed(step)

    def close(self) -> None:
        self.lanes.close()
        if self._streams is not None:
            self._streams.close()


class Counted:
    """Lanes whose steps tell what their stages' weights brought."""

    def __init__(self, lanes: Runs, brought: Brought) -> None:
        self.lanes, self.brought = lanes, brought

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        self.brought.since()  # of a step that failed
        return replace(self.lanes.step(program, given), streamed=self.brought.since())

    def close(self) -> None:
        self.lanes.close()


def stage_runner(
    stages: Sequence[StageGraph], runners: Sequence[Runner]
) -> Callable[[Action, Values], Values]:
    """Forward actions of stages, for lanes to run."""

    def run(action: Action, values: Values) -> Values:
        stage = stages[action.stage]
        results = runners[action.stage]([values[v] for v in stage.takes])
        made: dict[Any, Any] = dict(zip(stage.gives, results, strict=True))
        return made

    return run


def _checked(placement: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    if placement is None:
        return tuple(range(stages))
    if len(placement) != stages or sorted(set(placement)) != list(range(max(placement) + 1)):
        raise DfcError(
            "N053",
            f"the placement {list(placement)} does not give each of {stages} stages a rank, "
            "counted from 0 without gaps",
        )
    return tuple(placement)


def _threads(
    given: int | Sequence[int] | None, placement: Sequence[int], devices: Sequence[str]
) -> list[int]:
    import torch

    ranks = 1 + max(placement)
    if given is None:
        given = torch.get_num_threads()
    if isinstance(given, int):
        if given < 1:
            raise DfcError("N053", f"{given} are no threads: at least 1 is needed", status=2)
        return rank_threads(given, placement, devices)
    if len(given) != ranks or min(given) < 1:
        raise DfcError("N053", f"{list(given)} are not the threads of {ranks} ranks")
    return list(given)


def rank_threads(total: int, placement: Sequence[int], devices: Sequence[str]) -> list[int]:
    """The threads of each rank, by its stages.

    Why:  a CUDA device needs a thread that starts its kernels, and where there are enough, one that
          copies to it: without a core of their own they hold up the kernels of the processor, all
          of whose threads wait for the last one.
    """
    busy = [r for r, d in enumerate(devices) if d == "cpu"]
    cuda = len(set(devices) - {"cpu"})
    own = total - cuda * (2 if total >= _MANY else 1)
    shares = dict.fromkeys(range(len(devices)), 1)
    if busy:
        found = thread_shares(own, [placement.count(r) for r in busy])
        shares.update(zip(busy, found, strict=True))
    return list(shares.values())


def one_each(given: str | Sequence[str], count: int, what: str, of: str) -> list[str]:
    if isinstance(given, str):
        return [given] * count
    if len(given) != count:
        raise DfcError("N053", f"{len(given)} {what} are given for {count} {of}")
    return list(given)


def _value(out: Value, made: Mapping[Any, Any], given: Mapping[Value, Any]) -> Any:
    if isinstance(out, Parameter):
        assert out.data is not None
        return out.data.tensor()
    return made[out] if out in made else given[out]
