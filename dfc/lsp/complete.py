"""What may stand at a place: words with their meaning, those that fit what has been typed."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dfc.counting import counted
from dfc.ir.types import DTYPES
from dfc.lang.reader import expected_at
from dfc.lsp import vocabulary as v
from dfc.lsp.document import Document
from dfc.lsp.graph_text import complete_graph
from dfc.lsp.names import declared, files_of, labels, rule_names
from dfc.lsp.where import GOALS, PHRASES, Frame, Where, in_comment, where

MOST = 200  # items in an answer; the editor asks again when more has been typed


@dataclass(frozen=True)
class Item:
    """One proposal: what it is called, its kind, one line, what is inserted, and its meaning."""

    label: str
    kind: str
    detail: str = ""
    insert: str = ""
    lookup: str = ""  # what `describe` is asked for its full text

    @property
    def text(self) -> str:
        return self.insert or self.label


@dataclass(frozen=True)
class Completion:
    """Items for the text from start to the place; `complete` is False when some were left out."""

    items: tuple[Item, ...]
    start: int
    complete: bool = True


def complete(document: Document, offset: int) -> Completion:
    """What may stand at an offset; nothing inside comments. Never raises for bad text."""
    if document.too_long:
        return Completion((), offset)
    if document.is_graph:
        start, items = complete_graph(document, offset)
        return _fitting(document.text[start:offset], start, (Item(*i) for i in items))
    if in_comment(document, offset):
        return Completion((), offset)
    w = where(document, offset)
    if w.in_string:
        return _fitting(w.prefix, w.start + 1, _strings(document, w))
    return _fitting(w.prefix, w.start, _Offer(document, w).items())


def _fitting(prefix: str, start: int, items: Iterable[Item]) -> Completion:
    """Those that begin with what was typed, then those that hold it; each label once."""
    typed = prefix.lower()
    known = list({i.label: i for i in items}.values())
    begin = [i for i in known if i.label.lower().startswith(typed)]
    hold = [i for i in known if typed in i.label.lower() and i not in begin] if typed else []
    found = [*begin, *hold]
    return Completion(tuple(found[:MOST]), start, len(found) <= MOST)


def describe(lookup: str) -> str:
    """The full text of an item, in Markdown."""
    kind, _, name = lookup.partition(":")
    finders: dict[str, Callable[[str], v.Info | None]] = {
        "pass": v.pass_info, "op": v.op_info, "rule": v.rule_info, "keyword": v.keyword,
    }  # fmt: skip
    found = finders[kind](name) if kind in finders else None
    return found.text if found else ""


def _strings(document: Document, w: Where) -> Iterator[Item]:
    """Inside quotes: the files that `import` reaches."""
    if w.block != "top" or w.clause != "import":
        return
    from dfc.recipe.imports import rules_folder, std_folder

    for head, folder in (("std", std_folder()), ("rules", rules_folder())):
        for p in sorted(folder.glob("*.dfc")):
            yield Item(f"{head}/{p.name}", "file", "shipped with dfc")
    own = Path(document.file)
    if own.parent.is_dir() and own.is_absolute():
        for p in sorted(own.parent.glob("*.dfc"))[:MOST]:
            if p != own:
                yield Item(p.name, "file", "beside this file")


class _Offer:
    """The items for one place, by where it is."""

    def __init__(self, document: Document, w: Where) -> None:
        self.document, self.w = document, w
        self.expected = expected_at(document.source, w.start)
        self._names = None

    @property
    def word(self) -> bool:
        """Whether a name may stand here."""
        return "WORD" in self.expected

    def items(self) -> Iterator[Item]:
        """What is particular to the place first, then the words of the grammar."""
        if self.word:
            yield from self._particular()
        yield from self._keywords()

    def _particular(self) -> Iterator[Item]:
        w = self.w
        if w.block == "target":
            yield from self._target()
        elif w.block == "rule" or (w.block == "top" and w.clause == "pattern"):
            yield from self._rule()
        elif w.block == "recipe":
            yield from self._recipe()
        else:
            yield from self._top()

    def declared(self, *kinds: str) -> list[str]:
        files = files_of(self.document)
        return list(dict.fromkeys(n.name for n in declared(files) if n.kind in kinds))

    # Keywords

    def _keywords(self) -> Iterator[Item]:
        w = self.w
        if w.frames and w.block != "rule":
            return
        taken = self._phrases() if w.block == "recipe" and w.clause else None
        for name in sorted(self.expected):
            info = v.keyword(name)
            if info is None or not name.isidentifier():
                continue
            if name in PHRASES and w.block == "recipe" and taken is not None and name not in taken:
                continue
            if name in ("and", "or", "in", "not") and not self._in_condition():
                continue
            yield Item(name, "keyword", info.detail, _SNIPPETS.get(name, ""), f"keyword:{name}")

    def _in_condition(self) -> bool:
        """Whether words of conditions are worth offering; a selector offers its own."""
        return self.w.block == "rule" and self.w.clause == "where"

    def _phrases(self) -> set[str] | None:
        """The phrase words that the verb at hand takes."""
        from dfc.rewrite.pass_ import pass_classes

        if self.w.clause == "apply":
            return {"on", "except"}
        if self.w.clause in ("verify", "emit", "revert", "keep"):
            return set()
        cls = pass_classes().get(self.w.clause)
        return set(cls.phrases) if cls else None

    # Top

    def _top(self) -> Iterator[Item]:
        w, last = self.w, self.w.before
        word = last.text if last else ""
        if w.clause == "recipe" and word == "for":
            yield from (Item(n, "target") for n in self.declared("target"))
        elif w.clause == "recipe" and (word == "extends" or w.part == "extends" or word == ","):
            yield from self._recipes()
        elif w.clause == "metric" and word == "on":
            yield from (Item(n, "data") for n in self.declared("data"))

    def _recipes(self) -> Iterator[Item]:
        for n in declared(files_of(self.document)):
            if n.kind == "recipe" and n.name != self.w.entry:
                yield Item(n.name, "recipe", f"recipe of {Path(n.source.file).name}")

    # Recipes

    def _recipe(self) -> Iterator[Item]:
        w = self.w
        if not w.clause:
            yield from self._verbs()
        elif w.clause in (*GOALS, "when") or w.part == "if":
            yield from self._quantities()
        elif w.clause in ("keep", "revert"):
            yield from self._labels()
        elif w.part == "with":
            yield from self._with()
        elif w.clause == "apply":
            yield from self._apply()
        elif w.clause == "verify":
            yield from _words("each", "end", "none")
        elif w.clause == "emit":
            yield from (Item(n, "value") for n in v.emitted())
        else:
            yield from self._operands()

    def _verbs(self) -> Iterator[Item]:
        from dfc.rewrite.pass_ import pass_classes

        for name in sorted(pass_classes()):
            info = v.pass_info(name)
            yield Item(name, "pass", info.detail if info else "", "", f"pass:{name}")
        for name in ("apply", "verify", "emit", "revert"):
            info = v.keyword(name)
            yield Item(name, "keyword", info.detail if info else "", "", f"keyword:{name}")

    def _labels(self) -> Iterator[Item]:
        for n in labels(self.document, self.w.start, self.w.entry):
            yield Item(n, "label", "a step before this")

    def _apply(self) -> Iterator[Item]:
        frame = self.w.frame
        if frame is not None and frame.callee == "rules":
            yield from self._rule_sets()
        elif self.w.part in ("on", "except"):
            yield from self._selector(frame)
        else:
            yield from self._recipes()
            yield Item("rules", "keyword", v.KEYWORDS["rules"], "rules(", "keyword:rules")

    def _rule_sets(self) -> Iterator[Item]:
        from dfc.rewrite.rulesets import all_sets

        for n in self.declared("rule"):
            yield Item(n, "rule", "a rule of this file or its imports")
        for name, rules in all_sets().items():
            yield Item(name, "rule set", f"{counted(len(rules.rules), 'rule')}", "", f"rule:{name}")
            for r in rules.rules:
                yield Item(r.name, "rule", r.doc.partition("\n")[0], "", f"rule:{r.full_name}")

    def _with(self) -> Iterator[Item]:
        w = self.w
        if w.option:
            yield from self._value(w.clause, w.option)
            return
        if w.frames:
            return
        for o in v.options(w.clause):
            if o.name not in w.given:
                default = f", {o.default} if not given" if o.default else ""
                detail = f"{o.detail}{default}"
                yield Item(o.name, "option", detail, f"{o.name}=")

    def _operands(self) -> Iterator[Item]:
        """The operands of a pass and of its phrases, by the type of the field that they fill."""
        from dfc.rewrite.pass_ import pass_classes

        cls = pass_classes().get(self.w.clause)
        field = cls.phrases.get(self.w.part) if cls else None
        if cls is not None and field is not None:
            yield from self._value(cls.name, field)

    def _value(self, verb: str, option: str) -> Iterator[Item]:
        hint = next((o.hint for o in v.options(verb) if o.name == option), None)
        frame = self.w.frame
        if verb == "fuse" and option == "rules":
            yield from self._rule_sets()
            return
        if _mentions(hint, "Selector"):
            yield from self._selector(frame)
            return
        if frame is None and self.w.part == "with":
            for name in ("tune", "auto"):
                info = v.keyword(name)
                insert = "tune(" if name == "tune" else ""
                yield Item(name, "keyword", info.detail if info else "", insert, f"keyword:{name}")
        yield from self._values_of(hint)

    def _values_of(self, hint: object) -> Iterator[Item]:
        from dfc.ir.types import DType
        from dfc.rewrite.pass_ import Data

        inside = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            yield from _words(*map(str, inside))
        elif hint is bool:
            yield from _words("yes", "no")
        elif hint is type(None):
            yield from _words("none")
        elif hint is DType:
            yield from _dtypes()
        elif hint is Data:
            yield from (Item(n, "data") for n in self.declared("data"))
        else:
            for h in inside:
                yield from self._values_of(h)

    def _selector(self, frame: Frame | None) -> Iterator[Item]:
        callee = frame.callee if frame else ""
        if callee == "op":
            yield from _ops(self.w.prefix)
        elif callee == "dtype":
            yield from _dtypes()
        elif callee not in v.SELECTORS:
            for name, text in v.SELECTORS.items():
                yield Item(name, "function", text, f"{name}(")
            yield Item("not", "keyword", v.KEYWORDS["not"])

    def _quantities(self) -> Iterator[Item]:
        frame, part = self.w.frame, self.w.part
        if frame is not None and frame.callee:
            if frame.callee == "latency":
                yield from (Item(n, "value", v.QUANTITIES[n]) for n in ("p50", "p95", "p99"))
            if frame.callee == "peak_memory":
                yield from (Item(n, "device") for n in self.declared("device"))
            yield from self._labels()
            return
        for name in ("latency", "throughput", "size", "peak_memory", "error"):
            yield Item(name, "quantity", v.QUANTITIES[name])
        yield from (Item(n, "metric", "a metric") for n in self.declared("metric"))
        yield from _words("baseline", "before")
        if part == "if":
            yield from _words("faster", "smaller")

    # Targets

    def _target(self) -> Iterator[Item]:
        from dfc.recipe.targets import DEVICES, LINK

        w, frame, last = self.w, self.w.frame, self.w.before
        if frame is not None:
            facts = [*DEVICES.get(frame.callee, {})] if w.clause == "device" else [*LINK]
            if frame.keyword:
                yield from _dtypes() if frame.keyword == "dtypes" else ()
                return
            for name in [*facts, *(["dtypes"] if w.clause == "device" else [])]:
                if name not in frame.given:
                    yield Item(name, "option", v.DEVICE_FACTS.get(name, ""), f"{name}=")
        elif last is not None and last.type == "COLON":
            if w.clause == "device":
                yield from (Item(n, "value", "a kind of device", f"{n}(") for n in DEVICES)
            else:
                yield from (Item(n, "value", "a kind of link", f"{n}(") for n in _LINKS)
        elif w.clause == "link":
            yield from (Item(n, "device") for n in self.declared("device"))

    # Rules

    def _rule(self) -> Iterator[Item]:
        w = self.w
        if not w.clause:
            return
        names = rule_names(self.document, w.entry, w.start) if w.block == "rule" else self._params()
        if w.clause == "where":
            yield from _conditions()
            yield from (Item(n, "value", "a name of this rule") for n in names)
            yield from _constants()
        elif w.clause in ("match", "rewrite", "pattern"):
            yield from self._pattern(names)
        elif w.clause in ("applies", "refuses"):
            yield from self._sample(names)

    def _params(self) -> list[str]:
        """The parameters of the pattern at hand."""
        found = []
        for t in self.w.statement[2:]:
            if t.type == "RPAR":
                break
            if t.type == "WORD":
                found.append(t.text)
        return found

    def _pattern(self, names: list[str]) -> Iterator[Item]:
        frame = self.w.frame
        yield from (Item(n, "value", "a name of this rule") for n in names)
        if frame is not None and frame.callee:
            for a in v.arguments_of(frame.callee):
                if a not in frame.given:
                    detail = f"argument of {frame.callee}"
                    yield Item(f"{a}=", "option", detail, "", f"op:{frame.callee}")
        yield from (Item(n, "pattern", "a pattern", f"{n}(") for n in self.declared("pattern"))
        if self.w.clause == "rewrite":
            yield from _conditions()
        yield from _constants()
        yield from _ops(self.w.prefix)

    def _sample(self, names: list[str]) -> Iterator[Item]:
        last = self.w.before
        if last is not None and last.type == "COLON":
            yield from _dtypes("[")
        elif last is not None and last.type == "RSQB":
            yield from _words("constant")
        else:
            yield from (Item(n, "value", "a name of this rule", f"{n}: ") for n in names)


_LINKS = ("pcie", "nvlink", "ethernet", "infiniband", "memory")
_SNIPPETS = {"keep": "keep if ", "when": "when ", "import": "import ", "require": "require "}


def _mentions(hint: object, name: str) -> bool:
    return name in str(hint)


def _words(*names: str) -> Iterator[Item]:
    for name in names:
        info = v.keyword(name)
        lookup = f"keyword:{name}" if info else ""
        yield Item(name, "value", info.detail if info else "", "", lookup)


def _dtypes(behind: str = "") -> Iterator[Item]:
    for name in DTYPES:
        yield Item(name, "type", "dtype", f"{name}{behind}" if behind else "")


def _ops(prefix: str = "") -> Iterator[Item]:
    full = prefix.startswith("aten.")
    for name in v.op_names() if full else v.op_bases():
        if full or prefix.startswith("_") or not v.is_internal(name):
            yield Item(name, "op", "op", "", f"op:{name}")


def _conditions() -> Iterator[Item]:
    for name, text in v.CONDITIONS.items():
        yield Item(name, "function", text, f"{name}(")


def _constants() -> Iterator[Item]:
    from dfc.rewrite.rule import CONSTANTS

    for name in CONSTANTS:
        yield Item(name, "value", "constant")
