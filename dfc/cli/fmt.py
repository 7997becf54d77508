"""`dfc fmt`: recipes, targets, rules and graph text in their one layout, comments kept."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dfc.cli.failures import DIFFERENT


def fmt(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Text, .dfc; `-` is stdin.", show_default=False),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 9 if a file would change.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Change nothing; show what would change; exit with 9.")
    ] = False,
) -> None:
    """Lay out recipes, targets, rules and graphs in one form.

    No file is touched when one of them does not parse. `-` reads stdin and writes stdout.

    \b
    Examples:
      dfc fmt small.dfc
      dfc fmt --check recipes/*.dfc rules/*.dfc
      dfc fmt - < draft.dfc
    """
    from dfc.cli.outputs import write_text

    changed = _changed(files)
    for file, before, wanted in changed:
        if diff:
            print(_difference(file, before, wanted), end="")
        elif check and before != wanted:
            print(f"{file} would change")
        elif file == "-" and not check:
            print(wanted, end="")
        elif not check:
            write_text(os.path.realpath(file), wanted, force=True)  # a link stays a link
            print(f"{file} changed")
    if (check or diff) and any(before != wanted for _, before, wanted in changed):
        raise typer.Exit(DIFFERENT)


def _changed(files: list[str]) -> list[tuple[str, str, str]]:
    """The files that are not in layout, and stdin: all are read before the first is written."""
    from dfc.cli.sources import read_source
    from dfc.errors import DfcError, Diagnostic
    from dfc.lang.format import formatted

    found: list[tuple[str, str, str]] = []
    problems: list[Diagnostic] = []
    for file in files:
        try:
            source = read_source(file)
            wanted = formatted(source)
        except DfcError as e:
            problems += e.diagnostics
            continue
        if wanted != source.original or file == "-":
            found.append((file, source.original, wanted))
    if problems:
        raise DfcError.of(problems, status=2)
    return found


def _difference(file: str, before: str, after: str) -> str:
    import difflib

    texts = (before.splitlines(keepends=True), after.splitlines(keepends=True))
    lines = difflib.unified_diff(*texts, file, f"{file} (formatted)")
    open_end = "\n\\ No newline at end of file\n"  # as diff and git have it, and patch reads it
    return "".join(line if line.endswith("\n") else line + open_end for line in lines)
