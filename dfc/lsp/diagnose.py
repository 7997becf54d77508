"""Everything that is wrong with a text, each with the range of offsets where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dfc.errors import DfcError, Diagnostic, Span
from dfc.lang import syntax as s
from dfc.lsp.document import Document

MAX_TYPED = 5000  # nodes whose types are checked while somebody types
_NODE = re.compile(r"node %(?P<name>\.?\w+)")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `related` are places in other files that belong to it."""

    start: int
    end: int
    code: str
    message: str
    severity: str = "error"  # error, warning or information
    help: str | None = None
    related: tuple[Span, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        lines = [self.message, *self.notes, *([f"help: {self.help}"] if self.help else [])]
        return "\n".join(lines)


def diagnose(document: Document) -> list[Problem]:
    """All problems in the order of the text; never raises for bad text."""
    if document.too_long:
        message = "the text is too long to be checked while it is typed; run `dfc check`"
        return [Problem(0, 1, "P007", message, "information")]
    found = [*(_graph(document) if document.is_graph else _document(document))]
    return sorted(dict.fromkeys(found), key=lambda p: (p.start, p.end))


def syntax_of(document: Document) -> list[Problem]:
    """What is wrong with the form of a recipe or rule file alone: needs no library, no pass."""
    if document.too_long or document.is_graph:
        return []
    return [_placed(document, d) for d in document.reading.problems]


# Recipes, targets and rules


def _document(document: Document) -> Iterator[Problem]:
    from dfc.recipe.resolve import check_source
    from dfc.rewrite.rulesets import kept_apart

    with kept_apart():  # what is being typed is nobody else's rule set
        errors, warnings = check_source(document.source)
    yield from (_placed(document, d) for d in errors)
    yield from (_placed(document, d, "warning") for d in warnings)


def _placed(document: Document, d: Diagnostic, severity: str = "error") -> Problem:
    help = d.help
    if d.code == "Q001" and help is None:
        severity = "warning"
        help = "a pass of your own is known when your program runs; dfc lsp imports no code"
    if d.span is None or d.span.file == document.file:
        start, end = _range(document, d.span)
        return Problem(start, end, d.code, d.message, severity, help, notes=d.notes)
    start, end = _import_of(document, d.span.file)
    message = f"{d.span}: {d.message}"
    return Problem(start, end, d.code, message, severity, help, (d.span,), d.notes)


def _range(document: Document, span: Span | None) -> tuple[int, int]:
    """The offsets of a span; a line without a column is meant as a whole."""
    if span is None:
        return 0, max(document.text.find("\n"), 1)
    lines = document.source.lines
    line = lines[min(span.line, len(lines)) - 1]
    stop = document.text.find("\n", line)
    stop = len(document.text) if stop < 0 else stop
    if not span.col:
        return line, stop
    start = line + span.col - 1
    if start >= len(document.text):  # at the end of the file: what stands last is shown
        end = len(document.text.rstrip())
        return max(end - 1, 0), end
    return start, max(start, min(line + max(span.end_col, span.col + 1) - 1, max(stop, start + 1)))


def _import_of(document: Document, file: str) -> tuple[int, int]:
    """Where the text imports a file, perhaps by way of another; the first line if it does not."""
    imports = [e for e in document.reading.document.entries if isinstance(e, s.Import)]
    for e in imports:
        if file == e.path or file.endswith("/" + e.path):
            return e.at
    return imports[0].at if imports else _range(document, None)


# Graph text


def _graph(document: Document) -> Iterator[Problem]:
    import dfc.ops  # noqa: F401 - the verifier looks ops up
    from dfc.ir.verify import verify
    from dfc.lang.graph_parser import parse_graph

    try:
        document.source.refuse_hidden()
    except DfcError as e:
        if e.code == "P009":
            yield from (_placed(document, d) for d in e.diagnostics)
            return
    try:
        graph = parse_graph(document.text, document.file)
    except DfcError as e:
        yield from (_placed(document, d) for d in e.diagnostics)
        return
    typed = len(graph) <= MAX_TYPED
    try:
        verify(graph, types=typed)
    except DfcError as e:
        yield from _at_nodes(document, e.diagnostics)
    if not typed:
        message = f"types are checked up to {MAX_TYPED} nodes while you type; run `dfc check`"
        yield Problem(0, 1, "V020", message, "information")


def _at_nodes(document: Document, problems: Iterable[Diagnostic]) -> Iterator[Problem]:
    """The verifier speaks of nodes: each problem at the line that defines its node."""
    for d in problems:
        if d.span is not None:
            yield _placed(document, d)
            continue
        name = next((m["name"] for n in d.notes if (m := _NODE.match(n))), None)
        start, end = _defined(document, name) if name else _range(document, None)
        yield Problem(start, end, d.code, d.message, help=d.help, notes=d.notes)


def _defined(document: Document, name: str) -> tuple[int, int]:
    for found in re.finditer(rf"%{re.escape(name)}(?=\s*:)", document.text):
        line_end = document.text.find("\n", found.start())
        equals = document.text.find("=", found.end(), line_end if line_end >= 0 else None)
        if equals >= 0:
            op = re.compile(r"=\s*([\w.]+)").match(document.text, equals)
            return (op.start(1), op.end(1)) if op else found.span()
    return _range(document, None)
