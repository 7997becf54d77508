"""Hostile text: bounded work and a clear error, never a crash.

Source:  the attacks of CVE-2021-42574 (hidden text), billion laughs, what broke this reader once.
"""
# ruff: noqa: E501 - attacks are easier to read in one line each

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lark.lexer import LexerThread

import dfc
import dfc.passes
from dfc.cli.steps import parse_steps
from dfc.errors import DfcError, Diagnostic
from dfc.lang.format import format_text
from dfc.lang.graph_parser import parse_graph
from dfc.lang.reader import expected_at, read_document
from dfc.lang.selectors import parse_selector
from dfc.lang.source import Source
from dfc.lang.tokens import MAX_TOKENS, grammar, tokenize
from dfc.passes.fuse import Fuse
from dfc.recipe.resolve import check_source, resolve_all
from dfc.rewrite.deciding import Facts
from dfc.rewrite.match import Matcher
from dfc.rewrite.pass_ import Context
from dfc.rewrite.read_rules import read_rules, rules_of
from dfc.rewrite.rulesets import instead
from tests.random_documents import random_document

HERE = Path(__file__).parent
N = 100_000


def recipe(b: str) -> str:
    return "dfc 1\nrecipe r {\n" + b + "\n}\n"


def rule(m: str, rest: str = "rewrite y = relu(x)\nexact") -> str:
    return f"dfc 1\nrule a {{\nmatch y = {m}\n{rest}\n}}\n"


ATTACKS: dict[str, str] = {}
for o in "([{":
    ATTACKS["open" + o] = "dfc 1\n" + o * N
    ATTACKS["ropen" + o] = recipe("cse with limit=" + o * N)
for o in ")]}":
    ATTACKS["close" + o] = "dfc 1\n" + o * N
ATTACKS["minus"] = recipe("require " + "-" * N + "1 < 2")
ATTACKS["minus_sp"] = recipe("require " + "- " * N + "1 < 2")
ATTACKS["not"] = recipe("require " + "not " * N + "a")
ATTACKS["approx"] = rule("~=" * 40000 + "x")
for op in ("|", "&", "+", "and", "or", "*"):
    ATTACKS["chain" + op] = recipe("fuse on " + f" {op} ".join(['"a"'] * 49000))
    ATTACKS["wchain" + op] = recipe("when " + f" {op} ".join(["size"] * 49000) + " > 3 { dce }")
ATTACKS["rchain"] = rule("relu(x)" + " | relu(x)" * 15000)
ATTACKS["where"] = rule(
    "relu(x)", "where " + " and ".join(["rank(x) == 2"] * 12000) + "\nrewrite y = relu(x)\nexact"
)
ATTACKS["whereadd"] = rule(
    "relu(x)", "where " + " + ".join(["rank(x)"] * 20000) + " == 2\nrewrite y = relu(x)\nexact"
)
ATTACKS["unknownops"] = "dfc 1\n" + "".join(
    f"rule a{i} {{ match y = rellu{i}(x)\nrewrite y = gellu{i}(x)\nexact }}\n" for i in range(5000)
)
ATTACKS["unknownfn"] = "dfc 1\n" + "".join(
    f"rule a{i} {{ match y = relu(x)\nwhere rnk(x) == 2\nrewrite y = relu(x)\nexact }}\n"
    for i in range(3500)
)
ATTACKS["rules"] = "dfc 1\n" + "".join(
    f"rule a{i} {{ match y = relu(x)\nrewrite y = relu(x)\nexact }}\n" for i in range(4300)
)
ATTACKS["patterns"] = (
    "dfc 1\n"
    + "".join(
        f"pattern p{i}(x) = add(p{i - 1}(x), p{i - 1}(x))\n" if i else "pattern p0(x) = relu(x)\n"
        for i in range(3000)
    )
    + "rule a { match y = p2999(x)\nrewrite y = relu(x)\nexact }\n"
)
ATTACKS["patchain"] = (
    "dfc 1\n"
    + "".join(
        f"pattern p{i}(x) = relu(p{i - 1}(x))\n" if i else "pattern p0(x) = relu(x)\n"
        for i in range(3000)
    )
    + "rule a { match y = p2999(x)\nrewrite y = relu(x)\nexact }\n"
)
ATTACKS["patnest"] = (
    "dfc 1\npattern p(x) = "
    + "relu(" * 60
    + "x"
    + ")" * 60
    + "\nrule a { match y = "
    + "p(" * 60
    + "x"
    + ")" * 60
    + "\nrewrite y = relu(x)\nexact }\n"
)
ATTACKS["params"] = (
    "dfc 1\nrule a("
    + ",".join(f"x{i}" for i in range(40000))
    + ") { match y = relu(x)\nrewrite y = relu(x)\nexact }\n"
)
ATTACKS["matches"] = (
    "dfc 1\nrule a { "
    + "\n".join(f"match y{i} = relu(x{i})" for i in range(9000))
    + "\nrewrite y0 = relu(x)\nexact }\n"
)
ATTACKS["args"] = rule("cat([" + ",".join(f"x{i}" for i in range(45000)) + "])")
ATTACKS["samples"] = rule("relu(x)", "rewrite y = relu(x)\nexact\n" + "applies x: f32[2]\n" * 10000)
ATTACKS["badwords"] = recipe("csee\n" * 49000)
ATTACKS["badwords2"] = recipe("a b c d\n" * 24000)
ATTACKS["badlines"] = "dfc 1\n" + "x\n" * 49000
ATTACKS["longword"] = recipe("a" * 500000)
ATTACKS["longtext"] = recipe('"' + "a" * 500000 + '"')
ATTACKS["longnum"] = recipe("cse with limit=" + "9" * 1000000)
ATTACKS["exp"] = recipe("cse with limit=1e" + "9" * 100000)
ATTACKS["frac"] = recipe("cse with limit=0." + "9" * 1000000)
ATTACKS["unit"] = recipe("cse with limit=1" + "a" * 1000000)
ATTACKS["unclosed"] = recipe('"' + "a" * 1000000)
ATTACKS["quotes"] = recipe('"' * 99999)
ATTACKS["backslash"] = recipe('"' + "\\" * 1000000 + '"')
ATTACKS["backslash1"] = recipe('"' + "\\" * 999999)
ATTACKS["comment"] = "dfc 1\n#" + "a" * 1000000
ATTACKS["comments"] = "dfc 1\n" + "#\n" * 500000
ATTACKS["blank"] = "dfc 1\n" + "\n" * 1000000
ATTACKS["spaces"] = "dfc 1" + " " * 1000000
ATTACKS["tabs"] = "dfc 1\n" + "\t" * 1000000
ATTACKS["cr"] = "dfc 1\r" * 100000
ATTACKS["commas"] = recipe("data " + "," * N)
ATTACKS["dots"] = recipe("a" + "." * N)
ATTACKS["dotted"] = recipe("a" + ".a" * 120)
ATTACKS["labels"] = recipe("\n".join(f"q{i}: cse" for i in range(12000)))
ATTACKS["same"] = recipe("q: cse\n" * 12000)
ATTACKS["when"] = recipe("when size > 3MiB {\n" * 60 + "dce\n" + "}\n" * 60)
ATTACKS["whenwide"] = recipe("when size > 3MiB { dce }\n" * 900)
ATTACKS["whenelse"] = recipe("when size > 3MiB { dce } else { dce }\n" * 400)
ATTACKS["applywide"] = recipe("apply " + ",".join(["simplify"] * 40000))
ATTACKS["fan"] = "dfc 1\nrecipe r0 { dce }\n" + "".join(
    f"recipe r{i} {{\n" + f"apply r{i - 1}\n" * 30 + "}\n" for i in range(1, 15)
)
ATTACKS["many"] = "dfc 1\n" + "recipe r { }\n" * 20000
ATTACKS["many2"] = "dfc 1\n" + "".join(f"recipe r{i} {{ dce }}\n" for i in range(14000))
ATTACKS["extends"] = "dfc 1\n" + "".join(
    f"recipe r{i} extends r{i + 1} {{ }}\n" for i in range(10000)
)
ATTACKS["extendswide"] = (
    "dfc 1\nrecipe a { dce }\nrecipe r extends " + ",".join(["a"] * 40000) + " { }\n"
)
ATTACKS["targets"] = (
    "dfc 1\n"
    + "".join(f"target t{i} {{ device a : cpu() }}\n" for i in range(8000))
    + "recipe r {}\n"
    + "".join(f"recipe r{i} {{ }}\n" for i in range(3000))
)
ATTACKS["devices"] = (
    "dfc 1\ntarget t {\n" + "".join(f"device a{i} : cpu()\n" for i in range(12000)) + "}\n"
)
ATTACKS["links"] = "dfc 1\ntarget t {\ndevice a : cpu()\n" + "link a -> b : pcie()\n" * 9000 + "}\n"
ATTACKS["metrics"] = (
    "dfc 1\n"
    + "".join(f"metric m{i}, higher is better\n" for i in range(12000))
    + "".join(f"recipe r{i} {{ }}\n" for i in range(2000))
)
ATTACKS["data"] = (
    "dfc 1\ndata " + ",".join(f"d{i}" for i in range(45000)) + "\nrecipe r { fuse using d1 }"
)
ATTACKS["datamany"] = (
    "dfc 1\ndata "
    + ",".join(f"d{i}" for i in range(40000))
    + "\n"
    + "".join(f"recipe r{i} {{ }}\n" for i in range(3000))
)
ATTACKS["dupdata"] = "dfc 1\ndata " + ",".join(["d"] * 45000)
ATTACKS["imports"] = "dfc 1\n" + 'import "a.dfc"\n' * 40000
ATTACKS["importlong"] = 'dfc 1\nimport "' + "a" * 60000 + '.dfc"\n'
ATTACKS["tune"] = recipe("cse with limit=tune(" + ",".join(map(str, range(45000))) + ")")
ATTACKS["opts"] = recipe("cse with " + ",".join(f"limit{i}=3" for i in range(24000)))
ATTACKS["rulesargs"] = recipe("apply rules(" + ",".join(f"n{i}" for i in range(45000)) + ")")
ATTACKS["selop"] = recipe("fuse on " + ",".join(['"a"'] * 45000))
ATTACKS["exceptmany"] = recipe("fuse " + 'except "a" ' * 24000)
ATTACKS["docs"] = recipe('"x"\n' * 45000)
ATTACKS["goals"] = recipe("minimize latency\n" * 24000)
ATTACKS["reqs"] = recipe("require size <= 3MiB\n" * 16000)
ATTACKS["barlines"] = recipe('fuse on "a"\n' + "\n" * 40 + "| " + '"b"')
ATTACKS["mixed"] = recipe("cse\n# c\n\n" * 24000)
ATTACKS["unbalanced"] = recipe("cse (\n" * 24000)
ATTACKS["unbal2"] = recipe("cse with limit=[\ncse\n" * 12000)
for c in "\x00\ufeff\u202e\u200b\ud800\x1b\x0b\u2028":
    ATTACKS[f"char{ord(c):x}"] = recipe(f"cse # {c}")
    ATTACKS[f"charm{ord(c):x}"] = recipe(c * 100000)
ATTACKS["empty"] = ""
ATTACKS["hdr"] = "dfc"
ATTACKS["hdr2"] = "dfc 1"
ATTACKS["hdr3"] = "dfc 1 1\n"
ATTACKS["hdr4"] = "dfc " + "9" * 100000
ATTACKS["homoglyph"] = recipe("сse")
ATTACKS["nfkc"] = recipe("ﬁx")


READERS: dict[str, Callable[[str], object]] = {
    "check": lambda text: _checked(check_source(Source(text, "t.dfc"))[0]),
    "resolve": lambda text: resolve_all(Source(text, "t.dfc")),
    "rules": lambda text: read_rules(Source(text, "t.dfc"), "t"),
    "format": format_text,
    "selector": parse_selector,
    "pipeline": parse_steps,
    "graph": parse_graph,
}
SECONDS, MEBIBYTES = 2.0, 512  # beyond start-up, for what is smaller than 1 MiB


def _checked(errors: list[Diagnostic]) -> None:
    assert all(d.code[0] in "PQR" and d.message for d in errors)
    "".join(d.render() for d in errors).encode()


def read_by(reader: str, text: str) -> float:
    """Read a text, which succeeds or raises what a user can read.

    Returns:  the processor time of this process: other work on the machine does not count.
    """
    start = time.process_time()
    try:
        READERS[reader](text)
    except DfcError as e:
        assert e.status == 2
        str(e).encode()
    return time.process_time() - start


def nothing_but_errors(text: str) -> dict[str, float]:
    return {reader: read_by(reader, text) for reader in READERS}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_begins(name: str) -> None:
    nothing_but_errors(ATTACKS[name][:10_000])


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_or_read(name: str) -> None:
    text = ATTACKS[name]
    nothing_but_errors("dfc 1\n")  # start-up
    reading = read_document(Source(text))
    assert len(reading.tokens) <= MAX_TOKENS + 1 and len(reading.problems) <= 20
    for reader, took in nothing_but_errors(text).items():
        # A second look, since a busy machine's caches cost processor time as well.
        assert took < SECONDS or read_by(reader, text) < SECONDS, reader


GREEDY = """
import resource, sys
from tests.test_hostile import ATTACKS, nothing_but_errors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
nothing_but_errors("dfc 1\\nrule a { match y = relu(x)\\nrewrite y = relu(x)\\nexact }\\n")
before = peak()
for name in sys.argv[1:] or ATTACKS:
    nothing_but_errors(ATTACKS[name])
    print(peak() - before, name)
"""


def memory_beyond_start_up(*names: str) -> dict[str, int]:
    """The highest peak so far, in MiB beyond start-up, after each attack in a fresh process."""
    command = [sys.executable, "-c", GREEDY, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    return {name: int(peak) for peak, name in map(str.split, done.stdout.splitlines())}


def test_the_greediest_attacks_stay_within_their_memory() -> None:
    peaks = memory_beyond_start_up("unclosed", "args")
    assert list(peaks) == ["unclosed", "args"] and max(peaks.values()) < MEBIBYTES


@pytest.mark.slow
def test_every_attack_stays_within_its_memory() -> None:
    peaks = memory_beyond_start_up()
    assert list(peaks) == [*ATTACKS] and max(peaks.values()) < MEBIBYTES, peaks


@pytest.mark.parametrize("hidden", ["\u202e", "\u200b", "\x1b", "\x00", "\ufeff", "\ud800"])
def test_graph_text_hides_nothing(hidden: str) -> None:
    for text in (f"# {hidden}\n{sum_of(2)}", f'x "{hidden}"'):
        with pytest.raises(DfcError, match="P009") as found:
            parse_graph(text, "g.dfc")
        assert hidden not in str(found.value).splitlines()[0]


def test_graph_text_with_other_line_ends_is_the_same_graph() -> None:
    text = sum_of(2)
    assert parse_graph(text.replace("\n", "\r\n")) == parse_graph(text)


def test_a_pipeline_is_bounded_and_hides_nothing() -> None:
    with pytest.raises(DfcError, match="P007"):
        parse_steps("cse," * 20_000)
    with pytest.raises(DfcError, match="P009"):
        parse_steps("cse\u202e,dce")


def sum_of(count: int) -> str:
    """A graph that adds its inputs in pairs, then the pairs, and so on."""
    names = [f"x{i}" for i in range(count)]
    inputs = ", ".join(f"%{n}: f32[2]" for n in names)
    lines = []
    while len(names) > 1:
        sums = [f"{a}_{b}" for a, b in zip(names[::2], names[1::2], strict=True)]
        for y, a, b in zip(sums, names[::2], names[1::2], strict=True):
            lines.append(f"  %{y}: f32[2] = aten.add.Tensor(%{a}, %{b}, alpha=1)")
        names = sums
    body = "\n".join(lines)
    return f"dfc 1\n\ngraph @sum({inputs}) -> f32[2] {{\n{body}\n  return %{names[0]}\n}}\n"


def test_commutative_ops_match_in_a_bounded_number_of_orders() -> None:
    """31 additions match 32 names in 2**31 orders."""

    def tree(low: int, high: int, leaf: str) -> str:
        if high - low == 1:
            return leaf + str(low)
        mid = (low + high) // 2
        return f"add({tree(low, mid, leaf)}, {tree(mid, high, leaf)})"

    pattern = f"match y = {tree(0, 32, 'x')}\nwhere rank(x0) == 7\nrewrite y = relu(x0)\nexact"
    (rule_,) = rules_of(Source(f"dfc 1\nrule a {{\n{pattern}\n}}\n"), "orders").rules
    graph = dfc.parse(sum_of(32))
    compiled = Matcher([rule_])
    start = time.process_time()
    with pytest.raises(DfcError, match="R041"):
        for node in graph.nodes:
            compiled.first(graph, node, Facts(graph))
    assert time.process_time() - start < SECONDS
    ctx = Context()
    with instead(rules_of(Source(f"dfc 1\nrule a {{\n{pattern}\n}}\n"), "orders")):
        assert Fuse(rules=("orders",)).run(graph, ctx) == 0  # the rest goes on without it
    (note,) = ctx.products["notes"]
    assert "the rule `orders.a` took 100000 steps at one node, so it is left out" in note


def test_bytes_that_are_no_text() -> None:
    for data in (
        b"\xff\xfe", b"\xef\xbb\xbfdfc 1", b"dfc 1 \xc0\xaf", b"\xed\xa0\x80", b"\x80", b"\xf8" * 10,
    ):  # fmt: skip
        with pytest.raises(DfcError, match="P009"):
            Source.of_bytes(data, "t.dfc")
    assert Source.of_bytes(b"dfc 1\r\nrecipe r { }\r", "t").text == "dfc 1\nrecipe r { }\n"


def test_half_characters_cannot_be_written() -> None:
    (found,) = check_source(Source('dfc 1\nrecipe r { fuse on "\\ud800" }'))[0]
    assert found.code == "P001"
    assert check_source(Source('dfc 1\nrecipe r { fuse on "\\ud83d\\ude00" }'))[0] == []


# Lexing


def by_lark(text: str) -> list[tuple[str, str, int]]:
    lexer = grammar()._build_lexer(dont_ignore=True)
    tokens = LexerThread.from_text(lexer, text).lex(None)
    return [(str(t.type), str(t), t.start_pos or 0) for t in tokens if t.type != "SPACE"]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_those_of_the_grammar(seed: int) -> None:
    text = random_document(seed)
    assert [(t.type, t.text, t.start) for t in tokenize(Source(text))[0]] == by_lark(text)


PIECES = (
    "a", "a.", ".a", "a.a", "1", "1.", "1e", "1e+", "1a", "1a/s", "1%", '"', '"a', "\\\\", '"\\\\', "<", "<-",
    "=", "~", "~=", "/", ".", "..", "...", "#", "# ", " ", "\t", "?", "!", "(", "-", "|", "é",
)  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_a_terminal_reads_twice_the_text_in_twice_the_tokens(piece: str) -> None:
    """Linear lexing, without a clock: twice the text is at most twice the work, counted in steps
    of the expression's engine by what it returns."""
    counts = []
    for n in (1 << 10, 1 << 11, 1 << 12):
        tokens, problems = tokenize(Source(piece * n))
        covered = sum(t.end - t.start for t in tokens)
        assert covered <= len(piece) * n and len(problems) <= 20
        counts.append(len(tokens) + 2)
    assert counts[2] <= 2 * counts[1] <= 4 * counts[0]


# Fuzzing


@cache
def samples() -> tuple[str, ...]:
    shipped = Path(next(iter(dfc.passes.__path__)))
    files = [*shipped.glob("*/*.dfc"), *HERE.glob("errors/*/*.dfc"), *HERE.glob("samples/*.dfc")]
    files += [*HERE.glob("golden/*.dfc"), *HERE.glob("errors/*.dfc")]
    return tuple(sorted(f.read_text() for f in files))


SPICE = (
    *"{}()[]<>=|&,:#\n\"\\\\-+*/%.?!~ \t\r", "dfc 1\n", "recipe r {", "when size > 1B {", "}", "else", "rule a {",
    "match y = ", "where ", "rewrite y = ", "exact\n", "apply ", "tune(1, 2)", "with limit=3", "...x",
    "1e400", "9" * 30, "12GiB", "\x00", "\u202e", "\ud800", "é", "import \"std/simplify.dfc\"\n", "extends r",
    "latency(p50)", "keep if faster", "q: ", "not ", " and ", " or ", "%x", "!w", "graph @f", "inf", "auto",
)  # fmt: skip


def mutated(rng: random.Random) -> str:
    """A sample or a random document with pieces cut out, copied, moved and put in."""
    text = rng.choice(samples()) if rng.random() < 0.7 else random_document(rng.randrange(10**9))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice((1, 1, 3, 10, 100)))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:i] + rng.choice(SPICE) + text[i:]
        elif kind == 2:
            text = text[:i] + text[i:j] * rng.choice((2, 2, 30)) + text[j:]
        elif kind == 3:
            k = rng.randrange(len(text) + 1)
            text = text[:k] + text[i:j] + text[k:]
        else:
            text = text[:i] + rng.choice(SPICE) + text[j:]
    return text


def batches(first: int, last: int, size: int) -> list[range]:
    return [range(i, i + size) for i in range(first, last, size)]


def attack(seeds: range) -> None:
    for seed in seeds:
        text = mutated(random.Random(seed))
        try:
            nothing_but_errors(text)
            expected_at(Source(text), len(text) // 2)
        except BaseException as e:
            e.add_note(f"seed {seed}: {text!r}")
            raise


def test_nothing_is_offered_in_an_expression_that_is_too_deep() -> None:
    text = "dfc 1\nrecipe r {\n  fuse on " + " | ".join(['"a"'] * 500) + "\n}\n"
    assert expected_at(Source(text), len(text) - 4) == set()
    assert expected_at(Source(text), text.index("fuse"))


@pytest.mark.parametrize("seeds", batches(0, 200, 50), ids=str)
def test_mutated_samples(seeds: range) -> None:
    attack(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", batches(10_000, 30_000, 500), ids=str)
def test_many_mutated_samples(seeds: range) -> None:
    attack(seeds)


@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(SPICE), max_size=40).map("".join))
def test_text_of_pieces(text: str) -> None:
    nothing_but_errors("dfc 1\n" + text)
    nothing_but_errors(text)


@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        text = Source.of_bytes(b"dfc 1\n" + data, "t.dfc").text
    except DfcError as e:
        assert e.code == "P009"
    else:
        nothing_but_errors(text)


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_documents_of_the_grammar_are_read(seed: int) -> None:
    text = random_document(seed)
    assert not read_document(Source(text)).problems
    nothing_but_errors(text)
