"""The colours of editors: the TextMate grammar, run by an engine, against the language itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dfc.ir.types import DTYPES
from dfc.lang.reader import _KEYWORDS, read_document
from dfc.lang.source import Source
from dfc.lang.tokens import tokenize
from dfc.lang.units import UNITS

onigurumacffi = pytest.importorskip("onigurumacffi")

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "editors" / "vscode"
GRAMMAR = json.loads((EXTENSION / "syntaxes" / "dfc.tmLanguage.json").read_text(encoding="utf-8"))
# Every keyword of the language where the grammar takes it as one.
SAMPLE = """dfc 1
import "std/simplify.dfc"
data calib, val
metric top1 on val, higher is better
metric loss, lower is better

target edge {
  device gpu0 : cuda(mem=16GiB)
  link gpu0 <-> host : pcie(bw=25GB/s)
}

recipe small for edge extends base {
  minimize latency(p50)
  maximize throughput
  require top1 >= baseline - 0.5pp
  quantize "a" on "b" by c to d from e into f except "g" using calib at h with x=1
  apply simplify
  verify each
  emit onnx
  when latency(q) > 2ms {
    revert q
  } else {
    keep q if faster
  }
}

pattern sq(x) = mul(x, x)
rule r(x, w) {
  match   y = gelu?(sq(x), ~=0.5, ...rest)
  where   rank(w) == 2 and dtype(x) in [f16, bf16] or not constant(w)
  rewrite y = dfc.linear_gelu(x, neg!(w))
  within  1e-3
  exact
  priority 2
  applies x: f32[4, 8], w=2
  refuses x: f32[4]
}
"""


@cache
def parser() -> Any:
    from textmate_grammar.parsers.base import LanguageParser

    return LanguageParser(GRAMMAR)


def scopes(text: str) -> dict[tuple[int, int], tuple[str, list[str]]]:
    """(line, column) -> the piece of text and its scopes."""
    found = parser().parse_string(text)
    assert found is not None
    return {place: (piece, names) for place, piece, names in found.flatten()}


def scope_of(text: str, word: str) -> str:
    """The scopes of the first piece that is this word."""
    return next((" ".join(s) for piece, s in scopes(text).values() if piece == word), "")


def patterns(x: Any) -> Iterator[str]:
    if isinstance(x, dict):
        yield from (x[k] for k in ("match", "begin", "end") if isinstance(x.get(k), str))
        x = [*x.values()]
    if isinstance(x, list):
        for i in x:
            yield from patterns(i)


def test_every_pattern_is_one_of_the_engines() -> None:
    found = list(patterns(GRAMMAR))
    assert len(found) > 30
    for pattern in found:
        onigurumacffi.compile(pattern)


def test_every_include_is_there() -> None:
    named = set(re.findall(r'"include": "#(\w+)"', json.dumps(GRAMMAR)))
    assert named == set(GRAMMAR["repository"])


def test_the_sample_is_in_the_language_and_has_every_keyword() -> None:
    assert read_document(Source(SAMPLE)).problems == ()
    words = {t.text for t in tokenize(Source(SAMPLE))[0] if t.type == "WORD"}
    assert set(_KEYWORDS) - words == set()


def test_every_keyword_has_a_keywords_colour() -> None:
    lines = SAMPLE.splitlines()
    plain = []
    for (line, column), (piece, names) in scopes(SAMPLE).items():
        assert lines[line][column : column + len(piece)] == piece
        if any(n.startswith("string.") for n in names):
            continue
        for word in re.findall(r"\w+", piece):
            own = piece == word or not piece.startswith("dfc.")  # an op of ours is no keyword
            if word in _KEYWORDS and own and not any(n.startswith("keyword.") for n in names):
                plain.append((line + 1, word))
    assert plain == []
    coloured = {p for p, s in scopes(SAMPLE).values() if any(n.startswith("keyword") for n in s)}
    assert set(_KEYWORDS) <= coloured


@pytest.mark.parametrize("unit", [u for u in UNITS if u])
def test_units_are_told_from_numbers(unit: str) -> None:
    assert scope_of(f"dfc 1\nrecipe a {{\n  require m <= 12{unit}\n}}\n", unit).endswith(
        "keyword.other.unit.dfc"
    )


def test_dtypes_have_a_types_colour() -> None:
    text = "dfc 1\nrule r(x) {\n" + "".join(f"  applies x: {d}[2]\n" for d in DTYPES) + "}\n"
    got = {p for p, s in scopes(text).values() if s[-1:] == ["storage.type.dfc"]}
    assert got == set(DTYPES)


@pytest.mark.parametrize(
    ("word", "scope"),
    [
        ("gelu", "entity.name.function.op"), ("dfc.linear_gelu", "entity.name.function.op"),
        ("?", "keyword.operator.mark"), ("...", "keyword.operator.rest"),
        ("small", "entity.name.function"), ("latency", "support.function.quantity"),
        ("baseline", "constant.language"), ("1e-3", "constant.numeric"),
        ("x", "variable.parameter"), ("<->", "keyword.operator.arrow"),
    ],
)  # fmt: skip
def test_parts_of_the_sample(word: str, scope: str) -> None:
    assert scope in scope_of(SAMPLE, word)


def test_strings_and_comments_end_where_they_end() -> None:
    text = 'dfc 1\nrecipe a {\n  cse on "a.**.b # no comment"  # rule\n  dce # "x\n  cse\n}\n'
    found = scopes(text)
    comments = [p for p, s in found.values() if s[-1:] == ["comment.line.number-sign.dfc"]]
    assert comments == ["# rule", '# "x']
    assert not any("string" in " ".join(s) for (line, _), (_, s) in found.items() if line > 2)


def test_graph_text_has_the_words_of_its_grammar() -> None:
    grammar = (ROOT / "dfc" / "lang" / "graph.lark").read_text(encoding="utf-8")
    found = re.findall(r"^_?[A-Z]+\.2: /\(?([a-z|A-Z]+)\)?\(", grammar, re.MULTILINE)
    words = {w for group in found for w in group.split("|")} - {"dfc"}
    assert {"where", "mutates", "binds", "stage", "loc", "meta", "buffer", "None"} <= words
    for word in sorted(words):
        behind = "(" if word in ("opaque", "complex") else " "
        text = f"dfc 1\ngraph @f(%x: f32[2]) -> f32[2] {{\n  %y {word}{behind}\n"
        assert re.search("keyword|constant|storage", scope_of(text, word)), word


def test_values_and_parameters_of_graphs_are_told_apart() -> None:
    text = (ROOT / "tests" / "language_sample.dfc").read_text(encoding="utf-8")
    assert "variable.other.value" in scope_of(text, "%mask")
    assert "variable.other.constant.parameter" in scope_of(text, "!embed.weight")
    assert "entity.name.function.op" in scope_of(text, "aten.embedding.default")
    assert "constant.other.hash" in scope_of(text, "sha256:" + "0" * 64)


def test_the_extension_names_files_that_are_there() -> None:
    package = json.loads((EXTENSION / "package.json").read_text(encoding="utf-8"))
    (language,), (grammar,) = (
        package["contributes"]["languages"],
        package["contributes"]["grammars"],
    )
    for path in (package["main"], language["configuration"], grammar["path"]):
        assert (EXTENSION / path).is_file(), path
    assert grammar["scopeName"] == GRAMMAR["scopeName"] and grammar["language"] == language["id"]
    json.loads((EXTENSION / language["configuration"]).read_text(encoding="utf-8"))


def test_the_readme_and_the_help_give_the_same_lines() -> None:
    """What `dfc lsp --help` and editors/README.md tell about Neovim and Helix is one text."""
    from dfc.cli.lsp import lsp

    readme = (ROOT / "editors" / "README.md").read_text(encoding="utf-8")
    told = [line.strip() for line in (lsp.__doc__ or "").splitlines()]
    for line in readme.splitlines():
        if line.startswith(("vim.", "command", "args", "[", "name =", "scope", "file-types")):
            assert line.strip() in told, line
