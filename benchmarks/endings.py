"""Ctrl-C at random moments: seconds until the last process that a script had started is gone.

python benchmarks/endings.py [COUNT]      so many interruptions of each way, in turn; 10 by default

Another process is busy on each core meanwhile. A script is interrupted as in a terminal, with all
of its foreground, after it has imported PyTorch and dfc; what is left of it is adopted and waited
for. Some 20 s each.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from _endless import WAYS
from _timing import say

LONGEST = 15.0  # seconds after which a script is interrupted at the latest
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER


def interrupted(way: str, moment: float) -> float:
    """Seconds from the interrupt to the end of the last process."""
    command = [sys.executable, __file__, way, str(moment)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


def interrupt(way: str, moment: float) -> float:
    """The same, in a process that has no other children."""
    ctypes.CDLL(None).prctl(_ADOPT, 1)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if "torchrun" in way else []
    script = str(Path(__file__).with_name("_endless.py"))
    process = subprocess.Popen(
        [sys.executable, *launcher, script, way], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(moment)
    began = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return time.perf_counter() - began


def main(count: int) -> None:
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    busy = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as ending:
        for _ in range(os.cpu_count() or 1):
            ending.callback(subprocess.Popen(busy).kill)
        for _ in range(count):
            for way, seconds in took.items():
                seconds.append(interrupted(way, random.uniform(0, LONGEST)))
    say(f"Ctrl-C to the end of the last process, of {count}, a busy process on each core")
    say(f"{'':24}  median  worst")
    for way, seconds in took.items():
        say(f"{way:24}  {median(seconds):4.2f} s  {max(seconds):4.2f} s")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs that ignore it
    if len(sys.argv) == 3:
        print(interrupt(sys.argv[1], float(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
