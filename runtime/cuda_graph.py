"""An engine's kernels recorded once for each set of sizes, and replayed in one launch.

A small batch on a GPU waits for Python: starting a kernel takes longer than running it. What is
recorded reads and writes memory of its own, so that inputs are copied in and results copied out;
both cost far less than the launches that are saved.

Source:  CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.emit.checks import checked, lift_checks
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.engine import Engine, Runner
from dfc.runtime.modes import as_captured

if TYPE_CHECKING:
    import torch

RECORDED = 16  # sets of sizes; the one that was not used for longest is given up
_WARM = 3  # runs before recording: libraries choose kernels and take their memory


class CudaGraph(Engine):
    """Runs what another engine builds as one CUDA graph for each set of sizes."""

    devices = ("cuda",)

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.name = f"{inner.name}:cuda_graph"

    def supports(self, node: Node) -> str | None:
        if node.graphs:
            return "which branch is taken is known to the device alone"
        if node.binds:
            return "its sizes depend on data, which the host would have to wait for"
        return self.inner.supports(node)

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        lifted, messages = self.lifted(graph, device)
        run = Replayed(self.inner.build(lifted, device, threads), self.name, device)
        return checked(run, len(graph.outputs), messages)

    def lifted(self, graph: Graph, device: str) -> tuple[Graph, list[str]]:
        """What is recorded of a graph, and the messages of what it checks of its data.

        Raises:  DfcError K003 for a graph that cannot be recorded, or a device without graphs.
        """
        if not device.startswith("cuda"):
            raise DfcError("K003", f"engine `{self.name}` runs on cuda, not on {device}")
        for node in graph.walk():
            reason = self.supports(node)
            if reason:
                raise DfcError("K003", f"engine `{self.name}` cannot run `{node.op}`: {reason}")
        return lift_checks(graph)


@dataclass
class _Recording:
    """One CUDA graph, the memory that it reads, and what it leaves."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: list[Any]
    results: list[Any]


class Replayed:
    """A runner that records another one: for each set of sizes at its first call.

    Results are the caller's own. Calls from several streams or threads take turns.
    Raises:  DfcError K003 where what runs cannot be recorded.
    """

    def __init__(self, run: Runner, name: str, device: str) -> None:
        import torch

        self.run, self.name, self.device = run, name, torch.device(device)
        self._recorded: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._pool: Any = None  # of memory, one for all: they are never replayed side by side
        self._turn = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        import torch

        with self._turn, torch.cuda.device(self.device), as_captured():
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            recording = self._recording(inputs)
            for held, x in zip(recording.inputs, inputs, strict=True):
                if isinstance(held, torch.Tensor):
                    held.copy_(x, non_blocking=True)
            recording.graph.replay()
            found = [x.clone() if isinstance(x, torch.Tensor) else x for x in recording.results]
            self._done = stream.record_event(self._done)
        return found

    def _recording(self, inputs: Sequence[Any]) -> _Recording:
        key = tuple(map(signature, inputs))
        found = self._recorded.get(key)
        if found is None:
            found = self._record(inputs)
            while len(self._recorded) >= RECORDED:
                self._recorded.popitem(last=False)
            self._recorded[key] = found
        self._recorded.move_to_end(key)
        return found

    def _record(self, inputs: Sequence[Any]) -> _Recording:
        import torch

        held = [copied_to(x, self.device) for x in inputs]
        make: Any = torch.cuda.Stream
        side = make()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self.run(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads may take memory meanwhile: only this one is recorded.
        with (
            recording_errors(self.name),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            results = list(self.run(held))
        return _Recording(graph, held, results)


def copied_to(x: Any, device: torch.device) -> Any:
    """A copy where a recording reads it; numbers are recorded as they are."""
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_like(x, device=device).copy_(x)


@contextmanager
def recording_errors(engine: str) -> Iterator[None]:
    """What the device refuses while it records, as an error of dfc's."""
    try:
        yield
    except RuntimeError as e:
        raise DfcError(
            "K003", f"engine `{engine}` cannot record the graph: {str(e).splitlines()[0]}",
            help="an operator waits for the device, as one does whose result has as many "
            "elements as the data says; the engine without `:cuda_graph` runs it",
        ) from e  # fmt: skip


def signature(x: Any) -> Any:
    """What a recording holds for: a tensor's type and sizes, or the number itself."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride()
    return type(x), x
