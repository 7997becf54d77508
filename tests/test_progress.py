"""Progress: stdout is for data, whoever prints."""

from __future__ import annotations

import ctypes
import os

import pytest

from dfc.cli.progress import Progress


def test_what_libraries_print_from_c_is_no_data(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    print("before")
    with Progress() as say:
        os.write(1, b"a system call\n")
        libc.printf(b"buffered in C\n")
        print("from Python")
        say.result("data")
        libc.printf(b"and later\n")
    print("after")
    out, err = capfd.readouterr()
    assert out.split() == ["before", "data", "after"]
    for told in ("a system call", "buffered in C", "from Python", "and later"):
        assert told in err


def test_it_runs_where_stdout_is_closed() -> None:
    """A fork, so that closing it concerns nobody else."""
    pid = os.fork()
    if pid == 0:
        os.close(1)
        try:
            with Progress() as say:
                say("working")
        finally:
            os._exit(0 if not os.path.exists("/proc/self/fd/1") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
