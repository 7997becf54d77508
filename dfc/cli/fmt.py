"""`dfc fmt`: graph text in its one canonical form, comments kept."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from dfc.cli.failures import DIFFERENT

# What a line of graph text defines: comments before it stay with it.
_KEY = re.compile(r"\s*(!(?:\"[^\"]*\"|[\w.]+)|%[\w.]+(?=\s*[:,])|graph @\w+|return\b|dfc(?= \d))")
_COMMENT = re.compile(r"""^((?:[^"#]|"(?:[^"\\]|\\.)*")*)(\#.*)$""")


def fmt(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Graph text, .dfc.", show_default=False)
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 9 if a file would change.")
    ] = False,
) -> None:
    """Rewrite graph text in its canonical form.

    \b
    Examples:
      dfc fmt graph.dfc
      dfc fmt --check graphs/*.dfc
    """
    import dfc
    from dfc.cli.outputs import write_text
    from dfc.cli.sources import read_text

    changed: list[tuple[str, str]] = []
    for file in files:  # all are read before the first is written
        text = read_text(Path(file))
        wanted = with_comments(text, str(dfc.parse(text, file)))
        if wanted != text:
            changed.append((file, wanted))
    for file, wanted in changed:
        if check:
            print(f"{file} would change")
        else:
            write_text(file, wanted, force=True)
            print(f"{file} changed")
    if check and changed:
        raise typer.Exit(DIFFERENT)


def with_comments(source: str, canonical: str) -> str:
    """The canonical text with the source's comments: each above the line it stood at or before."""
    pending: list[str] = []
    above: dict[tuple[str, int], list[str]] = {}
    seen: Counter[str] = Counter()
    for line in source.splitlines():
        comment = _COMMENT.match(line)
        if comment:
            pending.append(comment[2].rstrip())
        key = _key(comment[1] if comment else line)
        if key is None:
            continue
        seen[key] += 1  # nested graphs may use a name again
        if pending:
            above[key, seen[key]] = pending
            pending = []
    lines: list[str] = []
    seen.clear()
    for line in canonical.splitlines():
        key = _key(line)
        if key is not None:
            seen[key] += 1
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + c for c in above.pop((key, seen[key]), [])]
        lines.append(line)
    left = [c for comments in above.values() for c in comments] + pending
    return "\n".join([*lines, *left]) + "\n"


def _key(line: str) -> str | None:
    found = _KEY.match(line)
    return found[1] if found else None
