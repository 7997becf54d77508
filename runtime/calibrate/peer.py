"""One of two processes that send each other messages: `python -m dfc.runtime.calibrate.peer`."""

from __future__ import annotations

import json
import sys
from datetime import timedelta

from dfc.runtime.calibrate.links import _LARGE, _SMALL, round_trips


def main(store: str, rounds: int, rank: int) -> None:
    """Exchange messages over loopback; rank 0 prints the times as JSON."""
    from torch import distributed
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    distributed.init_process_group(
        "gloo", store=FileStore(store, 2), rank=rank, world_size=2,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    small = round_trips(_SMALL, rounds * 10, rank)
    large = round_trips(_LARGE, rounds, rank)
    distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps({"small": small, "large": large}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
