"""What links do: copies between host and GPUs, between GPUs, and messages between processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dfc
from dfc.errors import DfcError
from dfc.runtime.calibrate.sampling import Reading, quiet, sample_all

SMALL, LARGE = 64, 16 << 20  # bytes: one shows the latency, the other the bandwidth
_PATIENCE_S = 60.0
WORDS = {"local": "sockets", "gloo": "loopback"}  # what a target calls a link


@dataclass(frozen=True)
class MeasuredLink:
    """One direction of a link between two devices, or between processes on one of them."""

    source: str
    sink: str
    kind: str
    latency: Reading  # seconds
    bandwidth: Reading  # bytes a second


def copies(
    source: str, sink: str, source_device: str, sink_device: str, kind: str, *, quick: bool = False
) -> MeasuredLink:
    """Copies from one device's memory to another's; the host's is pinned, as a pipeline's is."""
    import torch

    def run(size: int) -> Callable[[], None]:
        x = torch.zeros(size, dtype=torch.uint8, device=source_device)
        y = torch.zeros(size, dtype=torch.uint8, device=sink_device)
        x = x.pin_memory() if source_device == "cpu" else x
        y = y.pin_memory() if sink_device == "cpu" else y

        def once() -> None:
            y.copy_(x, non_blocking=True)
            torch.cuda.synchronize(source_device if source_device != "cpu" else sink_device)

        return once

    runs = {"latency": run(SMALL), "bandwidth": run(LARGE)}
    took = sample_all(runs, rounds=7 if quick else 31, seconds=3.0)
    return _link(source, sink, kind, took["latency"], took["bandwidth"])


def _link(source: str, sink: str, kind: str, small: Reading, large: Reading) -> MeasuredLink:
    """The large message without the latency that the small one shows."""
    moving = max(large.value - small.value, large.value / 10)
    rate = Reading(moving, large.spread, large.samples).per(LARGE)
    return MeasuredLink(source, sink, kind, small, rate)


def messages(host: str, kind: str, *, quick: bool = False) -> MeasuredLink:
    """Messages between two processes of this host, over the links that ranks have.

    `kind` is `local`, as between ranks of one host, or `gloo`, as between those of several.
    Raises:  DfcError K070 (status 7) when the processes cannot talk to each other.
    """
    rounds = 11 if quick else 51
    with tempfile.TemporaryDirectory(prefix="dfc-") as folder:
        command = [
            sys.executable, "-m", "dfc.runtime.calibrate.peer", kind, folder, str(rounds)
        ]  # fmt: skip
        ours = str(Path(dfc.__file__).absolute().parents[1])  # the same code, wherever it lies
        path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH", "")]))
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **own}
        peers: list[subprocess.Popen[str]] = []
        try:
            for rank in range(2):
                peers.append(subprocess.Popen(
                    [*command, str(rank)], env=env, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                ))  # fmt: skip
            out, err = peers[0].communicate(timeout=_PATIENCE_S)
            peers[1].wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired as e:
            message = f"two processes did not exchange messages within {_PATIENCE_S:.0f} s"
            raise DfcError("K070", message, help=_NO_LOOPBACK, status=7) from e
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()
                for stream in (peer.stdout, peer.stderr):
                    if stream is not None:
                        stream.close()
    if peers[0].returncode:
        last = (err.strip().splitlines() or ["no reason given"])[-1]
        message = f"two processes cannot exchange messages: {last}"
        raise DfcError("K070", message, help=_NO_LOOPBACK, status=7)
    times = json.loads(out)
    return _link(host, host, WORDS[kind], quiet(times["small"]), quiet(times["large"]))


_NO_LOOPBACK = "`--no-links` leaves links out"
