"""Graph text has one canonical form, which knows no comments; here they are put back."""

from __future__ import annotations

import re
from collections import Counter

# What a line of graph text defines: comments before it stay with it.
_KEY = re.compile(r"\s*(!(?:\"[^\"]*\"|[\w.]+)|%[\w.]+(?=\s*[:,])|graph @\w+|return\b|dfc(?= \d))")
_COMMENT = re.compile(r"""^((?:[^"#]|"(?:[^"\\]|\\.)*")*)(\#.*)$""")


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
