"""Pages of freed results are kept where engines run, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")
LARGE = 40 << 20  # bytes

# Minor faults of two results, of this thread or of another one.
_FAULTS = f"""
import json, resource, threading, torch, dfc
from dfc.runtime.engines import find_engine

torch.set_num_threads(1)

def faults(size):
    def now():
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    x, counts = torch.ones(size // 4), []
    for _ in range(10):
        before = now()
        y = x + 1
        z = y + 1
        del y, z
        counts.append(now() - before)
    return min(counts[-3:])  # the first ones settle where results go

def both():
    found = [faults({LARGE})]
    thread = threading.Thread(target=lambda: found.append(faults({LARGE})))
    thread.start()
    thread.join()
    return found

before = both()
graph = dfc.trace(torch.nn.ReLU(), (torch.ones(2),))
find_engine("eager").build(graph, "cpu", 1)([torch.ones(2)])
print(json.dumps([before, both()]))
"""


def faults(**environment: str) -> list[list[int]]:
    """New pages of two results, of this thread and of another: before an engine is built, after."""
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    found: list[list[int]] = json.loads(run.stdout)
    return found


def kept() -> bool:
    from dfc.runtime.allocation import why_not

    return why_not() is None


@pytest.mark.skipif(not kept(), reason="malloc of this process is not dfc's to set")
def test_an_engine_keeps_the_pages_of_what_is_freed() -> None:
    (before, _), (after, _) = faults()
    assert before >= 2 * LARGE // PAGE and after < before / 20


@pytest.mark.skipif(not kept(), reason="malloc of this process is not dfc's to set")
def test_one_arena_keeps_large_results_of_threads_too() -> None:
    (_, before), (_, after) = faults(MALLOC_ARENA_MAX="1")
    assert before >= 2 * LARGE // PAGE and after < before / 20


def test_it_can_be_turned_off() -> None:
    _, (built, _) = faults(DFC_KEEP_PAGES="0")
    assert built >= 2 * LARGE // PAGE


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DFC_KEEP_PAGES": "off"}, "DFC_KEEP_PAGES says so"),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "MALLOC_TRIM_THRESHOLD_ says how"),
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
