"""Steps of ranks that share a CUDA device, recorded as one CUDA graph and replayed in one launch.

Where kernels are short, the host takes longer to start them than the device to run them, and stages
only add to what there is to start. Recorded, a step is started at once, whatever stages it has, and
the device runs what does not depend on each other side by side: the streams of the ranks become
branches of the graph.

Source:  CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dfc.planning.actions import Program
from dfc.runtime.cuda_graph import CudaGraph, copied_to, recording_errors, signature
from dfc.runtime.modes import as_captured
from dfc.runtime.pipeline.lanes import Lanes, Step, Values
from dfc.runtime.pipeline.streams import Clock, DeviceSpans, Streams, clock

if TYPE_CHECKING:
    import torch

    from dfc.planning.engine import Engine
    from dfc.planning.stages import StageGraph

RECORDED = 4  # steps: each has the memory of all its microbatches' inputs and results


def inner_engines(
    engines: Sequence[Engine], stages: Sequence[StageGraph], devices: Sequence[str]
) -> list[Engine] | None:
    """The engines to run stages by where whole steps are recorded, None where they cannot be.

    They are where every stage's engine records (`:cuda_graph`) and all ranks are on one device.
    Raises:  DfcError K003 for a stage that its engine cannot record.
    """
    if len(set(devices)) > 1 or devices[0] == "cpu":
        return None
    found: list[Engine] = []
    for engine, stage in zip(engines, stages, strict=True):
        # Checks that a stage makes of its data wait for the device: they are not in a recording.
        if not isinstance(engine, CudaGraph) or engine.lifted(stage.graph, devices[0])[1]:
            return None
        found.append(engine.inner)
    return found


@dataclass
class _Recording:
    """One CUDA graph, the tensors that it reads, and what the step leaves."""

    graph: Any  # torch.cuda.CUDAGraph
    program: Program
    inputs: list[torch.Tensor]
    step: Step
    clocks: dict[Any, tuple[Any, Clock, Clock]]  # of each action: the device, start and end


class RecordedSteps:
    """Lanes whose steps are recorded: for each program and set of sizes, at its first call.

    The first call runs the step action by action, which also lets libraries choose their kernels.
    Results are the caller's own. Calls from several streams or threads take turns.
    Needs:   one driver for all ranks, and stages that only start kernels.
    Raises:  DfcError K003 where a stage cannot be recorded.
    """

    def __init__(self, lanes: Lanes, streams: Streams, name: str) -> None:
        self.lanes, self.streams, self.name = lanes, streams, name
        (self.device,) = streams.cuda
        self._recorded: OrderedDict[Any, _Recording] = OrderedDict()
        self._pool: Any = None  # of memory, one for all: they are never replayed side by side
        self._turn = threading.Lock()
        self._stream: Any = None  # the last caller's

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        import torch

        key = id(program), *(signature(x) for part in given for x in part.values())
        with self._turn, torch.cuda.device(self.device), as_captured():
            found = self._recorded.get(key)
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            if found is not None:
                self._recorded.move_to_end(key)
                return self._replayed(found, given)
            step = self.streams.timed(self.lanes.step(program, given))
            self._recorded[key] = self._record(program, given)
            while len(self._recorded) > RECORDED:
                self._recorded.popitem(last=False)
        return step

    def _replayed(self, recording: _Recording, given: Sequence[Values]) -> Step:
        import torch

        start = time.perf_counter()
        began = clock()
        began.record()
        parts = [x for part in given for x in part.values() if isinstance(x, torch.Tensor)]
        if parts:
            torch._foreach_copy_(recording.inputs, parts, non_blocking=True)
        recording.graph.replay()
        results = _copied(recording.step.results)
        torch.cuda.current_stream().synchronize()
        seconds = time.perf_counter() - start
        spans = DeviceSpans(recording.step.spans, recording.clocks, {self.device: began})
        return replace(recording.step, results=results, seconds=seconds, spans=spans)

    def _record(self, program: Program, given: Sequence[Values]) -> _Recording:
        import torch

        own = [{v: copied_to(x, self.device) for v, x in part.items()} for part in given]
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads may take memory meanwhile: only this one is recorded.
        with (
            recording_errors(self.name),
            self.streams.recording() as clocks,
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            step = self.lanes.here(program, own)
        inputs = [x for part in own for x in part.values() if isinstance(x, torch.Tensor)]
        return _Recording(graph, program, inputs, step, clocks())

    def close(self) -> None:
        self.lanes.close()
        self.streams.close()
        self._recorded.clear()


def _copied(results: Sequence[Mapping[Any, Any]]) -> list[dict[Any, Any]]:
    """What a replay left, in memory that the next one does not write to; all in one launch."""
    import torch

    found = [
        {v: torch.empty_like(x) if isinstance(x, torch.Tensor) else x for v, x in part.items()}
        for part in results
    ]
    old, new = (
        [x for part in parts for x in part.values() if isinstance(x, torch.Tensor)]
        for parts in (results, found)
    )
    if old:
        torch._foreach_copy_(new, old, non_blocking=True)
    return found
