"""`dfc diff`: what changed between two graphs, or what passes change in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.failures import DIFFERENT
from dfc.cli.options import MODEL_HELP, Json, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Graph


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="The same forms.", show_default=False)
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option("--passes", "-p", metavar="STEPS", help="Compare A with A after these."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Graph text with - and +, as in a patch.")
    ] = False,
    context: Annotated[
        int, typer.Option("--context", min=0, help="Unchanged lines around a change.")
    ] = 2,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Tell what changed between two graphs, by module path.

    Exit status 9 says that something did.

    \b
    Examples:
      dfc diff before.dfc after.dfc
      dfc diff encoder.py:build encoder.dfcpkg --text
      dfc diff encoder.py:build -p canonicalize,cse
    """
    from dfc.cli.progress import Progress
    from dfc.ir.diff import diff_graphs

    if (b is None) == (passes is None):
        raise DfcError("D054", "name two graphs, or one and --passes", help="see dfc diff --help")
    load_used(use)
    with Progress() as say:
        say(f"reading {a}")
        before = _graph(a)
        if b is not None:
            say(f"reading {b}")
            after = _graph(b)
        else:
            say("rewriting")
            after = _rewritten(before, passes or "")
        say("comparing")
        found = diff_graphs(before, after)
    if as_json:
        _print_json(found)
    elif text:
        print(found.text(context) if found else "no difference")
    else:
        for line in found.words():
            print(line)
        print(_total(found))
    if found:
        raise typer.Exit(DIFFERENT)


def _graph(name: str) -> Graph:
    from dfc.cli.sources import open_source

    return open_source(name).graph()


def _rewritten(graph: Graph, passes: str) -> Graph:
    from dfc.cli.steps import parse_steps
    from dfc.rewrite.driver import run_passes

    return run_passes(graph, parse_steps(passes), mode="none").graph


def _total(found: Any) -> str:
    if not found:
        return "no difference"
    counts = (len(found.removed), len(found.added), len(found.changed))
    nodes = f"{counted(len(found.before), 'node')} became {len(found.after)}"
    return f"{nodes}: {counts[0]} removed, {counts[1]} added, {counts[2]} changed"


def _print_json(found: Any) -> None:
    from dfc.cli.tables import print_json

    print_json(_data(found))


def _data(found: Any) -> dict[str, Any]:
    from dfc.ir.printer import node_text

    def node(n: Any) -> dict[str, Any]:
        return {"module": n.loc.module if n.loc else "", "op": n.op, "text": node_text(n)}

    return {
        "equal": not found,
        "signature": found.signature,
        "parameters": found.parameters,
        "removed": [node(n) for n in found.removed],
        "added": [node(n) for n in found.added],
        "changed": [
            {"before": node(c.before), "after": node(c.after), "what": list(c.what)}
            for c in found.changed
        ],
        "inner": [_data(i) for i in found.inner],
    }
