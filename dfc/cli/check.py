"""`dfc check`: all that is wrong with recipes, targets, rules and graphs, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import MODEL_HELP, Json, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError, Diagnostic

if TYPE_CHECKING:
    from dfc.lang.source import Source


def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Text, .dfc; `-` is stdin.", show_default=False),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help=f"Check selectors against it: {MODEL_HELP}"),
    ] = None,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Check recipes, targets, rules and graphs; tell every error.

    Imported files are checked with those that import them. With --model, selectors must match
    something in it. `dfc test` also proves rules.

    \b
    Examples:
      dfc check small.dfc
      dfc check small.dfc --model encoder.py:build
      dfc check recipes/*.dfc rules/*.dfc graph.dfc --json
    """
    from dfc.cli.progress import Progress

    load_used(use)
    found: dict[str, list[Diagnostic]] = {}
    warnings: dict[str, list[Diagnostic]] = {}
    with Progress() as say:
        graph = _graph(model, say) if model else None
        for file in files:
            say(f"checking {file}")
            found[file], warnings[file] = _problems(file, graph)
    if as_json:
        from dfc.cli.tables import print_json

        print_json({f: _listed(found[f], warnings[f]) for f in files})
    else:
        for file in files:
            print(f"{file}: {_count(len(found[file]))}")
    for d in dict.fromkeys(d for some in warnings.values() for d in some):
        typer.echo(d.render().replace("error[", "warning[", 1), err=True)
    wrong = list(dict.fromkeys(d for problems in found.values() for d in problems))
    if wrong:
        raise DfcError.of(wrong, status=2)


def _graph(model: str, say: Any) -> Any:
    from dfc.cli.sources import open_source

    say(f"tracing {model}")
    return open_source(model).graph()


def _problems(file: str, graph: Any) -> tuple[list[Diagnostic], list[Diagnostic]]:
    """Errors and warnings of one file."""
    from dfc.cli.sources import read_source
    from dfc.lang.source import holds_graph

    try:
        source = read_source(file)
        if holds_graph(source.text):
            _verify(source)
            return [], []
    except DfcError as e:
        return [*e.diagnostics], []
    from dfc.recipe.resolve import check_source

    return check_source(source, graph)


def _verify(source: Source) -> None:
    import dfc.ops  # noqa: F401 - the verifier looks ops up
    from dfc.ir.verify import verify
    from dfc.lang.graph_parser import parse_graph

    verify(parse_graph(source.text, source.file))


def _count(n: int) -> str:
    return "valid" if not n else f"{counted(n, 'error')}"


def _listed(errors: Sequence[Diagnostic], warnings: Sequence[Diagnostic]) -> list[Any]:
    return [{"severity": "error", **problem_data(d)} for d in errors] + [
        {"severity": "warning", **problem_data(d)} for d in warnings
    ]


def problem_data(d: Diagnostic) -> dict[str, object]:
    """A diagnostic as data."""
    return {
        "code": d.code,
        "message": d.message,
        "file": d.span.file if d.span else None,
        "line": d.span.line if d.span else None,
        "col": d.span.col if d.span else None,
        "end_col": d.span.end_col if d.span else None,
        "help": d.help,
        "notes": list(d.notes),
    }
