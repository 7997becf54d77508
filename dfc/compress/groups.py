"""Dependency groups: units that can only be pruned together, wherever in the graph they stand.

A group is a leaf of the axes: removing its unit i removes index i of everything that was united
with it. Its kind says what the units are:

  heads     whole attention heads; query heads that share a key head go with it
  head_dim  what lies inside a head
  ffn       hidden units between linear layers
  channels  channels of convolutions, and whatever has a name of its own nowhere else
  width     units that a norm or a mean goes over (the residual stream of a transformer): removing
            them changes what stays, however small they are
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dfc.compress.axes import Axis, factors, leaves
from dfc.compress.dimensions import Analysis, Use, analyse
from dfc.compress.dims_norm import STATISTIC
from dfc.ir.graph import Graph, Node, Parameter

KINDS = ("heads", "head_dim", "ffn", "channels", "width")


@dataclass(eq=False)
class Group:
    """Units that are pruned together."""

    axis: Axis
    kind: str = ""
    members: list[tuple[Parameter, int]] = field(default_factory=list)
    makers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)

    @property
    def size(self) -> int:
        assert isinstance(self.axis.size, int)
        return self.axis.size

    @property
    def frozen(self) -> tuple[str, ...]:
        """Why none of its units can go; empty when they can."""
        return tuple(self.axis.frozen)

    @property
    def exact(self) -> bool:
        """Whether removing units whose results nothing reads leaves all else as it was."""
        return STATISTIC not in self.axis.marks and self.kind != "head_dim"

    @property
    def modules(self) -> list[str]:
        """The modules whose weights make its units."""
        found = [u.node.loc.module for u in self.makers if u.node.loc and u.node.loc.module]
        return list(dict.fromkeys(found))

    @property
    def name(self) -> str:
        """Where it is: the module that makes it, or what several have in common."""
        modules = self.modules
        if not modules:
            return self.members[0][0].name if self.members else "the model itself"
        return modules[0] if len(modules) == 1 else _common(modules)

    @property
    def node(self) -> Node | None:
        return self.makers[0].node if self.makers else None

    def __str__(self) -> str:
        return f"{self.name}: {self.size} {self.kind}"


def _common(modules: list[str]) -> str:
    """`layer.0.attention` of `layer.0.attention.query` and `.key`; else the first and a count."""
    parts = [m.split(".") for m in modules]
    shared = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    if len(shared) >= min(map(len, parts)) - 1 and shared:
        return ".".join(shared)
    return f"{modules[0]} and {len(modules) - 1} more"


@dataclass
class Groups:
    """All groups of a graph, in the order in which it makes them."""

    analysis: Analysis
    groups: list[Group]

    @property
    def prunable(self) -> list[Group]:
        return [g for g in self.groups if not g.frozen and g.size > 1]


def find_groups(graph: Graph) -> Groups:
    """The groups that some parameter has a part in, frozen ones with their reasons.

    Cost:  linear in the graph.
    """
    analysis = analyse(graph)
    found: dict[Axis, Group] = {}

    def group(axis: Axis) -> Group | None:
        if not isinstance(axis.size, int) or axis.size < 2:
            return None
        return found.setdefault(axis, Group(axis))

    for uses, where in ((analysis.makers, "makers"), (analysis.readers, "readers")):
        for use in uses:
            for axis in dict.fromkeys(leaves(use.axis)):
                g = group(axis)
                if g is not None:
                    getattr(g, where).append(use)
    for p in graph.parameters.values():
        for dim, axis in enumerate(analysis.dims[p]):
            for x in dict.fromkeys(leaves(axis)):
                g = group(x)
                if g is not None:
                    g.members.append((p, dim))
    heads = set(_heads(analysis))
    for g in found.values():
        g.kind = _kind(g, heads)
    return Groups(analysis, [g for g in found.values() if g.members])


def _heads(analysis: Analysis) -> Iterator[Axis]:
    """The outermost factor of each attention's batch that can go; without one, what stands beside
    tokens in the rows: query heads that share one key head.
    """
    for batch, rows in zip(analysis.batches, analysis.rows, strict=True):
        open_ = [x for axis in batch for x in factors(axis) if not x.frozen and x.size != 1]
        parts = [x for axis in rows for x in factors(axis) if x.size != 1]
        if not open_ and any(x.frozen for x in parts):
            open_ = [x for x in parts if not x.frozen]
        yield from open_[:1]
    for axis in analysis.heads:
        yield from [x for x in factors(axis) if x.size != 1][:1]


def _kind(g: Group, heads: set[Axis]) -> str:
    if g.axis in heads:
        return "heads"
    if "inside a head" in g.axis.marks:
        return "head_dim"
    if STATISTIC in g.axis.marks:
        return "width"
    ops = Counter("conv" in u.node.op for u in (*g.makers, *g.readers))
    return "channels" if ops[True] else "ffn"
