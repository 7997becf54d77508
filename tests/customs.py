"""What tests of passes, ops, rules and engines of the user's share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dfc.ir.op import restored_ops
from dfc.planning.custom import ENGINES
from dfc.rewrite import rulesets
from dfc.rewrite.pass_ import PASSES

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def forgotten() -> Iterator[None]:
    """What is defined inside is gone after it."""
    sets = dict(rulesets._loaded)
    with PASSES.restored(), ENGINES.restored(), restored_ops():
        yield
    rulesets._loaded.clear()
    rulesets._loaded.update(sets)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x + x)
        return y + y


MODEL = Twice().eval(), (torch.arange(12.0).reshape(3, 4),)


def load(path: Path, text: str) -> None:
    from dfc.cli.extensions import load_extension

    path.write_text(text)
    load_extension(str(path))


def python(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    found = [str(ROOT), *([str(path)] if path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done


RULES = """\
dfc 1
# One op instead of two: nothing is written in between.
rule fuse_square_relu(x) {
  match   y = pow(relu(x), 2)
  where   floating(x)
  rewrite y = mylib.square_relu(x, scale=1.0)
  within  1e-6
  applies x: f32[4, 8]
  refuses x: i32[4, 8]
}
"""
