"""One of two processes that send each other messages, as ranks of a pipeline do.

python -m dfc.runtime.calibrate.peer KIND FOLDER ROUNDS RANK
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from dfc.runtime.calibrate.links import LARGE, SMALL
from dfc.runtime.pipeline.links import Linked, Links, gloo_device
from dfc.runtime.pipeline.local_links import LocalLinks

_WAIT = timedelta(seconds=30)
_PAIRS = [(0, 1), (1, 0)]


def linked(kind: str, folder: str, rank: int) -> Linked:
    """This end of the links between both."""
    if kind == "local":
        return LocalLinks(rank, _PAIRS, Path(folder), "links", _WAIT.total_seconds())
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    store = FileStore(str(Path(folder) / "store"), 2)
    return Links(rank, _PAIRS, store, "links", gloo_device(), _WAIT.total_seconds())


def round_trips(links: Linked, size: int, count: int) -> list[float]:
    """Seconds of one way, by messages that go to and fro."""
    import torch

    to, back = (links.me, 1 - links.me), (1 - links.me, links.me)
    x = torch.zeros(size, dtype=torch.uint8)

    def send() -> Any:
        return links.post(to, x, 0)

    def receive() -> None:
        links.receive(back, size, 0).wait(_WAIT)

    return [_way(send, receive, links.me == 0) for _ in range(count + 2)][2:]


def _way(send: Callable[[], Any], receive: Callable[[], None], first: bool) -> float:
    begin = time.perf_counter()
    if first:
        sent = send()
        receive()
    else:
        receive()
        sent = send()
    took = (time.perf_counter() - begin) / 2
    sent.wait(_WAIT)
    return took


def main(kind: str, folder: str, rounds: int, rank: int) -> None:
    """Exchange messages; rank 0 prints the times as JSON."""
    import torch

    torch.set_num_threads(1)
    links = linked(kind, folder, rank)
    small = round_trips(links, SMALL, rounds * 10)
    large = round_trips(links, LARGE, rounds)
    if rank == 0:
        print(json.dumps({"small": small, "large": large}))
    links.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
