"""What the host gives to ranks and takes from them in a step, a thread for each link."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from dfc.planning.stages import HOST
from dfc.runtime.pipeline.links import Abandoned, LinkLost, Traffic, orders
from dfc.runtime.pipeline.routes import Key

Values = Mapping[Hashable, Any]
Result = Callable[[int, dict[Hashable, Any]], None]  # called with a microbatch and some results
Broken = Callable[[str], None]


def carry(
    traffic: Traffic,
    microbatches: Sequence[int],
    given: Sequence[Values],
    result: Result,
    broken: Broken,
) -> list[threading.Thread]:
    """Begin to send inputs and to receive results; `given[b]` are the inputs of microbatch b.

    Why:  a link that waits must not make another wait, or ranks could wait for each other by way
          of the host.
    """
    threads = []
    for pair, order in orders(traffic.routes, microbatches).items():
        if pair[0] == HOST:
            task: tuple[Callable[..., None], tuple[Any, ...]] = (_send, (traffic, order, given))
        elif pair[1] == HOST:
            task = _receive, (traffic, order, result)
        else:
            continue
        threads.append(
            threading.Thread(
                target=_carried, args=(broken, *task), name="dfc-host-link", daemon=True
            )
        )
    for thread in threads:
        thread.start()
    return threads


def _carried(broken: Broken, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        work(*args)
    except (LinkLost, Abandoned) as e:
        broken(str(e))


def _send(traffic: Traffic, order: Sequence[Key], given: Sequence[Values]) -> None:
    for e, b in order:
        traffic.send(e, b, [given[b][v] for v in traffic.routes.edges[e].values])
    traffic.finish({e for e, _ in order})


def _receive(traffic: Traffic, order: Sequence[Key], result: Result) -> None:
    for e, b in order:
        values = traffic.receive(e, b)
        result(b, dict(zip(traffic.routes.edges[e].values, values, strict=True)))
