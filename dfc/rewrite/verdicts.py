"""What the driver says of passes: the report of each, and the rewrites that were left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dfc.ir.graph import Graph
from dfc.rewrite.agree import Element
from dfc.rewrite.pass_ import EXACT, Numerics, Pass


@dataclass(frozen=True)
class LeftOut:
    """One rewrite that was found to be wrong: what it was, where it stood, and how it failed.

    `number` counts the rewrites of the pass; -1 stands for a whole rule, or for a whole pass.
    `place` is the Python line that the node was traced from, `origin` the rule's own file:line.
    """

    step: str
    number: int
    reason: str
    rule: str = ""
    node: str = ""
    op: str = ""
    place: str = ""
    origin: str = ""
    probe: str = ""
    elements: tuple[Element, ...] = ()
    reproducer: str = ""

    def __post_init__(self) -> None:
        """Reads back from JSON, where tuples are lists and elements are dicts."""
        found = tuple(_element(e) for e in self.elements)
        object.__setattr__(self, "elements", found)

    @property
    def what(self) -> str:
        """The rewrite in a few words."""
        name = f"`{self.rule}`" if self.rule else f"change {self.number + 1}"
        if self.number < 0:
            return f"the rule {name}" if self.rule else "the pass"
        at = f" at %{self.node} = {self.op}" if self.node else ""
        return f"{name}{at}" + (f", traced from {self.place}" if self.place else "")

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"

    def lines(self) -> list[str]:
        """The whole story: what was wrong, where, by how much, and how to see it again."""
        found = [f"{self.step}: {self.what}"]
        if self.origin:
            found.append(f"  the rule stands at {self.origin}")
        found.append(f"  with {self.probe}: {self.reason}" if self.probe else f"  {self.reason}")
        found += [f"  {line}" for line in element_table(self.elements)]
        if self.reproducer:
            found.append(f"  see it again: dfc run {self.reproducer}")
        return found


def _element(e: Any) -> Element:
    return e if isinstance(e, Element) else Element(**{**e, "index": tuple(e["index"])})


def element_table(elements: tuple[Element, ...]) -> list[str]:
    """The worst elements as aligned lines."""
    if not elements:
        return []
    rows = [["index", "got", "original", "witness", "error", "allowed"]]
    for e in elements:
        row = ["[" + ", ".join(map(str, e.index)) + "]"]
        row += [f"{x:.9g}" for x in (e.got, e.original, e.witness)]
        rows.append(row + [f"{x:.3g}" for x in (e.error, e.allowed)])
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    return ["  ".join(c.rjust(n) for c, n in zip(r, widths, strict=True)) for r in rows]


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Units:  ms of wall clock for the pass alone; error against the witness, absolute.
    """

    step: str
    changes: int
    nodes_before: int
    nodes_after: int
    ms: float
    verdict: str  # "proved", "unproved", "unchanged", "reverted"
    reason: str = ""
    error: float | None = None
    applied: str = ""  # the pass with what was left out; "" when that is nothing
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        found = tuple(x if isinstance(x, LeftOut) else LeftOut(**x) for x in self.left_out)
        object.__setattr__(self, "left_out", found)


@dataclass
class Outcome:
    """The rewritten graph and the story of how it came about."""

    graph: Graph
    reports: list[PassReport]
    probes: Any = None
    numerics: Numerics = EXACT  # what all passes together promise
    passes: list[Pass] = field(default_factory=list)  # as they were applied, reverted ones left out

    @property
    def reverted(self) -> list[PassReport]:
        return [r for r in self.reports if r.verdict == "reverted"]

    @property
    def left_out(self) -> list[LeftOut]:
        return [x for r in self.reports for x in r.left_out]

    def notes(self) -> list[str]:
        """What was left out or undone, told in full, a text for each."""
        return ["\n".join(x.lines()) for x in self.left_out]
