"""Where two graphs part: the first node, by name, whose value is another than it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.rewrite.probe import Probe, clone

_LOOKED_AT = 64  # values that differ in bits of which one may differ by more than rounding


@dataclass(frozen=True)
class Divergence:
    """A value that differs: the node that makes it, and the Python line of that."""

    name: str
    op: str
    place: str = ""
    gone: bool = False

    def __str__(self) -> str:
        text = f"%{self.name} = {self.op}"
        if self.gone:
            return f"{text}, which is gone"
        return text + (f", traced from {self.place}" if self.place else "")


def first_divergence(
    before: Graph, after: Graph, probe: Probe, seed: int = 0, exact: bool = False
) -> Divergence | str | None:
    """The first value that differs, beyond rounding or, if `exact`, at all; what the second graph
    says where it fails.

    Cost:  up to four runs; keeps digests, and the values of at most 64 nodes.
    """
    from dfc.rewrite.agree import judge

    digests = _collect(before, probe, seed, _digest, None)
    places: dict[str, Node] = {}
    differing: list[str] = []

    def compare(node: Node, results: Sequence[Any]) -> None:
        for r, x in zip(node.results, results, strict=True):
            if r.name in digests and digests[r.name] != _digest(x):
                differing.append(r.name)
                places[r.name] = node

    try:
        _run(after, probe, seed, compare)
    except DfcError as e:
        return e.message
    wanted = differing[: 1 if exact else _LOOKED_AT]
    if wanted and not exact:
        kept = set(wanted)
        old = _collect(before, probe, seed, _same, kept)
        wide = _collect(before, probe, seed, _same, kept, double=True)
        new = _collect(after, probe, seed, _same, kept)
        wanted = [n for n in wanted if not judge([new[n]], [old[n]], [wide[n]]).agrees]
    if wanted:
        node = places[wanted[0]]
        return Divergence(wanted[0], node.op, str(node.loc or ""))
    return _gone(before, after)


def _gone(before: Graph, after: Graph) -> Divergence | None:
    kept = {r.name for n in after.nodes for r in n.results}
    for node in before.nodes:
        for r in node.results:
            if r.name not in kept:
                return Divergence(r.name, node.op, str(node.loc or ""), gone=True)
    return None


def _digest(x: Any) -> str:
    import torch

    from dfc.ir.weights import tensor_sha256

    if not isinstance(x, torch.Tensor):
        return f"{type(x).__name__} {x!r}"
    return tensor_sha256(torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x)


def _same(x: Any) -> Any:
    return x


def _collect(
    graph: Graph,
    probe: Probe,
    seed: int,
    keep: Callable[[Any], Any],
    names: set[str] | None,
    double: bool = False,
) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def store(node: Node, results: Sequence[Any]) -> None:
        for r, x in zip(node.results, results, strict=True):
            if names is None or r.name in names:
                found[r.name] = keep(x)

    _run(graph, probe, seed, store, double)
    return found


def _run(
    graph: Graph,
    probe: Probe,
    seed: int,
    observe: Callable[[Node, Sequence[Any]], None],
    double: bool = False,
) -> None:
    import torch

    torch.manual_seed(seed)
    interpret(graph, clone(probe.inputs), observe=observe, double=double)
