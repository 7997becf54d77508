"""`dfc check`: graph text that parses and obeys every rule, or all that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfc.cli.options import Json, Use, load_used
from dfc.errors import DfcError, Diagnostic


def check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Graph text, .dfc.", show_default=False)
    ],
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Check graph text, and report every error in it.

    \b
    Examples:
      dfc check graph.dfc
      dfc check graphs/*.dfc --json
    """
    from dfc.cli.progress import Progress

    load_used(use)
    found: dict[str, list[Diagnostic]] = {}
    with Progress() as say:
        for file in files:
            say(f"checking {file}")
            found[file] = _problems(file)
    wrong = [d for problems in found.values() for d in problems]
    if as_json:
        from dfc.cli.tables import print_json

        print_json({file: [_data(d) for d in problems] for file, problems in found.items()})
    else:
        for file, problems in found.items():
            print(f"{file}: {_count(len(problems))}")
    if wrong:
        raise DfcError.of(wrong, status=2)


def _problems(file: str) -> list[Diagnostic]:
    import dfc
    from dfc.cli.sources import read_text
    from dfc.ir.verify import verify

    try:
        import dfc.ops  # the verifier looks ops up

        verify(dfc.parse(read_text(Path(file)), file))
    except DfcError as e:
        return [*e.diagnostics]
    return []


def _count(n: int) -> str:
    return "valid" if not n else f"{n} error{'s' if n > 1 else ''}"


def _data(d: Diagnostic) -> dict[str, object]:
    span = d.span
    return {
        "code": d.code,
        "message": d.message,
        "line": span.line if span else None,
        "col": span.col if span else None,
        "help": d.help,
        "notes": list(d.notes),
    }
