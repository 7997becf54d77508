"""Help inside graph text: values, parameters, ops and attributes, found by their signs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dfc.ir.types import DTYPES
from dfc.lsp import vocabulary as v
from dfc.lsp.document import Document

_WORD = re.compile(r"[%!@]?[A-Za-z0-9_.]*\Z")
_SIGN = re.compile(r'[%@]\.?[A-Za-z0-9_]+|!(?:[A-Za-z0-9_.]+|"[^"\n]*")|[A-Za-z_][\w.]*')
_CALL = re.compile(r"(?:=|^)\s*([a-z]\w*(?:\.\w+)+)\(", re.MULTILINE)
MAX_LINE = 1 << 14


@dataclass(frozen=True)
class Sign:
    """A name in graph text: `%3`, `!head.weight`, `@then`, or an op."""

    text: str
    start: int
    end: int


def sign_at(document: Document, offset: int) -> Sign | None:
    line, end = _line(document.text, offset)
    for found in _SIGN.finditer(document.text, line, end):
        if found.start() <= offset <= found.end():
            return Sign(found.group(), found.start(), found.end())
    return None


def definition(document: Document, sign: Sign) -> tuple[int, int] | None:
    """Where a value, parameter or graph is defined: the nearest definition before its use.

    Names of nested graphs may repeat; a graph is defined after its use.
    """
    text, name = document.text, re.escape(sign.text)
    if sign.text[0] == "@":
        found = re.search(rf"graph\s+({name})\b", text)
        return found.span(1) if found else None
    if sign.text[0] not in "%!":
        return None
    best = None
    for hit in re.finditer(rf"(?<![\w.])({name})(?=\s*:)", text):
        if best is None or hit.start() <= sign.start:
            best = hit.span(1)
    return best


def defining_line(document: Document, at: tuple[int, int]) -> str:
    start, end = _line(document.text, at[0])
    return document.text[start : min(end, start + 400)].strip()


def complete_graph(document: Document, offset: int) -> tuple[int, Iterator[tuple[str, str, str]]]:
    """Where the word at hand starts, and (label, kind, detail) of what may stand there."""
    text = document.text
    line, _ = _line(text, offset)
    found = _WORD.search(text, max(line, offset - 256), offset)
    start = found.start() if found else offset
    return start, _proposals(text, line, start, offset)


def _proposals(text: str, line: int, start: int, offset: int) -> Iterator[tuple[str, str, str]]:
    sign = text[start:offset][:1]
    before = text[line:start]
    if sign == "%":
        for value in dict.fromkeys(re.findall(r"(%\.?\w+)\s*:", text[:offset])):
            yield value, "value", "value"
    elif sign == "!":
        for name in dict.fromkeys(re.findall(r'(!(?:[\w.]+|"[^"\n]*"))\s*:', text)):
            yield name, "parameter", "parameter"
    elif sign == "@":
        for name in dict.fromkeys(re.findall(r"graph\s+(@\w+)", text)):
            yield name, "graph", "nested graph"
    elif re.search(r"=\s*\Z", before) and "(" not in before.rpartition(" = ")[2]:
        for op in v.op_names():
            yield op, "op", "op"
    elif re.search(r":\s*\Z", before):
        for dtype in DTYPES:
            yield dtype, "type", "dtype"
    else:
        call = list(_CALL.finditer(before))
        for name in v.arguments_of(call[-1][1]) if call else ():
            yield f"{name}=", "option", f"argument of {call[-1][1]}"


def _line(text: str, offset: int) -> tuple[int, int]:
    start = text.rfind("\n", 0, offset) + 1
    end = text.find("\n", offset)
    end = len(text) if end < 0 else end
    return max(start, offset - MAX_LINE), min(end, offset + MAX_LINE)
