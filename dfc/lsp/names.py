"""The names that a text and its imports declare, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from dfc.errors import DfcError
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.tokens import Token
from dfc.lsp.document import Document
from dfc.recipe.imports import File, Reader, std_files


@dataclass(frozen=True)
class Name:
    """A declaration: recipe, target, rule, pattern, metric, data, device, label, parameter."""

    kind: str
    name: str
    source: Source
    at: s.At  # of the name
    whole: s.At  # of all that is declared
    owner: str = ""


def files_of(document: Document) -> list[File]:
    """The text itself, then what it imports, then what dfc ships."""
    if document.is_graph or document.too_long:
        return []
    try:
        main = Reader().text(document.source)
    except DfcError:
        return []
    found = [main, *(f for f in main.all() if f is not main), *std_files()]
    return list({f.source.file: f for f in reversed(found)}.values())[::-1]


def declared(files: list[File]) -> list[Name]:
    return [n for f in files for e in f.document.entries for n in _of(e, f.source)]


def _of(e: s.Entry, source: Source) -> Iterator[Name]:
    if isinstance(e, s.Import):
        return
    if isinstance(e, s.Data):
        for w in e.names:
            yield Name("data", w.name, source, w.at, e.at)
        return
    kind = type(e).__name__.lower()
    yield Name(kind, e.name.name, source, e.name.at, e.at)
    if isinstance(e, s.Target):
        for p in e.parts:
            if isinstance(p, s.Device):
                yield Name("device", p.name.name, source, p.name.at, p.at, e.name.name)
    elif isinstance(e, s.Recipe):
        yield from _labels(e.body, source, e.name.name)
    elif isinstance(e, s.Rule):
        for w in e.params or ():
            yield Name("parameter", w.name, source, w.at, w.at, e.name.name)
        for c in e.clauses:
            if isinstance(c, s.Match | s.Rewrite):
                for w in c.names:
                    yield Name("value", w.name, source, w.at, c.at, e.name.name)
    elif isinstance(e, s.Pattern):
        for w in e.params:
            yield Name("parameter", w.name, source, w.at, w.at, e.name.name)


def _labels(body: tuple[s.Statement, ...], source: Source, owner: str) -> Iterator[Name]:
    for x in body:
        if isinstance(x, s.Step):
            w = x.label or x.verb
            yield Name("label", w.name, source, w.at, x.at, owner)
        elif isinstance(x, s.When):
            yield from _labels(x.then, source, owner)
            yield from _labels(x.otherwise, source, owner)


def statements_of(document: Document) -> Iterator[list[Token]]:
    """The tokens statement by statement; the head of a block is a statement of its own."""
    now: list[Token] = []
    for t in document.words:
        if t.type in ("_NL", "LBRACE", "RBRACE"):
            if now:
                yield now
            now = []
        else:
            now.append(t)
    if now:
        yield now


def labels(document: Document, offset: int, recipe: str) -> list[str]:
    """The labels, and the verbs that serve as such, of a recipe's steps before an offset.

    Taken from tokens, since the text around the offset need not parse.
    """
    found: dict[str, None] = {}
    mine = False
    for words in statements_of(document):
        if words[-1].end >= offset:
            break
        if words[0].text in _ENTRIES:
            mine = words[0].text == "recipe" and len(words) > 1 and words[1].text == recipe
        elif mine and words[0].type == "WORD" and words[0].text not in _NO_STEPS:
            found.setdefault(words[0].text)
    return list(found)


_ENTRIES = {"recipe", "rule", "target", "pattern", "data", "metric", "import"}
_NO_STEPS = {
    "minimize", "maximize", "require", "keep", "when", "apply", "verify", "emit", "revert", "else",
}  # fmt: skip


def rule_names(document: Document, rule: str, besides: int = -1) -> list[str]:
    """What the parameters, `match` and `rewrite` lines of a rule name.

    The word that begins at `besides` is left out: it is being typed.
    """
    found: dict[str, None] = {}
    mine = False
    for words in statements_of(document):
        if words[0].text in _ENTRIES:
            mine = words[0].text == "rule" and len(words) > 1 and words[1].text == rule
            words = words[1:]  # the rule's own name is none of its values
        if mine and words and (words[0].text in ("match", "rewrite") or words[0].text == rule):
            found |= dict.fromkeys(_values(words[1:], besides))
    return list(found)


def _values(words: list[Token], besides: int) -> Iterator[str]:
    """The words that are no op and no argument's name."""
    depth = 0
    for t, ahead in zip_longest(words, words[1:]):
        depth += (t.type in ("LPAR", "LSQB")) - (t.type in ("RPAR", "RSQB"))
        behind = ahead.type if ahead else ""
        if t.type != "WORD" or "." in t.text or behind in ("LPAR", "MARK") or t.start == besides:
            continue
        if not (behind == "EQUAL" and depth) and t.text != "_":
            yield t.text
