"""A file of recipes, targets and rules to syntax, with every error in it.

lark's LALR tables do the parsing, token by token. A statement that does not parse becomes an _ERROR
(grammar.lark says where one may stand) and reading goes on behind it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.builder import Builder, TooDeep
from dfc.lang.source import Source
from dfc.lang.tables import Reduction, tables
from dfc.lang.tokens import MAX_ERRORS, Token, statements, tokenize
from dfc.lang.units import UNITS

# The keywords: a word is one only where the tables take it.
_KEYWORDS = {
    word: word.upper() if word in given else f"_{word.upper()}"
    for given in (
        {"higher", "lower", "minimize", "maximize", "require", "on", "by", "to", "from", "into",
         "except", "using", "at", "exact", "applies", "refuses", "in"},
    )
    for word in given | {
        "import", "data", "metric", "target", "recipe", "rule", "pattern", "for", "extends", "is",
        "better", "device", "link", "keep", "if", "with", "when", "else", "match", "rewrite",
        "within", "priority", "and", "or", "not",
    }
}  # fmt: skip
_KEYWORDS["dfc"] = "_DOC_HEADER"
_KEYWORDS["where"] = "_WHERE_"
_ALSO = {"on": "_ON"}  # `on` of a metric leaves nothing behind, `on` of a step does
_WORD_OF = {terminal: word for word, terminal in _KEYWORDS.items()} | {"_ON": "on"}
_SIGN_OF = {
    "COMMA": ",", "LBRACE": "{", "RBRACE": "}", "COLON": ":", "LPAR": "(", "RPAR": ")",
    "EQUAL": "=", "LSQB": "[", "RSQB": "]", "BOTH_WAYS": "<->", "ONE_WAY": "->",
}  # fmt: skip
# What a statement looks like whose end has to be known by heart.
_PHRASES = ("except", "using", "by", "to", "on", "from", "into", "at", "keep")
_FORMS = {"metric": "`metric top1 on val, higher is better`"}


@dataclass(frozen=True)
class Reading:
    """What could be read of a text, and everything that is wrong with the rest.

    `tokens` are all of them, comments and line ends too; `kept` those that the parser reads;
    `tight` the offsets of tokens that cling to what follows: `f` of `f(x)`, `-` of `-x`.
    """

    document: s.Document
    problems: tuple[Diagnostic, ...]
    source: Source
    tokens: tuple[Token, ...]
    kept: tuple[Token, ...] = ()
    tight: frozenset[int] = frozenset()


@contextmanager
def many_objects() -> Iterator[None]:
    """Let no search for dead cycles begin: what a text becomes has none, and looking through it
    again and again, with all that torch holds, takes a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


# One expression is read as the requirement of a recipe.
_BEFORE = (
    ("WORD", "dfc"), ("NUMERAL", "1"), ("_NL", ""), ("WORD", "recipe"), ("WORD", "x"),
    ("LBRACE", "{"), ("_NL", ""), ("WORD", "require"),
)  # fmt: skip
_BEHIND = (("_NL", ""), ("RBRACE", "}"), ("_NL", ""))


def parse_expression(source: Source) -> s.Expr:
    """One expression alone, such as a selector.

    Raises:  DfcError P.
    """
    end = len(source.text)
    _, kept, problems = read_tokens(source)
    if problems:
        raise DfcError.of(problems)
    while kept and kept[-1].type == "_NL":
        kept.pop()
    before = [Token(type_, text, 0, 0) for type_, text in _BEFORE]
    behind = [Token(type_, text, end, end) for type_, text in _BEHIND]
    parser = _Parser(source, [*before, *kept, *behind])
    entries = parser.run().entries
    if parser.problems:
        raise DfcError.of(parser.problems)
    recipe = entries[0] if len(entries) == 1 else None
    body = recipe.body if isinstance(recipe, s.Recipe) else ()
    if len(body) != 1 or not isinstance(body[0], s.Goal):
        raise DfcError("P002", "one expression is wanted", span=source.span(0, end))
    return body[0].what


def read_document(source: Source) -> Reading:
    """Read as much as can be read; never raises for bad text."""
    with many_objects():
        return _read_document(source)


def _read_document(source: Source) -> Reading:
    if source.file.endswith(".py"):  # one error, not one for each of its lines
        return _python(source)
    tokens, kept, problems = read_tokens(source)
    if any(d.code in ("P004", "P007", "P009") for d in problems):
        return Reading(s.Document((0, 0), ()), tuple(problems), source, tuple(tokens))
    parser = _Parser(source, kept)
    document = parser.run()
    bad = {d.span.line for d in problems if d.span}  # one error a line is enough
    problems += [d for d in parser.problems if d.span is None or d.span.line not in bad]
    problems.sort(key=lambda d: (d.span.line, d.span.col) if d.span else (0, 0))
    tight = frozenset(parser.builder.tight)
    told = tuple(problems[:MAX_ERRORS])
    return Reading(document, told, source, tuple(tokens), tuple(kept), tight)


def _python(source: Source) -> Reading:
    message = "this is Python; rules, recipes and targets are text of dfc's own, in .dfc files"
    help = "models are `FILE.py:FUNCTION`, passes and ops of your own `--use FILE.py`"
    problem = Diagnostic("P003", message, source.span(0), help)
    return Reading(s.Document((0, 0), ()), (problem,), source, ())


def read_tokens(source: Source) -> tuple[list[Token], list[Token], list[Diagnostic]]:
    """All tokens, those that the parser reads, and what is wrong with them."""
    try:
        source.refuse_hidden()
    except DfcError as e:
        return [], [], [*e.diagnostics]
    tokens, problems = tokenize(source)
    if any(d.code == "P007" for d in problems):
        return tokens, [], problems
    kept, unmatched = statements(source, tokens)
    return tokens, kept, problems + unmatched


class _Parser:
    """Feeds tokens to lark's tables, and calls the builder for every rule that is complete.

    `states` is the stack of states, `values` what stands between them.
    """

    def __init__(self, source: Source, tokens: Sequence[Token]) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []
        self.builder = Builder(self._problem)
        self.tokens = self._with_header(list(tokens))
        self.tables = tables()
        self.callbacks = [self.builder.callback(rule) for rule in self.tables.rules]
        self.states = [self.tables.start]
        self.values: list[Any] = []

    def run(self) -> s.Document:
        try:
            return self._run()
        except TooDeep:
            return self._so_far()

    def _so_far(self) -> s.Document:
        return s.Document((0, len(self.source.text)), self.builder.entries(self.values))

    def _run(self) -> s.Document:
        i, stuck = 0, -1
        while i < len(self.tokens):
            token = self.tokens[i]
            if self._feed(token):
                i += 1
                continue
            self._report(token, i)
            if len(self.problems) > MAX_ERRORS:
                return self._so_far()
            start = self._start(i)
            if not self._recover((self.tokens[start].start, token.end)):
                return self._so_far()
            i = self._behind(start, i, i == stuck)
            stuck = i
        end = len(self.source.text)
        last = Token("$END", "", end, end)
        if not self._feed(last):
            self._report(last, i)
            return self._so_far()
        found = self.values[0]
        assert isinstance(found, s.Document)
        return found

    def _problem(self, code: str, message: str, at: s.At, help: str | None = None) -> None:
        self.problems.append(Diagnostic(code, message, self.source.span(*at), help))

    def _with_header(self, tokens: list[Token]) -> list[Token]:
        """The first line is `dfc 1`; a file without is read as if it were there."""
        first = [t for t in tokens[:3] if t.type != "_NL"]
        if len(first) > 1 and first[0].text == "dfc" and first[1].type == "NUMERAL":
            if first[1].text != "1":
                message = f"version {first[1].text} of the language; this dfc reads version 1"
                self._problem("P003", message, (first[1].start, first[1].end))
            return tokens
        self._problem("P003", "the first line is not `dfc 1`", (0, 1), "begin with `dfc 1`")
        given = [("WORD", "dfc"), ("NUMERAL", "1"), ("_NL", "")]
        return [*(Token(type_, text, 0, 0) for type_, text in given), *tokens]

    def _feed(self, token: Token) -> bool:
        """Take the token, as a keyword where one fits; False when it cannot come here."""
        known, states, values = self.tables, self.states, self.values
        type_ = token.type
        if type_ == "WORD" and token.text in _KEYWORDS:
            types = (_KEYWORDS[token.text], _ALSO.get(token.text, ""))
            type_ = next((t for t in types if t in known.actions[states[-1]]), type_)
            token = Token(type_, token.text, token.start, token.end)
        while True:
            found = known.actions[states[-1]].get(type_)
            if found is None:
                return False
            if not isinstance(found, Reduction):
                states.append(found)
                values.append(token)
                return True
            if found.alone:
                states[-1] = known.top(states[-2], states[-1], type_)
                continue
            low = len(values) - found.size
            taken = values[low:]
            del states[low + 1 :], values[low:]
            values.append(self.callbacks[found.rule](taken))
            states.append(known.gotos[states[-1]][found.origin])
            if type_ == "$END" and states[-1] == known.end:
                return True

    def _recover(self, at: s.At) -> bool:
        """Forget the statement at hand, down to where one may stand, and let _ERROR stand there."""
        while not self._takes("_ERROR"):
            if not self.values:
                return False
            self.states.pop()
            self.values.pop()
        return self._feed(Token("_ERROR", "", *at))

    def _start(self, i: int) -> int:
        """Where the statement of a token begins."""
        while i > 0 and self.tokens[i - 1].type != "_NL":
            i -= 1
        return i

    def _behind(self, start: int, i: int, stuck: bool) -> int:
        """The _NL that ends a broken statement and the block that hangs on it.

        A token where reading went on before, and could not, is `stuck`: it is left out.
        """
        if stuck:
            return i + 1
        depth = 0
        for j in range(start, len(self.tokens)):
            type_ = self.tokens[j].type
            depth += (type_ == "LBRACE") - (type_ == "RBRACE")
            if depth < 0 and j > i:
                return j
            depth = max(depth, 0)  # a bracket before the error has been read, or is the error
            if type_ == "_NL" and depth == 0 and j >= i:
                return j
        return len(self.tokens)

    def _report(self, token: Token, i: int) -> None:
        if token.type == "BAD":
            return  # the lexer has said so
        takes = self._expected()
        got = {"_NL": "end of line", "$END": "end of file"}.get(token.type, f"`{token.text}`")
        words = sorted(_WORD_OF[k] for k in takes if k in _WORD_OF)
        help = did_you_mean(token.text, words) if token.type == "WORD" else None
        before = {t.text for t in self.tokens[self._start(i) : i]}
        if token.text in _PHRASES and "with" in before:
            help = f"`{token.text}` and what it names stand before `with` and its options"
        if token.type == "TEXT" and takes & {"ON", "_ON"}:
            help = f"a part of the model is named so: `on {token.text}`"
        if takes == {"EQUAL"} and self.tokens[max(0, i - 2)].text == "with":
            given = self.tokens[i - 1].text
            help = f"`with` gives options, `with {given}=...`; or is `by {given}` meant?"
        help = help or _parted(self.tokens[max(0, i - 2) : i + 1])
        help = help or _FORMS.get(self.tokens[self._start(i)].text if i < len(self.tokens) else "")
        at = (token.start, max(token.end, token.start + 1))
        self._problem("P002", f"unexpected {got}; expected {_wanted(takes, words)}", at, help)

    def expected(self, offset: int) -> set[str]:
        """The terminals that may stand at an offset: what an editor offers there."""
        i, stuck = 0, -1
        while i < len(self.tokens) and self.tokens[i].end <= offset:
            token = self.tokens[i]
            behind = token.type == "_NL" and token.start >= offset
            if behind and i and self.tokens[i - 1].type != "LBRACE":
                break
            if self._feed(token):
                i += 1
                continue
            start = self._start(i)
            if not self._recover((self.tokens[start].start, token.end)):
                break
            i = self._behind(start, i, i == stuck)
            stuck = i
        return self._expected()

    def _takes(self, type_: str) -> bool:
        """Whether a terminal really fits: LALR lookaheads promise more than they hold."""
        known, stack = self.tables, self.states[-1:]
        below = len(self.states) - 1
        while True:
            found = known.actions[stack[-1]].get(type_)
            if found is None:
                return False
            if not isinstance(found, Reduction):
                return True
            for _ in range(found.size):
                stack.pop()
                if not stack:
                    below -= 1
                    stack.append(self.states[below])
            stack.append(known.gotos[stack[-1]][found.origin])
            if type_ == "$END" and stack[-1] == known.end:
                return True

    def _expected(self) -> set[str]:
        here = self.tables.actions[self.states[-1]]
        return {k for k in here if k != "_ERROR" and self._takes(k)}


def expected_at(source: Source, offset: int) -> set[str]:
    """What may stand at an offset: keywords (`match`), signs (`(`), or WORD, TEXT, NUMERAL."""
    kept, _ = statements(source, tokenize(source)[0])
    try:
        takes = _Parser(source, kept).expected(offset)
    except TooDeep:  # nothing is offered in what cannot be read
        takes = set()
    return {_WORD_OF.get(k, _SIGN_OF.get(k, k)) for k in takes}


def _parted(tokens: Sequence[Token]) -> str | None:
    """What to write where a blank parts a number from its unit, by the token that is unexpected
    and the two before it."""
    types, texts = [t.type for t in tokens], [t.text for t in tokens]
    number = ""
    if types[-2:] == ["NUMERAL", "WORD"]:
        unit = next((u for u in UNITS if u in (texts[-1], f"{texts[-1]}/s")), None)
        number = texts[-2] + unit if unit else ""
    elif types[:2] == ["NUMERAL", "REST"]:
        number = texts[0] + "%"
    elif types[-2:] == ["NUMERAL", "NUMERAL"] and len(texts[-1]) == 3 and texts[-1].isdecimal():
        number = "".join(texts[-2:])
    return f"write `{number}`: no blanks in a number with its unit" if number else None


def _wanted(takes: set[str], words: Sequence[str]) -> str:
    named = ["a name"] if "WORD" in takes else []
    named += [f"`{w}`" for w in words[: 8 - 3 * len(named)]]
    if "WORD" not in takes:
        kinds = {"TEXT": "a string", "NUMERAL": "a number"}
        named += [name for k, name in kinds.items() if k in takes]
    if len(named) < 6:
        named += [f"`{_SIGN_OF[k]}`" for k in sorted(takes & set(_SIGN_OF))]
    if takes & {"_NL", "$END"}:
        named.append("end of line")
    return " or ".join([*filter(None, [", ".join(named[:-1])]), *named[-1:]]) or "nothing"
