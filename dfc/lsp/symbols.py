"""What the word at a place stands for: its meaning, where it is declared, and a text's outline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.tokens import Token
from dfc.lsp import vocabulary as v
from dfc.lsp.document import Document
from dfc.lsp.graph_text import defining_line, definition, sign_at
from dfc.lsp.names import Name, declared, files_of
from dfc.lsp.where import Where, in_comment, where


@dataclass(frozen=True)
class Hover:
    """Markdown about the text from start to end."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Target:
    """A place to go to, in a file that may be the text itself; `whole` is all of it."""

    source: Source
    at: s.At
    whole: s.At


@dataclass(frozen=True)
class Outline:
    """A declaration for the list of symbols."""

    name: str
    kind: str
    detail: str
    at: s.At
    whole: s.At
    inside: tuple[Outline, ...] = ()


# Meaning


def hover(document: Document, offset: int) -> Hover | None:
    """What the word at an offset means; None where nothing is known."""
    if document.is_graph:
        return _graph_hover(document, offset)
    token = document.token_at(offset)
    if token is None or in_comment(document, offset):
        return None
    text = _meaning(document, token, where(document, token.start))
    return Hover(token.start, token.end, text) if text else None


def _graph_hover(document: Document, offset: int) -> Hover | None:
    sign = sign_at(document, offset)
    if sign is None:
        return None
    at = definition(document, sign)
    if at is not None:
        line = defining_line(document, at)
        return Hover(sign.start, sign.end, f"```dfc\n{line}\n```")
    info = v.op_info(sign.text) if "." in sign.text else None
    return Hover(sign.start, sign.end, info.text) if info else None


def _meaning(document: Document, token: Token, w: Where) -> str | None:
    if token.type == "NUMERAL":
        info = v.number_info(token.text)
        return info.text if info else None
    if token.type == "TEXT":
        return None
    name, called = token.text, _called(document, token)
    own = _own(document, token, w)
    if own is not None and own.kind not in ("label", "data"):
        return _declared_text(own)
    found = _of_place(document, name, w, called)
    if found is None and own is not None:
        found = _declared_text(own)
    return found


def _of_place(document: Document, name: str, w: Where, called: bool) -> str | None:
    """The meaning of a name by where it stands."""
    frame = w.frame.callee if w.frame else ""
    if w.block == "recipe":
        if not w.clause and (info := v.pass_info(name)):
            return info.text
        if w.part == "with" and not w.option and not w.frames and (o := _option(w.clause, name)):
            return o
        if _names_rules(w) and (info := v.rule_info(name)):
            return info.text
        if name in v.QUANTITIES and (called or not w.frames or frame in v.QUANTITIES):
            return f"**{name}** · quantity\n\n{v.QUANTITIES[name]}"
        if name in v.SELECTORS and called:
            return f"**{name}** · selector\n\n{v.SELECTORS[name]}"
        if frame == "op" and (info := v.op_info(name)):
            return info.text
    if w.block in ("rule", "top") and w.clause:
        if w.clause == "where" and called and name in v.CONDITIONS:
            return f"**{name}** · condition\n\n{v.CONDITIONS[name]}"
        if called and (info := v.op_info(name)):
            return info.text
        if called and name in v.CONDITIONS:
            return f"**{name}** · function\n\n{v.CONDITIONS[name]}"
        if frame and name in v.arguments_of(frame) and (info := v.op_info(frame)):
            return f"**{name}** · argument of `{frame}`\n\n{info.text}"
    if w.block == "target" and w.frames and name in v.DEVICE_FACTS:
        return f"**{name}** · {v.DEVICE_FACTS[name]}"
    word = v.keyword(name)
    return f"**{name}**\n\n{word.text}" if word else None


def _names_rules(w: Where) -> bool:
    """Whether a name may be a rule's or a set's: an operand of `fuse`, an argument of `rules`."""
    if w.frame is not None:
        return w.frame.callee == "rules" or not w.frame.callee
    return w.clause == "fuse"


def _option(verb: str, name: str) -> str | None:
    for o in v.options(verb):
        if o.name == name:
            default = f", `{o.default}` if not given" if o.default else ""
            return f"**{name}** · option of `{verb}` · {o.detail}{default}\n\n{o.text}"
    return None


def _called(document: Document, token: Token) -> bool:
    behind = document.text[token.end : token.end + 2].lstrip("?!")
    return behind.startswith("(")


def _declared_text(n: Name) -> str:
    body = n.source.text[n.whole[0] : n.whole[1]]
    lines = body.splitlines()
    if len(lines) > 40:
        body = "\n".join([*lines[:40], "..."])
    about = _comment_above(n.source.text, n.whole[0])
    place = f"{n.kind} of {Path(n.source.file).name}"
    return f"**{n.name}** · {place}\n\n{about}\n\n```dfc\n{body}\n```".replace("\n\n\n\n", "\n\n")


def _comment_above(text: str, at: int) -> str:
    """The comment lines that stand right above a declaration."""
    found: list[str] = []
    end = text.rfind("\n", 0, at)
    while end > 0 and len(found) < 20:
        start = text.rfind("\n", 0, end) + 1
        line = text[start:end].strip()
        if not line.startswith("#"):
            break
        found.insert(0, line.lstrip("# "))
        end = start - 1
    return " ".join(found)


# Where it is declared


def go_to(document: Document, offset: int) -> list[Target]:
    """Where the word at an offset is declared."""
    if document.is_graph:
        sign = sign_at(document, offset)
        at = definition(document, sign) if sign else None
        return [Target(document.source, at, at)] if at else []
    token = document.token_at(offset)
    if token is None or in_comment(document, offset):
        return []
    w = where(document, token.start)
    if token.type == "TEXT":
        return _imported(document, token, w)
    own = _own(document, token, w)
    if own is not None:
        return [Target(own.source, own.at, own.whole)]
    return _shipped_rule(token.text) if w.block == "recipe" and _names_rules(w) else []


def _imported(document: Document, token: Token, w: Where) -> list[Target]:
    if w.clause != "import":
        return []
    import json

    path = json.loads(token.text)
    for f in files_of(document):
        if f.source.file == path or f.source.file.endswith("/" + path):
            return [Target(f.source, (0, 0), (0, 0))]
    return []


def _own(document: Document, token: Token, w: Where) -> Name | None:
    """The declaration of a name in the text or in what it imports; the nearest scope first."""
    found = [n for n in declared(files_of(document)) if n.name == token.text]
    entry = w.entry
    if w.block == "top" and w.clause in ("pattern", "rule") and len(w.statement) > 1:
        entry = w.statement[1].text  # parameters, in the head itself
    inner = [n for n in found if n.owner == entry and n.source is document.source]
    outer = [n for n in found if not n.owner or n.kind == "device"]
    for kind in _kinds(document, token, w):
        for n in (*inner, *outer):
            if n.kind == kind:
                return n
    return None


def _kinds(document: Document, token: Token, w: Where) -> tuple[str, ...]:
    """What a name may stand for where it is, the likeliest first."""
    if w.block == "target":
        return ("device",)
    if w.block == "rule" or (w.block == "top" and w.clause in ("pattern", "rule")):
        if w.block == "top" and len(w.statement) == 1:  # the name after `rule` itself
            return (w.clause,)
        if not w.clause or _called(document, token):
            return ("pattern",)
        return ("parameter", "value", "pattern")
    if w.block == "recipe":
        if not w.clause or (w.part == "with" and not w.option):
            return ()
        measured = w.frame is not None and w.frame.callee in v.QUANTITIES
        if w.clause in ("revert", "keep") or measured:
            return ("label", "metric", "data", "device")
        return ("label", "metric", "data", "recipe", "rule", "device")
    return ("recipe", "target", "data", "rule", "pattern", "metric")


def _shipped_rule(name: str) -> list[Target]:
    from dfc.rewrite.rulesets import all_sets

    for set_name, rules in all_sets().items():
        if name == set_name:
            return [Target(rules.source, (0, 0), (0, 0))]
        for r in rules.rules:
            if name in (r.name, r.full_name):
                name_at = r.source.text.index(r.name, r.at[0] + len("rule"))
                return [Target(r.source, (name_at, name_at + len(r.name)), r.at)]
    return []


# Outline


def outline(document: Document) -> list[Outline]:
    """The declarations of a text, those inside others nested."""
    if document.is_graph:
        return _graph_outline(document)
    return [o for e in document.reading.document.entries for o in _outlined(e, document.source)]


def _outlined(e: s.Entry, source: Source) -> Iterator[Outline]:
    if isinstance(e, s.Import):
        yield Outline(e.path, "import", "", e.at, e.at)
    elif isinstance(e, s.Data):
        yield from (Outline(w.name, "data", "", w.at, w.at) for w in e.names)
    elif isinstance(e, s.Recipe):
        yield Outline(e.name.name, "recipe", "", e.name.at, e.at, tuple(_steps(e.body, source)))
    elif isinstance(e, s.Target):
        parts = tuple(
            Outline(p.name.name, "device", "", p.name.at, p.at)
            for p in e.parts
            if isinstance(p, s.Device)
        )
        yield Outline(e.name.name, "target", "", e.name.at, e.at, parts)
    else:
        kind = type(e).__name__.lower()
        detail = next((c.text for c in getattr(e, "clauses", ()) if isinstance(c, s.Doc)), "")
        yield Outline(e.name.name, kind, detail, e.name.at, e.at)


def _steps(body: tuple[s.Statement, ...], source: Source) -> Iterator[Outline]:
    for x in body:
        if isinstance(x, s.Step):
            w = x.label or x.verb
            line = source.text[x.at[0] : x.at[1]].partition("\n")[0]
            yield Outline(w.name, "step", line, w.at, x.at)
        elif isinstance(x, s.When):
            at = (x.at[0], x.condition.at[1])
            inside = (*_steps(x.then, source), *_steps(x.otherwise, source))
            name = source.text[at[0] : at[1]].partition("\n")[0]
            yield Outline(name, "when", "", at, x.at, inside)


def _graph_outline(document: Document) -> list[Outline]:
    import re

    found = []
    for hit in re.finditer(r"\bgraph\s+(@\w+)", document.text):
        found.append(Outline(hit[1], "graph", "", hit.span(1), hit.span()))
    return found[:1000]
