"""Options of the test run (`--bless` rewrites the expectations of golden files), and fixtures."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from dfc.compiled import Compiled
    from tests.command import Ran, Run
    from tests.failing import Try

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DFC_REPRODUCERS"] = "none"  # tests of reproducers say where
# Shells start background jobs with Ctrl-C ignored; the commands that tests interrupt must not be.
signal.signal(signal.SIGINT, signal.default_int_handler)
# torch writes thousands of structured trace records; a failing test would show them all.
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite tests/golden; read the diff")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """What a test draws does not depend on the tests before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


@pytest.fixture
def forgets_what_is_defined() -> Iterator[None]:
    """Passes, ops, engines and rules that a test defines are gone after it."""
    from tests.customs import forgotten

    with forgotten():
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C in this process is seen: a callback of Python's collector would swallow it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """The `dfc` command in this process: its status, and what it wrote."""
    from dfc.cli import main
    from tests.command import Ran

    def call(*argv: object) -> Ran:
        capfd.readouterr()
        status = main([str(a) for a in argv])
        return Ran(status, *capfd.readouterr())

    return call


@pytest.fixture
def fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Try:  # fmt: skip
    """The `dfc` command in an empty folder, where it must fail and leave nothing."""
    from tests.failing import failing

    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    return failing(here, capfd)


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of `tests.tower`; read, not changed."""
    from tests.tower import saved_tower

    return saved_tower(tmp_path_factory.mktemp("tiers") / "tower.dfcpkg")


@pytest.fixture(scope="session")
def held() -> Compiled:
    """A small decoder with all of its weights in memory."""
    import dfc
    from tests.tiny_models import tiny_llama, tokens

    return dfc.compile(tiny_llama(), (tokens(),), engine="eager", passes=[], verify="none")


@pytest.fixture(scope="session")
def llama(held: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a package; read, not changed."""
    path = tmp_path_factory.mktemp("tiers") / "llama.dfcpkg"
    held.save(path)
    return path


@pytest.fixture
def no_weights_thread_is_left() -> Iterator[None]:
    """Whoever streamed weights has ended the thread that reads them."""
    yield
    assert not [t for t in threading.enumerate() if t.name == "dfc weights"]
