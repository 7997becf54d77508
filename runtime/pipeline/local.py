"""A graph as a pipeline in one process: a batch is cut into microbatches that follow each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.calling import build_outputs, flat_inputs, own_outputs
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType
from dfc.planning.stages import StageGraph, split
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.lanes import Lanes, Step
from dfc.runtime.pipeline.profile import node_seconds


@dataclass(frozen=True)
class Report:
    """What a step took, beside what was predicted.

    Units:  seconds; `busy` is the computing share of each lane, `bubble` what is left of the
            busiest one's time.
    """

    seconds: float
    stage_seconds: tuple[float, ...]  # the median of a microbatch at each stage
    busy: tuple[float, ...]
    predicted: float  # by the simulator, from the stages' own times

    @property
    def bubble(self) -> float:
        return 1 - max(self.busy)


def balanced(graph: Graph, stages: int, inputs: Sequence[Any], threads: int = 1) -> dict[Node, int]:
    """Stages of equal time on threads of this machine, from each node's measured time.

    Raises:  DfcError N053 for fewer stages than one.
    """
    from dataclasses import replace

    from dfc.planning.machine import Device, Machine, Wire
    from dfc.planning.pipeline import plan, stage_of

    if stages < 1:
        raise DfcError("N053", f"a pipeline has at least one stage, not {stages}")
    took = node_seconds(graph, inputs, threads)
    lane = Device("lane", "cpu", 1e18, 1e18, {"f32": 1e18})
    wires = {(i, j): Wire() for i in range(stages) for j in range(stages)}
    lanes = tuple(replace(lane, name=f"lane{i}") for i in range(stages))
    sizes = bind_inputs(graph, inputs)
    found = plan(graph, Machine("threads", lanes, wires), sizes=sizes, measured=took.get)
    return stage_of(found)


class Pipeline:
    """Stages of one graph on threads of this process; called like the model, with whole batches.

    Needs:   a graph with a dynamic batch dimension, unless every call is one microbatch.
    Ensures: results equal those of the stages run one after another on the same microbatches.
    """

    def __init__(
        self,
        graph: Graph,
        stage_of: Mapping[Node, int],
        *,
        engine: str = "eager",
        batch: str | None = None,
        microbatches: int = 8,
        threads: int | None = None,
    ) -> None:
        import torch

        self.graph = graph
        self.stages: list[StageGraph] = split(graph, stage_of)
        self.batch = batch or _only_symbol(graph)
        self.microbatches = microbatches
        total = threads or torch.get_num_threads()
        each = max(1, total // len(self.stages))
        built = find_engine(engine)
        runners = [built.build(s.graph, "cpu", each) for s in self.stages]
        self._lanes = Lanes(self.stages, runners, each, set(graph.outputs))
        self.last: Step | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch in microbatches; the last one may be smaller.

        Raises:  DfcError K010.. for arguments that do not fit, K050 for a stage that fails, N051
                 for an output that is not one of a batch.
        """
        inputs = flat_inputs(self.graph, args, kwargs)
        leaves = own_outputs(self.run_flat(inputs), inputs, frozenset())
        return build_outputs(self.graph, inputs, iter(leaves))

    def run_flat(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat inputs to output leaves."""
        import torch

        parts = self.cut(inputs)
        self.last = self._lanes.step(parts)
        found = []
        for out in self.graph.outputs:
            pieces = [_value(out, made, part) for made, part in zip(
                self.last.values, parts, strict=True)]  # fmt: skip
            if len(pieces) == 1 or not isinstance(out.type, TensorType):
                found.append(pieces[0])
                continue
            found.append(torch.cat(pieces, dim=self._batch_dim(out)))
        return found

    def cut(self, inputs: Sequence[Any]) -> list[dict[Value, Any]]:
        """The microbatches: each gives every input of the graph its part."""
        dims = {v: _dim_of(v, self.batch) for v in self.graph.inputs}
        size = next(
            (x.shape[dims[v]] for v, x in zip(self.graph.inputs, inputs, strict=True)
             if dims[v] is not None),
            None,
        )  # fmt: skip
        if size is None:
            return [dict(zip(self.graph.inputs, inputs, strict=True))]
        each = -(-size // min(self.microbatches, max(size, 1))) if size else 1
        starts = range(0, max(size, 1), each)
        found = []
        for start in starts:
            part: dict[Value, Any] = {}
            for v, x in zip(self.graph.inputs, inputs, strict=True):
                dim = dims[v]
                length = min(each, size - start)
                part[v] = x if dim is None else x.narrow(dim, start, length)
            found.append(part)
        return found

    def _batch_dim(self, out: Value) -> int:
        dim = _dim_of(out, self.batch)
        if dim is None:
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
        from statistics import median

        from dfc.planning.schedules import schedule
        from dfc.planning.simulate import Costs, simulate

        if self.last is None:
            raise DfcError("N052", "the pipeline has not run yet")
        count = len(self.stages)
        times = [[s.end - s.start for s in self.last.spans if s.stage == i] for i in range(count)]
        medians = [median(t) for t in times]
        edges = sorted({(a, i, 0) for i, s in enumerate(self.stages) for a in s.sources if a >= 0})
        program = schedule("forward", count, len(times[0]))
        predicted = simulate(program, Costs(medians, edges=edges)).makespan
        busy = tuple(sum(t) / self.last.seconds for t in times)
        return Report(self.last.seconds, tuple(medians), busy, float(predicted))

    def close(self) -> None:
        """End the lanes' threads."""
        self._lanes.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _value(out: Value, made: Mapping[Value, Any], given: Mapping[Value, Any]) -> Any:
    if isinstance(out, Parameter):
        assert out.data is not None
        return out.data.tensor()
    return made[out] if out in made else given[out]


def _only_symbol(graph: Graph) -> str | None:
    """The batch: the one symbol that is the first dimension of inputs and outputs."""
    first = {
        getattr(v.type.shape[0], "symbol", None)
        for v in (*graph.inputs, *graph.outputs)
        if isinstance(v.type, TensorType) and v.type.rank
    } - {None}
    return first.pop() if len(first) == 1 else None


def _dim_of(value: Value, batch: str | None) -> int | None:
    if batch is None or not isinstance(value.type, TensorType):
        return None
    for i, size in enumerate(value.type.shape):
        if getattr(size, "symbol", None) == batch:
            return i
    return None
