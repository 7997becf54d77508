"""Pages of freed results are kept where engines run, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PAGES = (40 << 20) // os.sysconf("SC_PAGE_SIZE")

# Minor faults of two large results, before and after an engine is built, and in a thread.
_FAULTS = """
import json, resource, sys, threading, torch, dfc
from dfc.runtime.engines import find_engine

torch.set_num_threads(1)
x = torch.ones(40 << 18)  # 40 MiB

def faults():
    def now():
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    counts = []
    for _ in range(10):
        before = now()
        y = x + 1
        z = y + 1
        del y, z
        counts.append(now() - before)
    return min(counts[-3:])  # the first ones settle where results go

found = [faults()]
graph = dfc.trace(torch.nn.ReLU(), (torch.ones(2),))
find_engine("eager").build(graph, "cpu", 1)([torch.ones(2)])
found.append(faults())
thread = threading.Thread(target=lambda: found.append(faults()))
thread.start()
thread.join()
print(json.dumps(found))
"""


def faults(**environment: str) -> list[int]:
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    found: list[int] = json.loads(run.stdout)
    return found


def kept() -> bool:
    from dfc.runtime.allocation import why_not

    return why_not() is None


@pytest.mark.skipif(not kept(), reason="malloc of this process is not dfc's to set")
def test_an_engine_keeps_the_pages_of_what_is_freed() -> None:
    imported, built, in_thread = faults()
    assert imported >= 2 * PAGES
    assert built < PAGES / 20
    assert in_thread < PAGES / 20


@pytest.mark.parametrize(
    ("name", "value"), [("DFC_KEEP_PAGES", "0"), ("MALLOC_TRIM_THRESHOLD_", "131072")]
)
def test_it_can_be_turned_off(name: str, value: str) -> None:
    _, built, _ = faults(**{name: value})
    assert built >= 2 * PAGES


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DFC_KEEP_PAGES": "off"}, "DFC_KEEP_PAGES says so"),
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX says how"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "GLIBC_TUNABLES says how"),
    ],
)
def test_why_not_is_told(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.runtime import allocation

    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert allocation.why_not() == said
    assert not allocation.keep_pages()
