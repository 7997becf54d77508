"""Directed links between the devices of two ranks: tensors go over nccl, never by way of the host.

What another link carries beside them is the head of a message: sizes and memory order of each
tensor, and the numbers among its values. A receiver asks nccl for nothing before it has the head:
sizes need not be known beforehand, both ends post in the sender's order, and whoever waits for a
rank that is gone waits in a link that says so. A message is queued on the rank's stream and on the
link's own; the host waits for none, but for a sender that is too far ahead.

A communicator is made when it is first used, which both ends wait in. So each link is warmed up
when it is made, in one order that all ranks share, before anything else runs on their devices.
Each has one direction alone: no rank sends on one where it also receives.

Source:  NCCL's user guide on communicators of several groups and on ncclCommAbort;
         ProcessGroupNCCL of PyTorch: `wait` makes the current stream wait, and raises what failed;
         `is_completed` asks, `is_success` is not there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from dfc.runtime.pipeline.messages import bytes_of

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]
_LOOK = 0.0001  # seconds between two looks at what the device does
_NEVER = timedelta(days=30)  # PyTorch's own watchdog would end the process: ours gives up a step


class Fabric(Protocol):
    """What moves tensors between two devices."""

    def group(self, store: Any, rank: int, device: str, seconds: float) -> Any:
        """A process group of two, this one on that device."""
        ...

    def ordered(self, work: Any, timeout: timedelta) -> None:
        """What this thread queues next comes after a message that is received."""
        ...

    def finished(self, work: Any, timeout: timedelta) -> None:
        """
        Raises:  RuntimeError for a message that is not sent in that time.
        """
        ...

    def abort(self, group: Any) -> None:
        """Whatever waits in the group is told that it is over; from any thread."""
        ...


class Nccl:
    """Between CUDA devices."""

    def group(self, store: Any, rank: int, device: str, seconds: float) -> Any:
        import torch
        from torch.distributed import ProcessGroupNCCL

        # A peer that is killed must not end this process too: the host tells it to give up.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # What is said of messages that wait for each other: of one direction they should.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
        store.set_timeout(timedelta(seconds=seconds))
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        made = ProcessGroupNCCL(store, rank, 2, options)
        made.eager_connect_single_device(torch.device(device))  # one communicator, not one more
        return made

    def ordered(self, work: Any, timeout: timedelta) -> None:
        work.wait()  # the stream does; with a time the host would

    def finished(self, work: Any, timeout: timedelta) -> None:
        until = time.monotonic() + timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > until:
                raise RuntimeError(f"not taken in {timeout.total_seconds():.3g} s")
            time.sleep(_LOOK)
        work.wait()  # raises what became of it: PyTorch's nccl has no other way to ask

    def abort(self, group: Any) -> None:
        group.abort()


class DeviceLinks:
    """The links of one rank's device.

    Needs:   every rank makes those it has part in, of the same pairs under the same name.
    Raises:  RuntimeError when the other end does not come in time.
    """

    def __init__(
        self, me: int, pairs: Sequence[Pair], store: Any, name: str, device: str, seconds: float,
        fabric: Fabric | None = None,
    ) -> None:  # fmt: skip
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.me, self.device, self.fabric = me, device, fabric or Nccl()
        self.over = False
        self._received: list[Any] = []
        self.groups: dict[Pair, Any] = {}
        with ExitStack() as failing:
            failing.callback(self.close)
            for a, b in sorted(pairs):
                if me in (a, b):
                    prefix = PrefixStore(f"{name}/device/{a}>{b}", store)
                    self.groups[a, b] = self.fabric.group(prefix, int(me == b), device, seconds)
                    self._warm((a, b), timedelta(seconds=seconds))
            failing.pop_all()

    def _warm(self, pair: Pair, timeout: timedelta) -> None:
        """One byte, there before the next link is made."""
        import torch

        block = torch.zeros(1, dtype=torch.uint8, device=self.device)
        if pair[0] == self.me:
            work = self.groups[pair].send([block], 1, 0)
        else:
            work = self.groups[pair].recv([block], 0, 0)
        self.fabric.finished(work, timeout)

    def ready(self, values: Sequence[Any]) -> list[Any]:
        """Values as they are sent: on this device, with their memory holding what they say."""
        return [
            x.to(self.device).resolve_conj().resolve_neg() if hasattr(x, "device") else x
            for x in values
        ]

    def send(self, pair: Pair, values: Sequence[Any]) -> Flying:
        """Begin to send the tensors among values that are `ready`."""
        works = []
        for x in values:
            if hasattr(x, "device") and x.numel():
                block = bytes_of(x)
                works.append((self._group(pair).send([block], 1, 0), block))
        return Flying(self, works)

    def receive(self, pair: Pair, nbytes: int, timeout: timedelta) -> torch.Tensor:
        """A block that what this thread queues next finds filled."""
        import torch

        block = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if nbytes:
            work = self._group(pair).recv([block], 0, 0)
            self.fabric.ordered(work, timeout)
            self._received.append(work)
        return block

    def settle(self, timeout: timedelta) -> None:
        """Wait until everything that is to be received is there.

        Raises:  RuntimeError when it is not in that time, or never will be.
        """
        works, self._received = self._received, []
        for work in works:
            self.fabric.finished(work, timeout)
        if self.over:
            raise RuntimeError("the link was given up")

    def _group(self, pair: Pair) -> Any:
        """
        Raises:  RuntimeError once it is over.
        """
        if self.over:
            raise RuntimeError("the link was given up")
        return self.groups[pair]

    def interrupt(self) -> None:
        """Whatever waits in a link is told that it is over; from any thread."""
        if not self.over:
            self.over = True
            for group in list(self.groups.values()):  # who closes may be another thread
                self.fabric.abort(group)

    def close(self) -> None:
        self.interrupt()
        self.groups.clear()


class Flying:
    """Tensors under way, whose memory is kept until they have arrived."""

    def __init__(self, links: DeviceLinks, works: list[tuple[Any, torch.Tensor]]) -> None:
        self.links, self.works = links, works

    def wait(self, timeout: timedelta) -> None:
        """
        Raises:  RuntimeError when they have not arrived in that time, or never will.
        """
        for work, _ in self.works:
            self.links.fabric.finished(work, timeout)
        if self.links.over:
            raise RuntimeError("the link was given up")
        self.works = []


class MixedLinks:
    """The links of one rank of which some have a device's beside them, for their tensors."""

    def __init__(self, base: Any, fast: DeviceLinks) -> None:
        self.me, self.base, self._fast = base.me, base, fast
        self.fast = dict.fromkeys(fast.groups, fast)

    def post(self, pair: Pair, block: torch.Tensor, tag: int) -> Any:
        return self.base.post(pair, block, tag)

    def send(self, pair: Pair, message: Any, tag: int) -> Any:
        return self.base.send(pair, message, tag)

    def receive(self, pair: Pair, nbytes: int, tag: int) -> Any:
        return self.base.receive(pair, nbytes, tag)

    def interrupt(self) -> None:
        self.base.interrupt()
        self._fast.interrupt()

    def close(self) -> None:
        self._fast.close()
        self.base.close()
