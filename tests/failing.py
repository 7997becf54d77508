"""Models that go wrong in their own ways, and commands that must fail and leave nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dfc
from dfc.cli import main
from dfc.cli.sources import open_source

NETS = """
import time
from pathlib import Path
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x, table=None):
        y = torch.relu(self.fc(x)) * 2
        return y if table is None else table[y.long()]


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 4),), None, {"x": {0: torch.export.Dim("B", max=8)}}


def load_checkpoint():
    raise FileNotFoundError("no checkpoint here")


def raises():
    load_checkpoint()


def leaves():
    raise SystemExit("bye")


def bare():
    return Net()


def too_long():
    return Net(), (), {}, None, 5


def not_a_module():
    return 3, (torch.ones(1),)


def tensor_for_args():
    return Net(), torch.ones(3, 4)


def list_for_kwargs():
    return Net(), (torch.ones(3, 4),), [1]


def misfit():
    return Net(), (torch.ones(3, 4), None, 7)


def wrong_size():
    return Net(), (torch.ones(3, 5),)


def wrong_dims():
    return Net(), (torch.ones(3, 4),), None, {"y": {0: "B"}}


class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.to_sparse()


def uncapturable():
    return Sparse(), (torch.ones(3),)


def slow():
    Path("ready").touch()
    time.sleep(3600)


class Loud(torch.nn.Module):
    def forward(self, x):
        print("inside forward")
        return x + 1


def loud():
    print("building")
    return Loud(), (torch.ones(2),)


class Slow(torch.nn.Module):
    def forward(self, x):
        Path("ready").touch()
        time.sleep(3600)
        return x


def slow_forward():
    return Slow(), (torch.ones(1),)


number = 3
"""


Try = Callable[..., str]


def nets_in(folder: Path) -> Path:
    """The folder, in which `nets.py` and a package of its `build` are now."""
    (folder / "nets.py").write_text(NETS)
    found = open_source(f"{folder}/nets.py:build")
    made = dfc.compile(found.model, found.args, dynamic_shapes=found.dynamic_shapes, engine="eager")
    made.save(folder / "net.dfcpkg")
    return folder


def failing(here: Path, capfd: pytest.CaptureFixture[str]) -> Try:
    """Run a command in an empty folder; it must fail so, say why, and leave nothing. On stdout it
    says nothing, or what is `said` of work that was done before."""

    def attempt(status: int, *argv: object, said: str = "") -> str:
        before = sorted(os.listdir(here))
        capfd.readouterr()
        found = main([str(a) for a in argv])
        out, err = capfd.readouterr()
        assert found == status, err
        assert said in out if said else out == "", out
        assert "Traceback" not in err
        assert sorted(os.listdir(here)) == before
        return err

    return attempt
