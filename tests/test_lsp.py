"""Editor help as plain functions: a text and a place give items, whatever the text looks like."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dfc.lsp.complete import complete, describe
from dfc.lsp.diagnose import MAX_TYPED, Problem, diagnose
from dfc.lsp.document import Document
from dfc.lsp.positions import Positions
from dfc.lsp.symbols import go_to, hover, outline
from dfc.lsp.where import where

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """dfc 1
import "std/simplify.dfc"

data calib
metric top1 on calib, higher is better

# A small device at the edge.
target edge {
  device gpu0 : cuda(mem=16GiB)
  device host : cpu(cores=8)
  link gpu0 <-> host : pcie(bw=25GB/s)
}

recipe small for edge {
  minimize latency(p50)
  require top1 >= baseline - 0.5pp
  require peak_memory(gpu0) <= 12GiB
  apply simplify
  q: fuse attention, norms except op(softmax) with limit=3
  when latency(q) > 20ms {
    revert q
  }
  verify each with samples=8
  emit onnx with opset=21
}
"""
RULE = """dfc 1
pattern scaled(x, s) = mul(x, s)

# Two scalings are one.
rule merge_scales(x, a, b) {
  match   y = scaled(scaled(x, a), b)
  where   constant(a) and constant(b)
  rewrite y = mul(x, mul!(a, b))
  within  1e-6
  applies x: f32[2, 3], a: f32[3], b: f32[3]
  refuses x: f32[2, 3], a: f32[3], b: f32[2, 1]
}
"""
GRAPH = """dfc 1
graph @f(%x: f32[2, 3]) -> (f32[2, 3]) {
  !w: f32[3] meta
  %a: f32[2, 3] = aten.mul.Tensor(%x, !w)
  %y: f32[2, 3] = aten.softmax.int(%a, dim=-1, dtype=None)
  return (%y)
}
"""


def marked(text: str) -> tuple[Document, int]:
    """A text with `|>` where the cursor is."""
    at = text.index("|>")
    return Document(text[:at] + text[at + 2 :]), at


def labels(text: str) -> list[str]:
    return [i.label for i in complete(*marked(text)).items]


def after(text: str, word: str, count: int = 1) -> int:
    """The offset just inside the count-th occurrence of a word."""
    at = -1
    for _ in range(count):
        at = text.index(word, at + 1)
    return at + 1


# Positions


@pytest.mark.parametrize(
    ("encoding", "columns"),
    [("utf-16", [0, 1, 3, 4, 5]), ("utf-8", [0, 1, 5, 7, 8]), ("utf-32", [0, 1, 2, 3, 4])],
)
def test_columns_count_what_the_client_counts(encoding: str, columns: list[int]) -> None:
    document = Document("ab\na😀éb\n")
    places = Positions(document.text, document.source.lines, encoding)
    for i, column in enumerate(columns):
        assert (places.place(3 + i).line, places.place(3 + i).column) == (1, column)
        assert places.offset(1, column) == 3 + i


def test_places_outside_of_the_text_are_moved_inside() -> None:
    document = Document("ab\nc😀")
    places = Positions(document.text, document.source.lines)
    assert [places.offset(*p) for p in [(-1, 5), (0, 99), (1, 99), (7, 0)]] == [0, 2, 5, 5]
    assert places.offset(1, 2) == 5  # between the halves of a character: behind it


def test_line_ends_of_windows_are_line_ends() -> None:
    document = Document("dfc 1\r\nrecipe a {\r\n  csee\r\n}\r\n")
    (problem,) = diagnose(document)
    place = Positions(document.text, document.source.lines).place(problem.start)
    assert (place.line, place.column) == (2, 2)


# Diagnostics


def codes(problems: list[Problem], text: str) -> list[tuple[str, str]]:
    return [(p.code, text[p.start : p.end]) for p in problems]


def test_every_error_has_its_range() -> None:
    text = "dfc 1\nrecipe a { # 😀\n  csee\n  cse with limt=3\n  keep if fastr\n}\n"
    found = codes(diagnose(Document(text)), text)
    assert found == [("Q001", "csee"), ("Q002", "limt"), ("Q013", "fastr")]


def test_a_text_without_errors_has_none() -> None:
    for text in (RECIPE, RULE, GRAPH):
        assert diagnose(Document(text)) == []


def test_syntax_rules_and_targets_are_checked_together() -> None:
    text = (
        RULE.replace("mul!(a, b)", "mul!(a, c)") + "target t {\n  device d : cdua\n}\nrecipe {\n}\n"
    )
    found = codes(diagnose(Document(text)), text)
    assert [c for c in found if c[0] != "P002"] == [("R003", "c"), ("Q013", "cdua")]
    assert [p for p in found if p[0] == "P002"] == [("P002", "{")]


def test_a_pass_that_may_be_the_users_own_is_a_warning() -> None:
    (problem,) = diagnose(Document("dfc 1\nrecipe a {\n  my_own_pass_xyz\n}\n"))
    assert problem.severity == "warning" and "dfc lsp imports no code" in problem.text


def test_an_error_of_an_imported_file_stands_at_the_import(tmp_path: Path) -> None:
    (tmp_path / "base.dfc").write_text("dfc 1\nrecipe base {\n  csee\n}\n")
    text = 'dfc 1\nimport "base.dfc"\nrecipe a {\n  apply base\n}\n'
    main = tmp_path / "main.dfc"
    main.write_text(text)
    (problem,) = diagnose(Document(text, str(main)))
    assert text[problem.start : problem.end] == 'import "base.dfc"'
    assert problem.related[0].line == 3 and "csee" in problem.message


def test_what_is_typed_is_nobody_elses_rule_set() -> None:
    for text in (RULE, RULE.replace("1e-6", "1e-5")):  # twice, changed: as when typing
        assert diagnose(Document(text, "rules_at_hand.dfc")) == []


def test_graph_text_is_parsed_and_verified() -> None:
    text = GRAPH.replace("aten.softmax.int(%a, ", "aten.softmax.int(%b, ")
    assert codes(diagnose(Document(text)), text)[0][1] == "%b"
    text = GRAPH.replace("%a: f32[2, 3]", "%a: f32[2, 4]")
    assert ("V021", "aten.mul.Tensor") in codes(diagnose(Document(text)), text)
    text = GRAPH.replace("softmax.int", "softmaxx.int")
    (problem,) = diagnose(Document(text))
    assert problem.help is not None and text[problem.start : problem.end] == "aten.softmaxx.int"


def test_large_graphs_are_checked_within_bounds() -> None:
    lines = [f"  %v{i + 1}: f32[2] = aten.neg.default(%v{i})" for i in range(MAX_TYPED + 1)]
    head = "dfc 1\ngraph @f(%v0: f32[2]) -> f32[2] {\n"
    text = head + "\n".join(lines) + f"\n  return %v{len(lines)}\n}}\n"
    (problem,) = diagnose(Document(text))
    assert problem.severity == "information" and "dfc check" in problem.message
    (problem,) = diagnose(Document("dfc 1\nrecipe a {\n" + "  cse\n" * 300_000))
    assert problem.severity == "information"


# Completion


@pytest.mark.parametrize(
    ("text", "some", "none"),
    [
        ("dfc 1\n|>", ["recipe", "rule", "import", "target"], ["cse", "match"]),
        ("dfc 1\nrecipe a {\n  |>\n}", ["cse", "fuse", "apply", "minimize", "when"], ["match"]),
        ("dfc 1\nrecipe a {\n  cs|>\n}", ["cse"], ["dce", "fuse"]),
        ("dfc 1\nrecipe a {\n  cse with |>\n}", ["limit"], ["cse", "rules"]),
        ("dfc 1\nrecipe a {\n  fuse norms with limit=3, |>\n}", ["skip"], ["limit", "cse"]),
        ("dfc 1\nrecipe a {\n  fuse |>\n}", ["attention", "norms", "on", "with"], ["by", "using"]),
        ("dfc 1\nrecipe a {\n  fuse norms on |>\n}", ["op", "param", "between"], ["attention"]),
        ("dfc 1\nrecipe a {\n  fuse norms on op(soft|>)\n}", ["softmax"], ["relu", "_softmax"]),
        ("dfc 1\nrecipe a {\n  apply rules(|>)\n}", ["attention", "fuse_rms_norm"], ["cse"]),
        ("dfc 1\nrecipe a {\n  apply |>\n}\nrecipe b {\n}\n", ["simplify", "rules", "b"], ["a"]),
        ("dfc 1\nrecipe a {\n  minimize |>\n}", ["latency", "size"], ["cse", "not"]),
        ("dfc 1\nrecipe a {\n  require latency(|>) < 2ms\n}", ["p50", "p95"], ["latency"]),
        ("dfc 1\nmetric m, lower is better\nrecipe a {\n  require |>\n}", ["m"], []),
        ("dfc 1\nrecipe a {\n  q: cse\n  dce\n  revert |>\n}", ["q", "dce"], ["cse"]),
        ("dfc 1\nrecipe a {\n  cse\n  keep if |>\n}", ["faster", "latency"], ["cse"]),
        ("dfc 1\nrecipe a {\n  verify |>", ["each", "end", "none"], ["on"]),
        ("dfc 1\nrecipe a {\n  emit onnx with |>", ["opset", "contrib"], []),
        ("dfc 1\nrecipe a for |> {\n}\ntarget t {\n}\n", ["t"], ["cse"]),
        ("dfc 1\ntarget t {\n  device a : |>\n}", ["cpu", "cuda"], []),
        ("dfc 1\ntarget t {\n  device a : cuda(mem=1GiB, |>)\n}", ["bw"], ["mem", "cores"]),
        ('dfc 1\nimport "|>"', ["std/simplify.dfc", "rules/norms.dfc"], []),
        ("dfc 1\nrule r(x) {\n  |>\n}", ["match", "where", "rewrite", "within"], ["cse"]),
        ("dfc 1\nrule r(x) {\n  match y = gel|>\n}", ["gelu"], ["gel", "relu"]),
        ("dfc 1\nrule r(x) {\n  match y = gelu(x, |>)\n}", ["approximate=", "x"], ["out="]),
        ("dfc 1\nrule r(x) {\n  match y = gelu(x)\n  where |>\n}", ["rank", "x"], ["gelu"]),
        ("dfc 1\nrule r(x) {\n  match y = gelu(x)\n  rewrite y = dfc.|>", ["dfc.linear_gelu"], []),
        ("dfc 1\nrule r(x) {\n  match y = gelu(x)\n  applies x: |>", ["f32", "bf16"], ["gelu"]),
        ("dfc 1\npattern sq(x) = mul(x, x)\nrule r(x) {\n  match y = s|>", ["sq"], []),
        (GRAPH.replace("aten.softmax.int", "aten.softm|>"), ["aten.softmax.int"], []),
        (GRAPH.replace("(%a, dim", "(%|>, dim"), ["%x", "%a"], []),
        (GRAPH.replace("%a, dim", "%a, |> dim"), ["dim=", "dtype="], []),
        ("dfc 1\n# recipe |>", [], ["recipe"]),
    ],
)  # fmt: skip
def test_completion_offers_what_fits(text: str, some: list[str], none: list[str]) -> None:
    found = labels(text)
    assert [x for x in some if x not in found] == []
    assert [x for x in none if x in found] == []


def test_completion_replaces_the_word_at_hand() -> None:
    document, at = marked("dfc 1\nrecipe a {\n  fold_ba|>\n}")
    found = complete(document, at)
    assert [i.text for i in found.items] == ["fold_batch_norm"]
    assert document.text[found.start : at] == "fold_ba"
    assert "BatchNorm" in describe(found.items[0].lookup) or "batch" in describe(
        found.items[0].lookup
    )


def test_long_answers_are_cut_and_say_so() -> None:
    document, at = marked("dfc 1\nrule r(x) {\n  match y = |>\n}")
    found = complete(document, at)
    assert not found.complete and len(found.items) == 200


def test_files_beside_this_one_may_be_imported(tmp_path: Path) -> None:
    (tmp_path / "other.dfc").write_text("dfc 1\n")
    document = Document('dfc 1\nimport "', str(tmp_path / "main.dfc"))
    assert "other.dfc" in [i.label for i in complete(document, len(document.text)).items]


# Meaning and declarations


@pytest.mark.parametrize(
    ("text", "word", "count", "says"),
    [
        (RECIPE, "fuse", 1, "Apply rewrite rules"),
        (RECIPE, "fuse", 1, "| `limit` | whole number or none |"),
        (RECIPE, "limit", 1, "option of `fuse`"),
        (RECIPE, "attention", 1, "rule set"),
        (RECIPE, "softmax", 1, "softmax.int(Tensor self, int dim"),
        (RECIPE, "peak_memory", 1, "The most bytes"),
        (RECIPE, "12GiB", 1, "12,884,901,888 bytes"),
        (RECIPE, "0.5pp", 1, "0.005"),
        (RECIPE, "edge", 2, "A small device at the edge."),
        (RECIPE, "simplify", 2, "recipe of simplify.dfc"),
        (RECIPE, "q)", 1, "label"),
        (RECIPE, "when", 1, "depend on a measurement"),
        (RULE, "scaled(scaled", 1, "pattern scaled(x, s) = mul(x, s)"),
        (RULE, "mul!", 1, "mul.Tensor(Tensor self, Tensor other)"),
        (RULE, "constant", 1, "known at compile time"),
        (RULE, "merge_scales", 1, "Two scalings are one."),
        (GRAPH, "%a,", 1, "%a: f32[2, 3] = aten.mul.Tensor(%x, !w)"),
        (GRAPH, "softmax", 1, "softmax.int(Tensor self, int dim"),
        (GRAPH, "!w)", 1, "!w: f32[3] meta"),
    ],
)
def test_hover_says_what_a_word_means(text: str, word: str, count: int, says: str) -> None:
    document = Document(text)
    found = hover(document, after(text, word, count))
    assert found is not None and says in found.text
    assert text[found.start : found.end].strip("%!") in text


@pytest.mark.parametrize(
    ("text", "word", "count", "to"),
    [
        (RECIPE, "edge", 3, "target edge"),
        (RECIPE, "gpu0", 3, "device gpu0"),
        (RECIPE, "top1", 2, "metric top1"),
        (RECIPE, "calib", 2, "data calib"),
        (RECIPE, "revert q", 1, ""),
        (RECIPE, "q)", 1, "q: fuse"),
        (RULE, "scaled(x, a)", 1, "pattern scaled"),
        (RULE, "a) and", 1, "rule merge_scales(x, a"),
        (RULE, "constant(b", 1, ""),
        (GRAPH, "%a,", 1, "%a: f32"),
        (GRAPH, "!w)", 1, "!w: f32"),
    ],
)
def test_go_to_definition_inside_the_text(text: str, word: str, count: int, to: str) -> None:
    document = Document(text)
    found = go_to(document, after(text, word, count))
    if not to:
        assert found == []
        return
    (target,) = found
    line = text.rfind("\n", 0, target.at[0]) + 1
    assert target.source is document.source
    assert text[line : target.at[1] + 6].strip().startswith(to)


def test_go_to_what_dfc_ships() -> None:
    document = Document(RECIPE)
    (preset,) = go_to(document, after(RECIPE, "simplify", 2))
    assert preset.source.file.endswith("simplify.dfc")
    assert preset.source.text[slice(*preset.at)] == "simplify"
    (file,) = go_to(document, after(RECIPE, '"std'))
    assert file.source.file.endswith("simplify.dfc")
    text = "dfc 1\nrecipe a {\n  apply rules(fuse_rms_norm)\n}\n"
    (rule,) = go_to(Document(text), after(text, "fuse_rms_norm"))
    assert rule.source.file.endswith("norms.dfc")
    assert rule.source.text[slice(*rule.at)] == "fuse_rms_norm"


def test_outline_nests_steps() -> None:
    found = outline(Document(RECIPE))
    assert [(o.name, o.kind) for o in found] == [
        ("std/simplify.dfc", "import"), ("calib", "data"), ("top1", "metric"), ("edge", "target"),
        ("small", "recipe"),
    ]  # fmt: skip
    steps = found[-1].inside
    assert [o.name for o in steps] == ["apply", "q", "when latency(q) > 20ms", "verify", "emit"]
    assert [o.name for o in steps[2].inside] == ["revert"]
    assert [o.name for o in outline(Document(RULE))] == ["scaled", "merge_scales"]
    assert [o.name for o in outline(Document(GRAPH))] == ["@f"]


# Whatever is typed


SHIPPED = sorted(ROOT.glob("passes/*/*.dfc"))[:3]
SAMPLES = [RECIPE, RULE, GRAPH, *(p.read_text() for p in SHIPPED)]
PIECES = [
    *'{}()["#=%@!😀\t\x00\u202e\ud800,\n|', "...", "~=",
    "with ", "rule ", "recipe ", "match ", 'import "',
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "rule r(x) {\n  }within  1e-6",
        "recipe a {\n  q: fuse norms except op(so}ftmax) with limit=3",
    ],
)
def test_a_stray_brace_does_not_stop_the_reader(text: str) -> None:
    assert diagnose(Document(f"dfc 1\n{text}")) != []


def ask_everything(document: Document, offset: int) -> None:
    complete(document, offset)
    hover(document, offset)
    go_to(document, offset)
    where(document, offset)


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_no_text_makes_it_fail(text: str) -> None:
    """Prefixes, as when a file is typed from its beginning, and random edits."""
    rng = random.Random(len(text))
    for _ in range(20):
        cut = rng.randrange(len(text) + 1)
        document = Document(text[:cut])
        ask_everything(document, cut)
        outline(document)
        edited = list(text)
        for _ in range(rng.randrange(1, 4)):
            i = rng.randrange(len(edited))
            edited[i : i + rng.randrange(3)] = [rng.choice(PIECES)]
        document = Document("".join(edited))
        problems = diagnose(document)
        ask_everything(document, rng.randrange(len(document.text) + 1))
        places = Positions(document.text, document.source.lines)
        for p in problems:
            assert 0 <= p.start <= p.end <= max(len(document.text), 1)
            assert places.place(p.start).line <= places.place(p.end).line
