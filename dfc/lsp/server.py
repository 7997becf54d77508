"""The language server: pygls's protocol around the plain functions of this folder.

One worker thread does all the work, in order, so that typing is never held up and nothing is shared
between threads. A text is looked at when nobody has typed for a moment; answers about an old text
are dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from cattrs import transform_error
from lsprotocol import types as t
from pygls.exceptions import JsonRpcException, JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer
from pygls.protocol import LanguageServerProtocol
from pygls.uris import from_fs_path, to_fs_path

import dfc
from dfc.errors import DfcError, Span
from dfc.lang.source import Source
from dfc.lsp.complete import Completion, Item, complete, describe
from dfc.lsp.diagnose import Problem, diagnose, syntax_of
from dfc.lsp.document import Document
from dfc.lsp.positions import Positions
from dfc.lsp.symbols import Hover, Outline, Target, go_to, hover, outline

DELAY_S = 0.25  # without typing, before a text is looked at
_T = TypeVar("_T")
_SEVERITY = {
    "error": t.DiagnosticSeverity.Error,
    "warning": t.DiagnosticSeverity.Warning,
    "information": t.DiagnosticSeverity.Information,
}
_ITEM = {
    "pass": t.CompletionItemKind.Function, "op": t.CompletionItemKind.Function,
    "function": t.CompletionItemKind.Function, "pattern": t.CompletionItemKind.Function,
    "keyword": t.CompletionItemKind.Keyword, "option": t.CompletionItemKind.Property,
    "recipe": t.CompletionItemKind.Module, "target": t.CompletionItemKind.Class,
    "rule": t.CompletionItemKind.Snippet, "rule set": t.CompletionItemKind.Module,
    "file": t.CompletionItemKind.File, "type": t.CompletionItemKind.TypeParameter,
    "quantity": t.CompletionItemKind.Unit, "metric": t.CompletionItemKind.Unit,
    "label": t.CompletionItemKind.Reference, "device": t.CompletionItemKind.Class,
    "value": t.CompletionItemKind.Value, "data": t.CompletionItemKind.Variable,
    "parameter": t.CompletionItemKind.Variable, "graph": t.CompletionItemKind.Module,
}  # fmt: skip
_SYMBOL = {
    "recipe": t.SymbolKind.Module, "target": t.SymbolKind.Class, "rule": t.SymbolKind.Function,
    "pattern": t.SymbolKind.Function, "import": t.SymbolKind.File, "data": t.SymbolKind.Variable,
    "metric": t.SymbolKind.Variable, "device": t.SymbolKind.Object, "step": t.SymbolKind.Method,
    "when": t.SymbolKind.Operator, "graph": t.SymbolKind.Module,
}  # fmt: skip


class Protocol(LanguageServerProtocol):
    """Answers requests that do not say what they should: pygls would leave the editor waiting."""

    def structure_message(self, data: dict[str, Any]) -> Any:
        try:
            return super().structure_message(data)
        except JsonRpcException as e:
            if "id" not in data or "method" not in data:
                raise
            cause = "; ".join(transform_error(e.__cause__)) if e.__cause__ else str(e)
            problem = JsonRpcInvalidParams(f"`{data['method']}` cannot be read: {cause}")
            self._send_response(data["id"], error=problem.to_response_error())
            return None

    def handle_message(self, message: Any) -> None:
        if message is not None:  # it was answered when it was read
            super().handle_message(message)


class Server(LanguageServer):
    """The state of one connection: documents by address, and what is still to be looked at."""

    def __init__(self) -> None:
        super().__init__(
            "dfc",
            dfc.__version__,
            text_document_sync_kind=t.TextDocumentSyncKind.Full,
            protocol_cls=Protocol,
        )
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dfc-lsp")
        self.known: dict[str, tuple[int | None, Document]] = {}
        self.waiting: dict[str, asyncio.Task[None]] = {}
        self.warm: Future[None] | None = None

    def document(self, uri: str) -> Document:
        """The text of an address as it is now; made anew when its version has changed.

        Raises:  JsonRpcInvalidParams when the client has not opened it.
        """
        found = self.workspace.text_documents.get(unquote(uri))
        if found is None:
            raise JsonRpcInvalidParams(f"no document is open at {uri}")
        known = self.known.get(uri)
        if known is None or known[0] != found.version:
            self.known[uri] = (found.version, Document(found.source, to_fs_path(uri) or uri))
        return self.known[uri][1]

    def positions(self, source: Source) -> Positions:
        encoding = self.workspace.position_encoding
        return Positions(source.text, source.lines, getattr(encoding, "value", str(encoding)))

    def offset(self, document: Document, position: t.Position) -> int:
        return self.positions(document.source).offset(position.line, position.character)

    def range(self, source: Source, start: int, end: int) -> t.Range:
        places = self.positions(source)
        first, last = places.place(start), places.place(end)
        return t.Range(t.Position(first.line, first.column), t.Position(last.line, last.column))

    async def work(self, function: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *given)

    def look_later(self, uri: str, delay_s: float = DELAY_S) -> None:
        """Publish what is wrong with a text once nobody has typed for a moment."""
        if uri in self.waiting:
            self.waiting[uri].cancel()
        self.waiting[uri] = asyncio.get_running_loop().create_task(self._look(uri, delay_s))

    async def _look(self, uri: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        document = self.document(uri)
        version = self.known[uri][0]
        if self.warm is not None and not self.warm.done():  # what needs no library, at once
            self._publish(uri, version, document, await asyncio.to_thread(syntax_of, document))
        self._publish(uri, version, document, await self.work(diagnose, document))

    def _publish(
        self, uri: str, version: int | None, document: Document, problems: list[Problem]
    ) -> None:
        """Tell the client, unless the text has changed or is gone."""
        if uri in self.known and self.known[uri][0] == version:
            found = [self._diagnostic(document, p) for p in problems]
            self.text_document_publish_diagnostics(
                t.PublishDiagnosticsParams(uri=uri, diagnostics=found, version=version)
            )

    def forget(self, uri: str) -> None:
        task = self.waiting.pop(uri, None)
        if task:
            task.cancel()
        self.known.pop(uri, None)
        self.text_document_publish_diagnostics(t.PublishDiagnosticsParams(uri, []))

    def _diagnostic(self, document: Document, p: Problem) -> t.Diagnostic:
        related = [t.DiagnosticRelatedInformation(_location(span), p.message) for span in p.related]
        return t.Diagnostic(
            range=self.range(document.source, p.start, p.end), message=p.text,
            severity=_SEVERITY[p.severity], code=p.code, source="dfc",
            related_information=[r for r in related if r.location.uri] or None,
        )  # fmt: skip

    def shutdown(self) -> None:
        """Called when the client goes away: nothing may keep the process alive."""
        self.worker.shutdown(wait=False, cancel_futures=True)
        super().shutdown()  # type: ignore[no-untyped-call]


def _location(span: Span) -> t.Location:
    at = t.Position(span.line - 1, max(span.col - 1, 0))
    uri = from_fs_path(span.file) if Path(span.file).is_absolute() else None
    return t.Location(uri or "", t.Range(at, at))


def _warm_up() -> None:
    """Load what the first question would otherwise wait for: passes, rules, PyTorch's ops."""
    from dfc.lsp import vocabulary as v
    from dfc.rewrite.pass_ import pass_classes
    from dfc.rewrite.rulesets import shipped_sets

    pass_classes()
    shipped_sets()
    v.op_bases()


def make_server() -> Server:
    """A server with all its features, not yet connected."""
    server = Server()

    @server.feature(t.INITIALIZED)
    def _initialized(ls: Server, params: t.InitializedParams) -> None:
        ls.warm = ls.worker.submit(_warm_up)

    @server.feature(t.TEXT_DOCUMENT_DID_OPEN)
    async def _opened(ls: Server, params: t.DidOpenTextDocumentParams) -> None:
        ls.look_later(params.text_document.uri, 0.0)

    @server.feature(t.TEXT_DOCUMENT_DID_CHANGE)
    async def _changed(ls: Server, params: t.DidChangeTextDocumentParams) -> None:
        ls.look_later(params.text_document.uri)

    @server.feature(t.TEXT_DOCUMENT_DID_SAVE)
    async def _saved(ls: Server, params: t.DidSaveTextDocumentParams) -> None:
        for uri in ls.known:  # another text may import what was saved
            ls.look_later(uri, 0.0)

    @server.feature(t.TEXT_DOCUMENT_DID_CLOSE)
    def _closed(ls: Server, params: t.DidCloseTextDocumentParams) -> None:
        ls.forget(params.text_document.uri)

    @server.feature(
        t.TEXT_DOCUMENT_COMPLETION,
        t.CompletionOptions(trigger_characters=[".", "(", " ", "=", '"', "%", "!", "@"],
                            resolve_provider=True),
    )  # fmt: skip
    async def _complete(ls: Server, params: t.CompletionParams) -> t.CompletionList:
        document = ls.document(params.text_document.uri)
        offset = ls.offset(document, params.position)
        found = await ls.work(complete, document, offset)
        return _completions(ls, document, offset, found)

    @server.feature(t.COMPLETION_ITEM_RESOLVE)
    async def _resolve(ls: Server, item: t.CompletionItem) -> t.CompletionItem:
        if isinstance(item.data, str):
            text = await ls.work(describe, item.data)
            if text:
                item.documentation = t.MarkupContent(t.MarkupKind.Markdown, text)
        return item

    @server.feature(t.TEXT_DOCUMENT_HOVER)
    async def _hover(ls: Server, params: t.HoverParams) -> t.Hover | None:
        document = ls.document(params.text_document.uri)
        found: Hover | None = await ls.work(hover, document, ls.offset(document, params.position))
        if found is None:
            return None
        content = t.MarkupContent(t.MarkupKind.Markdown, found.text)
        return t.Hover(content, ls.range(document.source, found.start, found.end))

    @server.feature(t.TEXT_DOCUMENT_DEFINITION)
    async def _definition(ls: Server, params: t.DefinitionParams) -> list[t.Location]:
        document = ls.document(params.text_document.uri)
        found = await ls.work(go_to, document, ls.offset(document, params.position))
        return [_target(ls, params.text_document.uri, document, x) for x in found]

    @server.feature(t.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
    async def _symbols(ls: Server, params: t.DocumentSymbolParams) -> list[t.DocumentSymbol]:
        document = ls.document(params.text_document.uri)
        found = await ls.work(outline, document)
        return [_symbol(ls, document, x) for x in found]

    @server.feature(t.TEXT_DOCUMENT_FORMATTING)
    async def _format(ls: Server, params: t.DocumentFormattingParams) -> list[t.TextEdit]:
        document = ls.document(params.text_document.uri)
        wanted = await ls.work(formatted, document)
        if wanted is None or wanted == document.source.original:
            return []
        whole = ls.range(document.source, 0, len(document.text))
        return [t.TextEdit(whole, wanted)]

    return server


def formatted(document: Document) -> str | None:
    """The canonical form; None for a text that does not parse, which stays as it is."""
    from dfc.lang.format import formatted as laid_out

    try:
        return None if document.too_long else laid_out(document.source)
    except DfcError:
        return None


def _completions(
    ls: Server, document: Document, offset: int, found: Completion
) -> t.CompletionList:
    replaced = ls.range(document.source, found.start, offset)
    items = [_item(i, item, replaced) for i, item in enumerate(found.items)]
    return t.CompletionList(is_incomplete=not found.complete, items=items)


def _item(i: int, item: Item, replaced: t.Range) -> t.CompletionItem:
    return t.CompletionItem(
        label=item.label, kind=_ITEM.get(item.kind), detail=item.detail or None,
        sort_text=f"{i:04d}", filter_text=item.label,
        text_edit=t.TextEdit(replaced, item.text), data=item.lookup or None,
    )  # fmt: skip


def _target(ls: Server, uri: str, document: Document, x: Target) -> t.Location:
    if x.source is document.source:
        return t.Location(uri, ls.range(x.source, *x.at))
    return t.Location(from_fs_path(_file(x.source)) or "", ls.range(x.source, *x.at))


def _file(source: Source) -> str:
    """The file of a source; what is shipped is known by its short name."""
    from dfc.recipe.imports import rules_folder, std_folder

    path = Path(source.file)
    for candidate in (path, std_folder() / path.name, rules_folder() / path.name):
        if candidate.is_file():
            return str(candidate.resolve())
    return str(path.absolute())


def _symbol(ls: Server, document: Document, x: Outline) -> t.DocumentSymbol:
    return t.DocumentSymbol(
        name=x.name or "(no name)", kind=_SYMBOL[x.kind], detail=x.detail or None,
        range=ls.range(document.source, *x.whole), selection_range=ls.range(document.source, *x.at),
        children=[_symbol(ls, document, c) for c in x.inside] or None,
    )  # fmt: skip


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Speak the protocol until the client says `exit` or closes its end.

    The worker may still be busy when this returns.
    """
    logging.getLogger("pygls").setLevel(logging.ERROR)
    server = make_server()
    server.start_io(stdin, stdout)
