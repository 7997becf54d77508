"""`dfc select`: what a selector finds in a model, before a recipe uses it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import Json, Model, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Graph, Node, Parameter
    from dfc.lang.search import Selection

_SHOWN = 20


def select(
    model: Model,
    selector: Annotated[
        str, typer.Argument(metavar="SELECTOR", help="What to find.", show_default=False)
    ],
    every: Annotated[
        bool, typer.Option("--all", help=f"Show every node, not only the first {_SHOWN}.")
    ] = False,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Show what a selector finds: nodes, modules, parameters.

    A string is a module path: * is one part, ** any number of parts; alone it needs no quotes.
    There are op(NAME), dtype(f32), param("GLOB"), first(N), last(N), between("A", "B"); they
    combine with not, & and |. Finding nothing is an error that names what is nearest.

    \b
    Examples:
      dfc select encoder.py:build '"encoder.layer.*.attention.**"'
      dfc select encoder.py:build 'op(linear) & not last(1)'
      dfc select encoder.dfcpkg 'param("*.weight")' --json
    """
    from dfc.cli.progress import Progress
    from dfc.cli.sources import open_source
    from dfc.lang.selectors import selector_of, worst_of

    load_used(use)
    chosen = selector_of(selector, "SELECTOR")  # before the model is traced
    if worst_of(chosen.what):
        help = "`dfc explain MODEL -r RECIPE --sensitivity` shows which layers those are"
        raise DfcError("Q021", "`worst` is measured when a recipe's step runs", help=help)
    with Progress() as say:
        say(f"reading {model}")
        graph = open_source(model).graph()
        found = chosen.find(graph)
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": model, "selector": str(chosen), **_data(graph, found)})
    else:
        _show(graph, found, every)


def _data(graph: Graph, found: Selection) -> dict[str, Any]:
    return {
        "nodes": [_node(n) for n in found.nodes],
        "modules": dict(_modules(found)),
        "parameters": [
            {"name": p.name, "type": str(p.type), "bytes": _bytes(p)} for p in found.parameters
        ],
        "of": {"nodes": sum(1 for _ in graph.walk()), "parameters": len(graph.parameters)},
    }


def _node(n: Node) -> dict[str, Any]:
    return {
        "name": f"%{n.results[0].name}" if n.results else "",
        "op": n.op,
        "type": ", ".join(str(r.type) for r in n.results),
        "module": n.loc.module if n.loc else "",
        "place": f"{n.loc.file}:{n.loc.line}" if n.loc and n.loc.file else "",
    }


def _modules(found: Selection) -> Counter[str]:
    return Counter(n.loc.module if n.loc else "" for n in found.nodes)


def _bytes(p: Parameter) -> int | None:
    """Bytes of a parameter; None when its size is open."""
    from dfc.ir.types import TensorType

    if not isinstance(p.type, TensorType) or not all(isinstance(d, int) for d in p.type.shape):
        return None
    count = p.type.dtype.itemsize
    for d in p.type.shape:
        assert isinstance(d, int)
        count *= d
    return count


def _show(graph: Graph, found: Selection, every: bool) -> None:
    from dfc.cli.tables import bytes_text, print_table

    rows = [[str(v) for v in _node(n).values()] for n in found.nodes]
    shown = len(rows) if every else _SHOWN
    if rows:
        print_table(["node", "op", "type", "module", "line"], rows[:shown])
    if len(rows) > shown:
        print(f"... and {len(rows) - shown} more nodes: --all shows them")
    sizes = [(p, _bytes(p)) for p in found.parameters]
    if sizes:
        print()
        listed = [
            [p.name, str(p.type), bytes_text(n) if n is not None else "?"]
            for p, n in sizes[: len(sizes) if every else _SHOWN]
        ]
        print_table(["parameter", "type", "bytes"], listed, right=[2])
    if len(sizes) > _SHOWN and not every:
        print(f"... and {counted(len(sizes) - _SHOWN, 'more parameter')}: --all shows all")
    nodes = sum(1 for _ in graph.walk())
    total = bytes_text(sum(n or 0 for _, n in sizes))
    print(
        f"\n{len(rows)} of {counted(nodes, 'node')}, in {counted(len(_modules(found)), 'module')}; "
        f"{len(sizes)} of {counted(len(graph.parameters), 'parameter')}, {total}"
    )
