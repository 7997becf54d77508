"""What can be checked of a pass without running the graph: that it ends, tells the truth, and
leaves a valid graph.

V031  it left an invalid graph      V032  it says 0 changes and changed the graph
V034  it failed
"""

from __future__ import annotations

import time
import traceback
from dataclasses import fields
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.verify import verify
from dfc.rewrite.cache import run_cached
from dfc.rewrite.pass_ import CHANGES, Context, Numerics, Pass, close
from dfc.rewrite.verdicts import PassReport

# What a user can put right: a name that nothing has, a rule that cannot be read, a file, a target
# that a model does not fit. K040, in none of these families: code of the user's own that raised.
_USERS = ("Q", "R", "D", "P", "N")
# What makes a pass wrong where results are proved: it is undone, and not an error.
FAULTS = ("V031", "V032", "V034")


def run_checked(p: Pass, graph: Graph, ctx: Context) -> PassReport:
    """Run a pass and check what can be checked without running the graph.

    Raises:  DfcError V031, V032, V034 (status 1); what the pass says is the user's to put right.
    """
    count = len(graph)
    before = _snapshot(graph)
    start = time.perf_counter()
    changes = _run(p, graph, ctx)
    ms = (time.perf_counter() - start) * 1e3
    changed = _changed(graph, before)
    try:
        verify(graph, types=[n for n in changed if n is not graph.result])
    except DfcError as e:
        message = f"pass `{p.name}` left an invalid graph"
        raise DfcError("V031", message, notes=(e.render(),), **_whose(p)) from e
    if not changes and (changed or [*graph.walk(), graph.result] != list(before)):
        message = f"pass `{p.name}` says 0 changes and changed the graph"
        raise DfcError("V032", message, **_whose(p))
    verdict = "unproved" if changes else "unchanged"
    return PassReport(str(p), changes, count, len(graph), ms, verdict)


def _whose(p: Pass) -> dict[str, Any]:
    """A bug of ours, or a failure of the user's own code, with its line."""
    return {"status": 8, "span": p.origin.span("run")} if p.origin else {"status": 1}


def _run(p: Pass, graph: Graph, ctx: Context) -> int:
    try:
        return run_cached(p, graph, ctx, lambda: p.run(graph, ctx))
    except MemoryError:
        raise
    except Exception as e:
        if isinstance(e, DfcError) and (e.code[0] in _USERS or e.code == "K040"):
            raise
        name = _data_of(p, ctx)
        if isinstance(e, DfcError) and e.code == "K020" and name:
            message = f"a batch of data `{name}` cannot be run: {e.message}"
            raise DfcError("D081", message, notes=e.diagnostics[0].notes) from e
        said = e.message if isinstance(e, DfcError) else str(e).splitlines()[0] if str(e) else ""
        reason = said if isinstance(e, DfcError) else f"{type(e).__name__}: {said}".rstrip(": ")
        frames = traceback.extract_tb(e.__traceback__)
        place = f"raised at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise DfcError("V034", f"pass `{p.name}` failed: {reason}", notes=(place,), status=1) from e


def _data_of(p: Pass, ctx: Context) -> str | None:
    """The data that a pass reads: nodes fail on it for numbers that no check of shapes finds."""
    values = (getattr(p, f.name) for f in fields(p))  # type: ignore[arg-type]
    return next((v for v in values if isinstance(v, str) and v in ctx.data), None)


Snapshot = dict[Node, tuple[object, ...]]


def _snapshot(graph: Graph) -> Snapshot:
    """What each node looked like: cheap, because nodes that a pass leaves alone stay themselves."""
    found: Snapshot = {n: _look(n) for n in graph.walk()}
    found[graph.result] = (*_look(graph.result), *_weights(graph))
    return found


def _look(node: Node) -> tuple[object, ...]:
    types = (*(r.type for r in node.results), *(v.type for v in node.operands))
    return (node.op, node.attributes, node.inputs, node.stage, node.results, node.graphs, types)


def _weights(graph: Graph) -> list[tuple[Parameter, object]]:
    return [(p, p.data) for p in graph.parameters.values()]


def _changed(graph: Graph, before: Snapshot) -> list[Node]:
    """The nodes that are new or look different, and the result node when outputs did."""
    found = [n for n in graph.walk() if before.get(n) != _look(n)]
    if before[graph.result] != (*_look(graph.result), *_weights(graph)):
        found.append(graph.result)
    return found


def weaker(a: Numerics, b: Numerics) -> Numerics:
    """The promise of two passes in a row."""
    if CHANGES in (a, b):
        return CHANGES
    if a.kind == b.kind == "close":
        return close(a.rtol + b.rtol)
    return a if a.kind == "close" else b
