"""`dfc lsp` over stdin and stdout, driven by pygls's own client as an editor would."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pygls")

from lsprotocol import types as t
from pygls.exceptions import JsonRpcInvalidParams
from pygls.lsp.client import LanguageClient

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 120  # the machine may be busy; nothing here waits when it is not


class Editor(LanguageClient):
    """A client that keeps what the server publishes."""

    def __init__(self, encodings: list[t.PositionEncodingKind]) -> None:
        super().__init__("dfc-tests", "1")
        self.encodings = encodings
        self.published: asyncio.Queue[t.PublishDiagnosticsParams] = asyncio.Queue()

        @self.feature(t.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        def _published(params: t.PublishDiagnosticsParams) -> None:
            self.published.put_nowait(params)

    async def begin(self) -> t.InitializeResult:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = "from dfc.cli import main; import sys; sys.exit(main(['lsp']))"
        await self.start_io(sys.executable, "-c", command, env=env, cwd=str(ROOT))
        general = t.GeneralClientCapabilities(position_encodings=self.encodings)
        found = await self.initialize_async(
            t.InitializeParams(capabilities=t.ClientCapabilities(general=general))
        )
        self.initialized(t.InitializedParams())
        return found

    def open(self, uri: str, text: str) -> None:
        item = t.TextDocumentItem(uri, "dfc", 1, text)
        self.text_document_did_open(t.DidOpenTextDocumentParams(item))

    def change(self, uri: str, version: int, text: str) -> None:
        self.text_document_did_change(
            t.DidChangeTextDocumentParams(
                t.VersionedTextDocumentIdentifier(version, uri),
                [t.TextDocumentContentChangeWholeDocument(text)],
            )
        )

    async def problems(self, uri: str, version: int, least: int = 0) -> list[t.Diagnostic]:
        """What is published about one version, the first time that it has so many problems."""
        while True:
            got = await asyncio.wait_for(self.published.get(), WAIT_S)
            if got.uri == uri and got.version == version and len(got.diagnostics) >= least:
                return list(got.diagnostics)

    async def end(self) -> int:
        await self.shutdown_async(None)
        self.exit(None)
        return await self.gone()

    async def gone(self) -> int:
        assert self._server is not None
        return await asyncio.wait_for(self._server.wait(), WAIT_S)


def with_editor(
    story: Callable[[Editor], Awaitable[Any]],
    encoding: t.PositionEncodingKind = t.PositionEncodingKind.Utf16,
) -> None:
    async def run() -> None:
        editor = Editor([encoding])
        await editor.begin()
        try:
            await asyncio.wait_for(story(editor), 4 * WAIT_S)
        finally:
            server = editor._server
            assert server is not None
            if server.returncode is None:
                server.kill()
            await server.wait()
            await editor.stop()

    asyncio.run(run())


TEXT = "dfc 1\nrecipe a { # 😀\n  q: csee  # 😀 x\n  cse with lim=3\n}\n"


def test_a_session_from_opening_to_the_end(tmp_path: Path) -> None:
    uri = (tmp_path / "main.dfc").as_uri()
    document = t.TextDocumentIdentifier(uri)

    async def story(editor: Editor) -> None:
        editor.open(uri, TEXT)
        found = await editor.problems(uri, 1, least=2)
        assert [(d.code, d.range.start.line, d.range.start.character) for d in found] == [
            ("Q001", 2, 5), ("Q002", 3, 11),
        ]  # fmt: skip
        assert "did you mean `cse`?" in found[0].message

        items = await editor.text_document_completion_async(
            t.CompletionParams(document, t.Position(3, 14))
        )
        assert isinstance(items, t.CompletionList)
        (item,) = [i for i in items.items if i.label == "limit"]
        assert isinstance(item.text_edit, t.TextEdit) and item.text_edit.new_text == "limit="
        assert item.text_edit.range == t.Range(t.Position(3, 11), t.Position(3, 14))
        items = await editor.text_document_completion_async(
            t.CompletionParams(document, t.Position(2, 7))
        )
        assert isinstance(items, t.CompletionList)
        full = await editor.completion_item_resolve_async(items.items[0])
        assert isinstance(full.documentation, t.MarkupContent)
        assert "| `limit` | whole number" in full.documentation.value

        fixed = TEXT.replace("csee", "cse").replace("lim=", "limit=")
        editor.change(uri, 2, fixed)
        assert await editor.problems(uri, 2) == []

        meaning = await editor.text_document_hover_async(t.HoverParams(document, t.Position(2, 6)))
        assert meaning is not None and isinstance(meaning.contents, t.MarkupContent)
        assert "Merge pure nodes" in meaning.contents.value
        assert meaning.range == t.Range(t.Position(2, 5), t.Position(2, 8))

        symbols = await editor.text_document_document_symbol_async(t.DocumentSymbolParams(document))
        assert symbols is not None
        assert [s.name for s in symbols] == ["a"]
        assert [c.name for c in symbols[0].children or ()] == ["q", "cse"]

        editor.change(uri, 3, fixed.replace("  cse with", " cse   with"))
        options = t.FormattingOptions(tab_size=4, insert_spaces=True)
        edits = await editor.text_document_formatting_async(
            t.DocumentFormattingParams(document, options)
        )
        assert edits is not None and "\n  cse with limit=3\n" in edits[0].new_text
        assert edits[0].range == t.Range(t.Position(0, 0), t.Position(5, 0))

        await editor.problems(uri, 3)
        editor.text_document_did_close(t.DidCloseTextDocumentParams(document))
        closed = await asyncio.wait_for(editor.published.get(), WAIT_S)
        assert closed.diagnostics in ([], ())
        assert await editor.end() == 0

    with_editor(story)


def test_definitions_lead_into_other_files(tmp_path: Path) -> None:
    base = tmp_path / "base.dfc"
    base.write_text("dfc 1\n# 😀\nrecipe base {\n  cse\n}\n", encoding="utf-8")
    uri = (tmp_path / "main.dfc").as_uri()
    steps = '  apply base, simplify\n  cse on "😀" with lim=3\n'
    text = f'dfc 1\nimport "base.dfc"\nrecipe a {{\n{steps}}}\n'
    (tmp_path / "main.dfc").write_text(text)

    async def story(editor: Editor) -> None:
        editor.open(uri, text)
        problem = (await editor.problems(uri, 1, least=1))[-1]
        # In UTF-8 the sign takes four: `lim` stands behind `  cse on "..." with `.
        assert (problem.range.start.line, problem.range.start.character) == (4, 21)

        async def go_to(line: int, column: int) -> tuple[str, int, int]:
            found = await editor.text_document_definition_async(
                t.DefinitionParams(t.TextDocumentIdentifier(uri), t.Position(line, column))
            )
            assert isinstance(found, (list, tuple)) and isinstance(found[0], t.Location)
            start = found[0].range.start
            return Path(found[0].uri).name, start.line, start.character

        assert await go_to(3, 9) == ("base.dfc", 2, 7)
        assert await go_to(1, 10) == ("base.dfc", 0, 0)
        assert (await go_to(3, 15))[0] == "simplify.dfc"
        assert await editor.end() == 0

    with_editor(story, t.PositionEncodingKind.Utf8)


def test_the_server_ends_when_its_input_does(tmp_path: Path) -> None:
    uri = (tmp_path / "main.dfc").as_uri()

    async def story(editor: Editor) -> None:
        editor.open(uri, TEXT)
        server = editor._server
        assert server is not None and server.stdin is not None
        server.stdin.close()
        assert await editor.gone() == 0

    with_editor(story)


def test_broken_text_and_broken_questions_do_not_end_it(tmp_path: Path) -> None:
    uri = (tmp_path / "main.dfc").as_uri()
    document = t.TextDocumentIdentifier(uri)

    async def story(editor: Editor) -> None:
        texts = [
            "",
            "dfc",
            'dfc 1\nrecipe "',
            "dfc 1\nrecipe a {\n }fuse",
            "\x00\ud83d",
            "((((" * 40,
        ]
        editor.open(uri, "")
        for version, text in enumerate(texts, 2):
            editor.change(uri, version, text)
            for place in (t.Position(0, 0), t.Position(99, 99), t.Position(1, 3)):
                await editor.text_document_completion_async(t.CompletionParams(document, place))
                await editor.text_document_hover_async(t.HoverParams(document, place))
            await editor.text_document_document_symbol_async(t.DocumentSymbolParams(document))
        await editor.problems(uri, len(texts) + 1)
        assert await editor.end() == 0

    with_editor(story)


def test_without_pygls_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['pygls'] = None; from dfc.cli import main; sys.exit(main(['lsp']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 7 and done.stdout == ""
    assert "error[K002]" in done.stderr and "pip install 'dfc-compiler[lsp]'" in done.stderr


def test_requests_that_cannot_be_met_are_answered_in_words(tmp_path: Path) -> None:
    uri, missing = ((tmp_path / n).as_uri() for n in ("main.dfc", "missing.dfc"))

    async def story(editor: Editor) -> None:
        async def answer(method: str, **params: Any) -> Any:
            number = f"raw {len(sent)}"
            sent.append(Future())
            editor.protocol._request_futures[number] = sent[-1]
            message = {"method": f"textDocument/{method}", "params": params}
            editor.protocol._send_data({"jsonrpc": "2.0", "id": number, **message})
            return await asyncio.wait_for(asyncio.wrap_future(sent[-1]), WAIT_S)

        sent: list[Future[Any]] = []
        at = {"line": 0, "character": 0}
        editor.open(uri, TEXT)
        for method in ("completion", "hover", "definition", "documentSymbol", "formatting"):
            options = {"tabSize": 2, "insertSpaces": True} if method == "formatting" else None
            given = {"textDocument": {"uri": missing}, "position": at, "options": options}
            with pytest.raises(JsonRpcInvalidParams, match=r"no document is open at .*missing.dfc"):
                await answer(method, **given)
        given = {"textDocument": {"uri": uri}, "position": at}
        with pytest.raises(JsonRpcInvalidParams, match=r"/completion` cannot be read: .*context"):
            await answer("completion", **given, context={"triggerKind": "often"})
        with pytest.raises(JsonRpcInvalidParams, match=r"/hover` cannot be read: .*position"):
            await answer("hover", textDocument={"uri": uri})
        start = t.CompletionParams(t.TextDocumentIdentifier(uri), t.Position(0, 0))
        assert await editor.text_document_completion_async(start) is not None  # and it goes on
        assert await editor.end() == 0

    with_editor(story)
