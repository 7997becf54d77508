"""Selectors as the limits of a partition: what is pinned where, and what stays together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.lang.selectors import Selector, selector_of
from dfc.planning.model import Limits, named

Part = str | Selector  # a module path, the text of a selector, or one


def limits_of(
    graph: Graph,
    pins: Iterable[tuple[Part, str]],
    together: Sequence[Part | Sequence[Part]] = (),
    left: bool = False,
) -> Limits:
    """The limits that selectors stand for; each of `together` is one of them or several.

    With `left`, the graph has been rewritten, and selectors take what there still is.
    Raises:  DfcError Q020, Q021 for a selector that is none, or that finds nothing; N048 for a node
             that is pinned to two devices.
    """

    def nodes(part: Part) -> list[Node]:
        found = selector_of(part)
        return found.nodes_left(graph) if left else found.nodes(graph)

    pinned: dict[Node, str] = {}
    for part, device in pins:
        pin(pinned, nodes(part), device)
    groups = [
        [n for part in ([x] if isinstance(x, (str, Selector)) else x) for n in nodes(part)]
        for x in together
    ]  # fmt: skip
    return Limits(pinned, tuple(tuple(dict.fromkeys(group)) for group in groups))


def pin(found: dict[Node, str], nodes: Sequence[Node], device: str) -> None:
    """Add pins to those that there are.

    Raises:  DfcError N048.
    """
    for node in nodes:
        other = found.setdefault(node, device)
        if other != device:
            raise DfcError("N048", f"{named(node)} is pinned to `{other}` and to `{device}`")
