"""A partitioned graph as one graph a stage, with what goes from where to where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.slice import slice_graph

_STATELESS = (
    "run it unsplit; or trace it without that state: after .eval() where it is of batch norms, "
    "with use_cache=False where it is a cache, else as an input and an output"
)
HOST = -1  # where the graph's own inputs come from


@dataclass(frozen=True)
class StageGraph:
    """One stage: its graph, and the whole graph's values that it takes and gives, in order.

    `takes[i]` comes from stage `sources[i]`, HOST for an input of the whole graph.
    """

    graph: Graph
    takes: tuple[Value, ...]
    sources: tuple[int, ...]
    gives: tuple[Value, ...]


def split(graph: Graph, stage_of: Mapping[Node, int]) -> list[StageGraph]:
    """The stages of a graph whose nodes have one each, numbered from 0.

    Needs:   convex stages: nothing reads what a later stage makes.
    Raises:  DfcError N050 for a node without a stage, a stage that reads a later one, or state
             that the model writes to (a pipeline holds several microbatches at once).
    """
    if why := no_pipeline(graph):
        raise DfcError("N050", why, help=_STATELESS)
    nodes = list(graph.nodes)
    count = _checked(nodes, stage_of)
    home: dict[Value, int] = {v: HOST for v in graph.inputs}
    home.update((r, stage_of[n]) for n in nodes for r in n.results)
    stages = []
    for s in range(count):
        mine = [n for n in nodes if stage_of[n] == s]
        part, outer = slice_graph(graph, mine)
        part.name = f"{graph.name}_{s}"
        gives = _kept(graph, mine)
        sources = tuple(home[v] for v in outer)
        stages.append(StageGraph(part, tuple(outer), sources, tuple(gives)))
    return stages


def no_pipeline(graph: Graph) -> str:
    """Why no pipeline computes this graph, whatever its stages are; nothing where one does."""
    if not graph.mutations:
        return ""
    return (
        f"the model writes to {_written(graph)} at every call, which the microbatches of a "
        "pipeline, several at once, would do in no order"
    )


def _written(graph: Graph) -> str:
    """The buffers that a model writes to, by name."""
    names = list(dict.fromkeys(f"`{m.target.name}`" for m in graph.mutations))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"its buffer{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def _checked(nodes: Sequence[Node], stage_of: Mapping[Node, int]) -> int:
    if not isinstance(stage_of, Mapping):
        message = f"`stage_of` gives each node its stage, got one of type {type(stage_of).__name__}"
        help = "of a plan that is `dfc.planning.pipeline.stage_of(plan)`"
        raise DfcError("N050", message, help=help, status=2)
    for n in nodes:
        if n not in stage_of:
            raise DfcError("N050", f"the node {n!r} has no stage")
        for v in n.operands:
            if v.node is not None and stage_of[v.node] > stage_of[n]:
                raise DfcError(
                    "N050", f"stage {stage_of[n]} reads %{v.name}, which a later stage makes"
                )
    used = sorted(set(stage_of[n] for n in nodes))
    if used != list(range(len(used))):
        raise DfcError("N050", f"stages are numbered from 0 without gaps, got {used}")
    return len(used)


def _kept(graph: Graph, mine: Sequence[Node]) -> list[Value]:
    """The results that a slice has for outputs, in its order."""
    inside = set(mine)
    return [
        r for n in mine for r in n.results if not r.users or any(u not in inside for u in r.users)
    ]


def passed_through(graph: Graph) -> list[Value]:
    """Outputs that no node makes: inputs and parameters that are handed back."""
    return [v for v in graph.outputs if v.node is None or isinstance(v, Parameter)]
