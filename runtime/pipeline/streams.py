"""Ranks on CUDA devices: each computes on a stream of its own, and copies in and out on two more.

Ranks of one device have one thread (`drivers_of`), which starts their kernels in the order of a
simulated step: threads of their own would take turns in the interpreter, and short kernels wait.

Nothing waits on the host: what a value depends on goes with it as events, which the reader's stream
waits for. On one device a value is handed over where it lies. What the processor made is brought to
a device by a thread of its own, through pinned memory, so that the rank that made it goes on. A
rank queues no more than AHEAD actions before the device has done the first of them, so that memory
stays bounded; a step is over when the devices are done. Spans are the devices' own times.

Source:  the CUDA semantics notes of PyTorch; memory of another stream is guarded by
         `Tensor.record_stream`, since a value has readers on several streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.planning.actions import Action
from dfc.planning.engine import Runner
from dfc.planning.stages import HOST
from dfc.planning.torch_device import check_device
from dfc.runtime.pipeline.lanes import Run, Span, Step, Values

if TYPE_CHECKING:
    import torch

Clock = Any  # a torch.cuda.Event that knows when it was reached

AHEAD = 4  # actions of a rank that are queued and not done
_ON_TORCHS_STREAM = ("eager", "inductor")  # engines that use the stream that PyTorch is at


@dataclass
class Parcel:
    """Values, and the events after which they may be read; of those that are being brought to a
    device, the future that gives the value there and adds its event."""

    values: dict[Any, Any]
    ready: list[Any]
    coming: dict[Any, Future[Any]] = field(default_factory=dict)

    def arrive(self) -> None:
        """Wait for what is brought."""
        while self.coming:
            name, future = self.coming.popitem()
            self.values[name] = future.result()


class Streams:
    """The carrier of ranks of which some are on CUDA devices.

    `devices[r]` is the device of rank r: `cpu`, `cuda:0`, ... HOST is the caller's stream of each
    device; what it is given lies where it was made.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        import torch

        self.devices = [torch.device(d) for d in devices]
        self.cuda = sorted({d for d in self.devices if d.type == "cuda"}, key=str)
        self.compute, self.copy_in, self.copy_out = (
            [_stream(d) if d.type == "cuda" else None for d in self.devices] for _ in range(3)
        )
        self._began: dict[Any, Any] = {}  # an event of the caller's stream, by device
        self._timed: dict[Action, tuple[Any, Clock, Clock]] = {}
        self._recording = False
        self._bringing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dfc-to-device")

    def close(self) -> None:
        """End what brings values to devices."""
        self._bringing.shutdown()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, in the caller's thread."""
        import torch

        self._timed = {}
        for device in self.cuda:
            with torch.cuda.device(device):
                event = None if self._recording else clock()
                self._began[device] = torch.cuda.current_stream().record_event(event)
        self.follow_caller()
        yield
        for stream in self.compute:
            if stream is not None:
                if self._recording:
                    torch.cuda.current_stream().wait_stream(stream)
                else:
                    stream.synchronize()

    def settle(self) -> None:
        """Wait until the devices have done what ranks queued."""
        for stream in self.compute:
            if stream is not None:
                stream.synchronize()

    @contextmanager
    def recording(self) -> Iterator[Callable[[], dict[Action, tuple[Any, Clock, Clock]]]]:
        """While a CUDA graph is recorded on the caller's stream: nothing waits on the host. What
        it gives tells, afterwards, the device of each action and the clocks around it, which every
        replay sets.
        """
        self._recording = True
        try:
            yield lambda: self._timed
        finally:
            self._recording = False

    def follow_caller(self) -> None:
        """What ranks compute from here on comes after what the caller queued: an optimizer's step
        writes to weights that no edge carries."""
        import torch

        for stream in self.compute:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(stream.device))

    @contextmanager
    def lane(self, rank: int) -> Iterator[None]:
        import torch

        stream = self.compute[rank]
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):  # and its device
            yield

    def send(self, source: int, target: int, values: Values) -> Parcel:
        stream = None if source == HOST else self.compute[source]
        ready = list(self._began.values()) if source == HOST else []
        if stream is not None:
            ready.append(stream.record_event())
        parcel = Parcel(dict(values), ready)
        if target == HOST:
            return parcel
        for name, x in values.items():
            if source != HOST and self._is_brought(x, target):
                parcel.coming[name] = self._bringing.submit(self._bring, x, target, parcel.ready)
            else:
                parcel.values[name] = self._moved(x, source, target, parcel.ready)
        return parcel

    def _is_brought(self, x: Any, target: int) -> bool:
        import torch

        return (
            isinstance(x, torch.Tensor)
            and x.device.type == "cpu"
            and self.devices[target].type == "cuda"
        )

    def _bring(self, x: torch.Tensor, target: int, ready: list[Any]) -> torch.Tensor:
        """A value of the processor's on a device; the event of its copy is added."""
        import torch

        stream = self.copy_in[target]
        assert stream is not None
        with torch.cuda.stream(stream):
            moved = _pinned(x).to(self.devices[target], non_blocking=True)
            ready.append(stream.record_event())
        return moved

    def _moved(self, x: Any, source: int, target: int, ready: list[Any]) -> Any:
        """A value on the target's device; the event of the copy is added to what is to wait for."""
        import torch

        to = self.devices[target]
        if not isinstance(x, torch.Tensor) or x.device == to:
            return x
        stream = self._copying(x.device, source, target)
        if stream is None:  # the caller's, on a device that no rank of this copy has
            for event in ready:
                event.synchronize()
            return x.to(to)
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            for event in ready:
                stream.wait_event(event)
            if to.type == "cpu":
                moved = torch.empty_like(x, device="cpu", pin_memory=True)
                moved.copy_(x, non_blocking=True)
            else:
                moved = (_pinned(x) if x.device.type == "cpu" else x).to(to, non_blocking=True)
            if x.device.type == "cuda":
                x.record_stream(stream)
            ready.append(stream.record_event())
        return moved

    def _copying(self, at: torch.device, source: int, target: int) -> torch.cuda.Stream | None:
        """The stream of a copy: out of the device where the value is, or into the target's."""
        if at.type == "cpu":
            return self.copy_in[target]
        return None if source == HOST else self.copy_out[source]

    def receive(self, source: int, target: int, parcel: Any) -> Values:
        import torch

        parcel.arrive()
        if target != HOST and self.compute[target] is None:
            for event in parcel.ready:
                event.synchronize()
            return dict(parcel.values)
        readers = self.cuda if target == HOST else [self.devices[target]]
        for device in readers:
            stream = torch.cuda.current_stream(device)
            for event in parcel.ready:
                stream.wait_event(event)
            for x in parcel.values.values():
                if isinstance(x, torch.Tensor) and x.device == device:
                    x.record_stream(stream)
        return dict(parcel.values)

    def paced(self, run: Run, placement: Sequence[int]) -> Run:
        """A run that measures on the device, and is never more than AHEAD actions before it."""

        queued: list[deque[Any]] = [deque() for _ in self.devices]

        def paced_run(action: Action, values: Values) -> Values:
            rank = placement[action.stage]
            stream = self.compute[rank]
            if stream is None:
                return run(action, values)
            start = stream.record_event(clock(self._recording))
            made = run(action, values)
            end = stream.record_event(clock(self._recording))
            self._timed[action] = self.devices[rank], start, end
            if self._recording:
                return made
            queued[rank].append(end)
            if len(queued[rank]) > AHEAD:
                queued[rank].popleft().synchronize()
            return made

        return paced_run

    def timed(self, step: Step) -> Step:
        """A step that is over, with the devices' times in place of when actions were queued."""
        return replace(step, spans=DeviceSpans(step.spans, self._timed, self._began))

    def times(self, action: Action) -> tuple[float, float] | None:
        """When the device did an action of the step that is over, None where that was no device."""
        return _times(action, self._timed, self._began)


class DeviceSpans(Sequence[Span]):
    """Spans by the devices' own clocks, which are read when somebody asks: that takes the host some
    microseconds each."""

    def __init__(
        self,
        queued: Sequence[Span],
        clocks: Mapping[Action, tuple[Any, Clock, Clock]],
        began: Mapping[Any, Clock],
    ) -> None:
        self._queued, self._clocks, self._began = queued, clocks, dict(began)
        self._read: list[Span] | None = None

    def __len__(self) -> int:
        return len(self._queued)

    def __getitem__(self, index: Any) -> Any:
        if self._read is None:
            self._read = [self._by_device(span) for span in self._queued]
        return self._read[index]

    def _by_device(self, span: Span) -> Span:
        found = _times(span.action, self._clocks, self._began)
        return replace(span, start=found[0], end=found[1]) if found else span


def _times(
    action: Action,
    clocks: Mapping[Action, tuple[Any, Clock, Clock]],
    began: Mapping[Any, Clock],
) -> tuple[float, float] | None:
    found = clocks.get(action)
    if found is None:
        return None
    device, start, end = found
    return began[device].elapsed_time(start) / 1e3, began[device].elapsed_time(end) / 1e3


def drivers_of(devices: Sequence[str]) -> list[int]:
    """Who drives each rank: one thread those of a CUDA device, whose kernels it only starts; ranks
    on the processor compute in threads of their own."""
    found: dict[str, int] = {}
    return [
        found.setdefault(d if d != "cpu" else f"rank {rank}", len(found))
        for rank, d in enumerate(devices)
    ]


def device_names(devices: Sequence[str]) -> list[str]:
    """Devices as tensors name theirs: `cuda` is the one that PyTorch is at.

    Raises:  DfcError N053 for what is neither a processor nor a CUDA device, K004 (status 7) for
             `cuda` where there is none.
    """
    import torch

    found = []
    for rank, name in enumerate(devices):
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or not (index.isdigit() or name == kind):
            message = f"rank {rank} is to run on `{name}`, which is neither cpu nor cuda:0, ..."
            raise DfcError("N053", message, status=2)
        if kind == "cuda":
            if not index:
                check_device(name)
            found.append(f"cuda:{index or torch.cuda.current_device()}")
        else:
            found.append("cpu")
    return found


def _stream(device: torch.device) -> Any:
    import torch

    make: Any = torch.cuda.Stream
    return make(device)


def _pinned(x: torch.Tensor) -> torch.Tensor:
    """A copy that a device reads by itself, made by this thread alone.

    Why:  PyTorch shares the copy among threads, whose cores the processor's ranks use.
    """
    import torch

    if not x.is_contiguous() or not x.numel() or x.is_conj() or x.is_neg():
        return x.pin_memory()
    pinned = torch.empty_like(x, pin_memory=True)
    raw, source = (t.detach().reshape(-1).view(torch.uint8).numpy() for t in (pinned, x))
    raw[...] = source
    return pinned


def clock(recorded: bool = False) -> Clock:
    """An event that knows when it was reached; in a recorded graph, when each replay reached it."""
    import torch

    make: Any = torch.cuda.Event
    return make(enable_timing=True, external=recorded)


def on_stream(engine: str, run: Runner, device: str) -> Runner:
    """A runner whose kernels come after what was queued on PyTorch's stream before it."""
    if not device.startswith("cuda") or engine.partition(":")[0] in _ON_TORCHS_STREAM:
        return run

    def waiting(inputs: Sequence[Any]) -> list[Any]:
        import torch

        # The engine has a stream and a memory of its own: what it reads must be there, and what
        # it made before must have been copied.
        torch.cuda.current_stream().synchronize()
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in run(inputs)]

    return waiting
