"""A golden file: comment, `# run: passes`, a graph, `# gives:`, a graph; or what stays as it is.

    # cse merges equal pure nodes and keeps the earliest.
    # run: cse{limit=1}
    # weights: none
    graph @f(...) -> ... { ... }
    # gives:
    graph @f(...) -> ... { ... }

`# gives: the same` stands for the graph before. Parameters that text shows as `meta` get data that
follows from name and type, unless `# weights: none`; those that a pass makes show their sha256.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

import dfc
from dfc.cli.steps import parse_steps
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ir.weights import TensorData
from dfc.rewrite.pass_ import Pass

SAME = "the same"


@dataclass(frozen=True)
class Golden:
    """One file, taken apart."""

    path: Path
    comment: tuple[str, ...]
    steps: str
    weights: bool
    before: str
    after: str

    def __str__(self) -> str:
        return self.path.stem

    @staticmethod
    def read(path: Path) -> Golden:
        lines = path.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("# gives:"))
        start = next(i for i, line in enumerate(lines) if line.startswith("graph "))
        head = lines[:start]
        (steps,) = [
            line.removeprefix("# run:").strip() for line in head if line.startswith("# run:")
        ]
        said = lines[at].removeprefix("# gives:").strip()
        before = "\n".join(lines[start:at]) + "\n"
        return Golden(
            path,
            tuple(line for line in head if not line.startswith(("# run:", "# weights:"))),
            steps,
            "# weights: none" not in head,
            before,
            before if said == SAME else "\n".join(lines[at + 1 :]) + "\n",
        )

    def text(self) -> str:
        lines = [*self.comment, f"# run: {self.steps}"]
        lines += [] if self.weights else ["# weights: none"]
        head = "\n".join(lines) + "\n" + self.before
        if self.before == self.after:
            return head + f"# gives: {SAME}\n"
        return head + "# gives:\n" + self.after

    @property
    def passes(self) -> list[Pass]:
        return parse_steps(self.steps)

    def graph(self) -> Graph:
        graph = parse(self.before, self.path.name)
        if self.weights:
            give_data(graph)
        return graph


def parse(text: str, file: str = "<golden>") -> Graph:
    """Graph text without its version line."""
    return dfc.parse("dfc 1 " + text, file)


def show(graph: Graph, original: Graph) -> str:
    """The graph's text; parameters of the original that kept their data are shown as `meta`."""
    shown = graph.copy()
    for p in shown.parameters.values():
        old = original.parameters.get(p.name)
        if old is not None and old.data is p.data:
            p.data = None
    return str(shown).removeprefix("dfc 1\n")


def give_data(graph: Graph) -> None:
    """Data for every parameter, the same on every machine."""
    for p in graph.parameters.values():
        if p.data is None:
            p.data = TensorData(p.name, numbers(p.name, p.tensor_type))


def numbers(name: str, type: TensorType) -> torch.Tensor:
    """Numbers that follow from a name and a static type; what is called a variance is positive."""
    count = int(type.numel)  # type: ignore[call-overload]
    raw = hashlib.shake_128(name.encode()).digest(max(count, 1))[:count]
    n = torch.tensor(list(raw), dtype=torch.int64)
    if type.dtype.kind == "bool":
        n = n % 2
    elif type.dtype.is_integer:
        n = n % 3
    elif name.endswith("var"):
        return ((n + 1) / 64).reshape(shape_of(type)).to(type.dtype.to_torch())
    else:
        return ((n - 128) / 32).reshape(shape_of(type)).to(type.dtype.to_torch())
    return n.reshape(shape_of(type)).to(type.dtype.to_torch())


def shape_of(type: TensorType) -> list[int]:
    return [int(s) for s in type.shape]  # type: ignore[arg-type]
