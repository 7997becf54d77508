"""What the host gives to ranks and takes from them in a step, a thread for each of its links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from dfc.planning.stages import HOST
from dfc.runtime.pipeline.links import Abandoned, LinkLost, Pair, Traffic
from dfc.runtime.pipeline.routes import Key

Values = Mapping[Hashable, Any]
_ENDING = 2.0  # seconds


class Carriers:
    """Threads that live as long as the host's links.

    Why:  a link that waits must not make another wait, or ranks could wait for each other by way
          of the host. Each has one thread for PyTorch's copies: more would be taken from the ranks.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        import torch

        self._work: dict[Pair, SimpleQueue[Callable[[], None] | None]] = {
            pair: SimpleQueue() for pair in pairs if HOST in pair
        }
        ready: SimpleQueue[None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_serve, args=(work, ready), name="dfc-host-link", daemon=True
            )
            for work in self._work.values()
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            ready.get()
        torch.set_num_threads(torch.get_num_threads())  # what later threads start with

    def carry(
        self,
        traffic: Traffic,
        given: Sequence[Values],
        results: Sequence[dict[Hashable, Any]],
        through: Callable[[], None],
        broken: Callable[[LinkLost | Abandoned], None],
    ) -> None:
        """Begin to send the inputs of a step and to receive its results.

        `given[b]` are the inputs of microbatch b, `results[b]` is filled; `through` is called when
        a link has brought all its results.
        """

        def run(pair: Pair, order: Sequence[Key]) -> None:
            try:
                if pair[0] == HOST:
                    _send(traffic, order, given)
                else:
                    _receive(traffic, order, results)
                    through()
            except (LinkLost, Abandoned) as e:
                broken(e)

        for pair, order in traffic.orders.items():
            if pair in self._work:
                self._work[pair].put(lambda p=pair, o=order.keys: run(p, o))  # type: ignore[misc]

    def close(self) -> None:
        """End the threads, those that still wait in a link with it."""
        for work in self._work.values():
            work.put(None)
        for thread in self._threads:
            thread.join(timeout=_ENDING)  # Python must not end while one is in gloo


def _serve(work: SimpleQueue[Callable[[], None] | None], ready: SimpleQueue[None]) -> None:
    import torch

    torch.get_num_threads()  # a thread's first use of it would undo what is set
    torch.set_num_threads(1)
    ready.put(None)
    while (run := work.get()) is not None:
        run()
        del run  # between steps nothing of the last one is kept


def _send(traffic: Traffic, order: Sequence[Key], given: Sequence[Values]) -> None:
    for e, b in order:
        traffic.send(e, b, [given[b][v] for v in traffic.routes.edges[e].values])
    traffic.finish({e for e, _ in order})


def _receive(
    traffic: Traffic, order: Sequence[Key], results: Sequence[dict[Hashable, Any]]
) -> None:  # fmt: skip
    for e, b in order:
        values = traffic.receive(e, b)
        results[b].update(zip(traffic.routes.edges[e].values, values, strict=True))
