"""Two ranks that a launcher has put on two hosts, which are this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.served_store import served_store

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 150  # after which ranks are ended; they say before where they are


def run_ranks(
    folder: Path, links: str, devices: str, *jobs: str, lost: Collection[int] = ()
) -> list[dict[str, Any]]:
    """What each rank that was not lost found in each job; all end with the test."""
    with served_store() as store:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.two_hosts_rank", str(folder), links, devices, *jobs],
                cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={
                    **os.environ, **store, "RANK": str(r), "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "1", "NCCL_HOSTID": f"host{r}", "NCCL_IB_DISABLE": "1",
                    "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo",
                },
            )
            for r in range(2)
        ]  # fmt: skip
        watch = threading.Timer(SECONDS, lambda: [rank.kill() for rank in ranks])
        watch.start()
        try:
            said = [rank.communicate()[0] for rank in ranks]
        finally:
            watch.cancel()
            for rank in ranks:
                rank.kill()
                rank.wait()
    codes = [rank.returncode for rank in ranks]
    assert codes == [-signal.SIGKILL if r in lost else 0 for r in range(2)], "\n\n".join(said)
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2) if r not in lost]
