"""Everything that can be wrong with recipes, targets and rules: each code, each at its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

import dfc
from dfc.errors import Diagnostic
from dfc.lang.source import Source
from dfc.recipe.resolve import check_source, resolve, resolve_all
from dfc.rewrite.pass_ import PASSES

HERE = Path(__file__).parent
FILES = sorted(p for kind in ("recipes", "rules") for p in (HERE / "errors" / kind).glob("*.dfc"))
EXPECTED = re.compile(r"#! ([A-Z]\d+) ?(.*?)(?= *#!|$)")
Problem = tuple[int, str, str]  # line, code, the text at the place


def expected(text: str) -> set[Problem]:
    return {
        (number, code, word.strip())
        for number, line in enumerate(text.splitlines(), 1)
        for code, word in EXPECTED.findall(line)
    }


def place(d: Diagnostic) -> Problem:
    assert d.span is not None and d.span.text is not None
    return d.span.line, d.code, d.span.text[d.span.col - 1 : d.span.end_col - 1]


def problems(body: str, file: str = "t.dfc") -> list[Diagnostic]:
    errors, _ = check_source(Source(f"dfc 1\n{body}", file))
    return errors


def codes(body: str, file: str = "t.dfc") -> list[str]:
    return [d.code for d in problems(body, file)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_error_of_a_file_is_told_at_its_place(path: Path) -> None:
    text = path.read_text()
    errors, warnings = check_source(Source(text, str(path)))
    assert {place(d) for d in (*errors, *warnings)} == expected(text)
    for d in (*errors, *warnings):
        assert not d.message.endswith(".") and not d.message[0].isupper(), d.message
        assert d.span is not None
        start = f"{path}:{d.span.line}:{d.span.col}: error[{d.code}]: "
        assert d.render().startswith(start) and "^" in d.render()


@pytest.mark.parametrize("step", ["correct_bias", "smooth", "pin conv to"])
def test_an_option_without_default_is_missed_before_anything_runs(step: str) -> None:
    found = problems(f"recipe r {{\n  {step.removesuffix(' to')}\n  partition\n}}\n")
    missed = [d for d in found if "it has no default" in d.message]
    verb, *_, word = step.split() if " " in step else (step, "using")
    assert [d.help for d in missed] == [f"`{verb} {word} NAME`"]
    assert missed[0].code == "Q002" and missed[0].span.line == 3


def test_on_where_the_part_stands_behind_the_name_is_told_so() -> None:
    (problem,) = problems('recipe r {\n  prune on "up" | op(linear) with ratio=0.3\n}\n')
    assert problem.code == "Q002" and problem.help is not None
    assert problem.help.endswith('`prune "up" | op(linear)`')


def test_a_metric_without_a_direction_is_told_its_form() -> None:
    (problem,) = problems("metric top1 on val\n")
    assert problem.help == "`metric top1 on val, higher is better`"


def test_every_code_has_an_example() -> None:
    root = Path(dfc.__file__).parent
    files = [
        *root.glob("lang/[!g]*.py"),
        root / "lang" / "source.py",
        root / "rewrite/read_rules.py",
    ]
    files += [root / "recipe" / f"{n}.py" for n in
              ("resolve", "names", "steps", "goals", "targets", "settings", "sentences", "order",
               "options", "imports")]  # fmt: skip
    used = {c for f in files for c in re.findall(r'"([PQR]0\d\d)"', f.read_text())}
    shown = {code for path in FILES for _, code, _ in expected(path.read_text())}
    elsewhere = {"Q017", "Q021", "R009"}  # these need a pass, a model, two files: see below
    assert used - shown - elsewhere == set()


def test_a_string_that_is_not_closed() -> None:
    (found,) = problems('recipe r {\n  fuse on "head\n}')
    assert (found.code, found.help) == ("P001", 'add a `"`') and place(found)[2] == '"'
    (found,) = problems('recipe r {\n  fuse on "a\\x"\n}')
    assert found.code == "P001" and "\\u0041" in str(found.help)


@pytest.mark.parametrize(
    "body, help",
    [
        ("recipe r { csee }", "did you mean `cse`?"),
        ("recipe r { simplify }", "write `apply simplify`"),
        ("recipe r { norms }", "write `apply rules(norms)`"),
        ("recipe r { apply norms }", "write `apply rules(norms)`"),
        ("recipe r { cse with limt=3 }", "did you mean `limit`?"),
        ("recipe r { dce with limt=3 }", "it has"),
        ("recipe r { cse with limit=yes }", "`limit` is a whole number or none"),
        ('recipe r { fuse with limit=3 except "a" }', "`except` and what it names stand before"),
        ("recipe r { minimise latency }", "did you mean `minimize`?"),
        ("recipe r { require latency <= 20 }", "write its unit: ns, us, ms, s, min, h"),
        ("recipe r { require size <= 3GIB }", "did you mean `GiB`"),
        ("recipe r { when size < 1 MB { dce } }", "write `1MB`"),
        ("recipe r { recover with distil }", "or is `by distil` meant?"),
        ('recipe r { quantize int4 "layers.**" }', 'so: `on "layers.**"`'),
        ("recipe r { require throughput >= 5 items/s }", "write `5items/s`"),
        ("recipe r {\nrequire size <= 10 %\ndce\n}", "write `10%`"),
        ("recipe r { dce with limit=1 000 }", "write `1000`"),
        ("recipe r { require latency(p90) <= 1ms }", "did you mean `p99`"),
        ("recipe r { require latency(x) <= 1ms }", "it takes p50, p95, p99, or a label"),
        ("recipe r { require peak_memory(gpu0) <= 1B }", "`recipe NAME for TARGET`"),
        ("recipe r { maximize latency }", "write `minimize`"),
        ("recipe r { fuse on head }", 'a module path is a string: "head"'),
        ("recipe r { emit onnxx }", "did you mean `onnx`?"),
        ("recipe r { verify eech }", "did you mean `each`?"),
        ("recipe r extends simplfy { }", "did you mean `simplify`?"),
        ("recipe r for edge { }", "write `target NAME"),
        ("target t { device a : cpuu() }", "did you mean `cpu`?"),
        ("target t { device a : cpu(core=3) }", "did you mean `cores`?"),
        ("rule a { mtach y = relu(x) }", "did you mean `match`?"),
        ("metric m on calb, higher is better\ndata calib", "did you mean `calib`?"),
        ('import "std/simplfy.dfc"', "did you mean `simplify.dfc`?"),
    ],
)
def test_what_to_try_is_said(body: str, help: str) -> None:
    assert any(help in str(d.help) for d in problems(body)), [d.render() for d in problems(body)]


def test_nothing_is_told_twice() -> None:
    body = "recipe a { csee }\nrecipe b { apply a\napply a }\nrecipe c extends a { }"
    assert codes(body) == ["Q001"]


def test_not_more_is_told_than_anybody_reads() -> None:
    body = "recipe r {\n" + "csee\n" * 5000 + "}"
    assert len(problems(body)) == 100


# Passes that say what they need and what they cannot follow


@dataclass(frozen=True)
class Freeze(dfc.Pass):
    """Make weights small."""

    name: ClassVar[str] = "freeze"
    auto: ClassVar[Any] = {"bits": (4, 8)}
    phrases: ClassVar[Any] = {"": "kind", "using": "data"}

    kind: Literal["int8", "fp8"] = "int8"
    bits: int = 8
    share: float = 0.5
    form: Literal["auto", "round"] = "auto"
    budget_bytes: int = 0
    wait_ms: float = 0.0
    data: dfc.Data | None = None

    def run(self, graph: dfc.Graph, ctx: Any) -> int:
        return 0

    def needs(self, target: Any) -> str | None:
        kinds = {d.kind for d in target.devices}
        return "fp8 needs a cuda device" if self.kind == "fp8" and "cuda" not in kinds else None


@dataclass(frozen=True)
class Distil(dfc.Pass):
    """Learn from the original."""

    name: ClassVar[str] = "distil"
    not_after: ClassVar[tuple[str, ...]] = ("freeze",)

    def run(self, graph: dfc.Graph, ctx: Any) -> int:
        return 0


@pytest.fixture
def more_passes() -> Iterator[None]:
    from dfc.registry import Origin

    with PASSES.restored():
        for cls in (Freeze, Distil):
            PASSES.add(cls.name, cls, Origin(__file__, 1, cls.__name__), __name__)
        yield


def options(sentence: str) -> Any:
    plan = resolve(Source(f"dfc 1\ndata calib\nrecipe r {{\n{sentence}\n}}"))
    return next(plan.passes()).options


def test_options_are_typed_by_the_fields(more_passes: None) -> None:
    assert options("freeze fp8 using calib with bits=4") == {
        "kind": "fp8", "data": "calib", "bits": 4,
    }  # fmt: skip
    assert options("freeze with share=80%")["share"] == 0.8
    assert options("freeze with budget_bytes=2KiB, wait_ms=1.5s") == {
        "budget_bytes": 2048, "wait_ms": 1500.0,
    }  # fmt: skip
    assert options("freeze with wait_ms=3, budget_bytes=1GB")["wait_ms"] == 3.0
    assert str(options("freeze with bits=auto")["bits"]) == "tune(4, 8)"
    assert options("freeze with form=auto")["form"] == "auto"  # a value, where nothing is tried
    wrong = "freeze fp9\nfreeze using calb\nfreeze with bits=3ms\nfreeze with wait_ms=3B"
    found = problems(f"data calib\nrecipe r {{\n{wrong}\nfreeze with share=auto\n}}")
    assert [d.code for d in found] == ["Q012", "Q012", "Q015", "Q015", "Q012"]
    assert found[0].help == "did you mean `fp8`?" and found[1].help == "did you mean `calib`?"


def test_orders_that_are_illegal(more_passes: None) -> None:
    (found,) = problems("recipe r {\nq: freeze\ndce\ndistil\n}")
    assert (found.code, found.message) == ("Q016", "`distil` cannot come after `q`")
    assert place(found) == (5, "Q016", "distil")
    (found,) = problems("recipe r {\nq: freeze\np: freeze\ndistil\n}")  # one error, both places
    assert found.notes == ("`q` stands at t.dfc:3:1", "`p` stands at t.dfc:4:1")
    when = "when size > 3MiB { freeze } else { distil }"
    assert codes(f"recipe r {{\n{when}\n}}") == []
    assert codes(f"recipe r {{\n{when}\ndistil\n}}") == ["Q016"]
    assert codes("recipe r {\nq: freeze\nrevert q\ndistil\n}") == []
    assert codes("recipe r {\nq: freeze\nwhen size > 1B { revert q }\ndistil\n}") == ["Q016"]
    assert codes("recipe a { freeze }\nrecipe r {\napply a\ndistil }") == ["Q016"]


def test_targets_that_lack_what_a_step_needs(more_passes: None) -> None:
    cpu, gpu = "target edge { device a : cpu() }", "target edge { device a : cuda() }"
    (found,) = problems(f"{cpu}\nrecipe r for edge {{ q: freeze fp8 }}")
    assert found.code == "Q017" and "`q` needs what target `edge` lacks: fp8" in found.message
    assert codes(f"{gpu}\nrecipe r for edge {{ q: freeze fp8 }}") == []
    assert codes("recipe r { q: freeze fp8 }") == []


def test_resolved_text_of_typed_options_reads_back(more_passes: None) -> None:
    text = "freeze fp8 using calib with bits=tune(4, 8), share=12.5%, wait_ms=2s keep if smaller"
    text = text.replace(" keep if smaller", "").replace("with", "keep if smaller with")
    plan = resolve(Source(f"dfc 1\ndata calib\nrecipe r {{\n{text}\n}}"))
    assert resolve(Source(str(plan))) == plan


# Files


def test_imports_reach_the_folder_and_nothing_above(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.dfc").write_text("dfc 1\nrecipe out { dce }\n")
    (tmp_path / "in" / "link.dfc").symlink_to(tmp_path / "out.dfc")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "a.dfc").write_text('dfc 1\nimport "b.dfc"\nrecipe a { apply b }\n')
    (tmp_path / "in" / "sub" / "b.dfc").write_text("dfc 1\nrecipe b { dce }\n")
    main = str(tmp_path / "in" / "main.dfc")

    def read(line: str) -> list[str]:
        Path(main).write_text(f"dfc 1\n{line}\nrecipe r {{ apply a }}\n")
        errors, _ = check_source(Source(Path(main).read_text(), main))
        return [d.code for d in errors]

    assert read('import "sub/a.dfc"') == []
    assert read('import "sub/../../out.dfc"') == ["Q030", "Q011"]
    assert read('import "link.dfc"') == ["Q030", "Q011"]
    assert read('import "sub"') == ["Q030", "Q011"]
    assert read('import "' + "x" * 5000 + '.dfc"') == ["Q031", "Q011"]


def test_files_of_many_kinds_cannot_be_imported(tmp_path: Path) -> None:
    import os

    (tmp_path / "bad.dfc").write_bytes(b"dfc 1\n\xff")
    (tmp_path / "large.dfc").write_bytes(b"dfc 1\n" + b"#" * (1 << 21))
    (tmp_path / "folder.dfc").mkdir()
    os.mkfifo(tmp_path / "pipe.dfc")
    (tmp_path / "zero.dfc").symlink_to("/dev/zero")
    names = ("bad", "large", "folder", "pipe", "zero")
    main = tmp_path / "main.dfc"
    main.write_text("dfc 1\n" + "".join(f'import "{n}.dfc"\n' for n in names) + "recipe r { }\n")
    errors, _ = check_source(Source(main.read_text(), str(main)))
    assert [d.span.line for d in errors if d.span] == [2, 3, 4, 5, 6]
    assert [d.code for d in errors] == ["Q031", "Q031", "Q031", "Q031", "Q030"]


def test_imports_that_go_deep_or_wide_or_round(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"d{i}.dfc").write_text(f'dfc 1\nimport "d{i + 1}.dfc"\n')
    for i in range(80):
        (tmp_path / f"w{i}.dfc").write_text("dfc 1\n")
    for i in range(10):  # each imports all: a graph with 10! paths
        body = "".join(f'import "r{j}.dfc"\n' for j in range(10) if j != i)
        (tmp_path / f"r{i}.dfc").write_text(f"dfc 1\n{body}")
    main = tmp_path / "main.dfc"

    def read(text: str) -> set[str]:
        main.write_text(f"dfc 1\n{text}\n")
        return {d.code for d in check_source(Source(main.read_text(), str(main)))[0]}

    assert read('import "d0.dfc"') == {"Q033"}
    assert read("\n".join(f'import "w{i}.dfc"' for i in range(80))) == {"Q033"}
    assert read('import "r0.dfc"') == {"Q032", "Q033"}


def test_rules_of_a_file_are_known_to_its_recipes_alone(tmp_path: Path) -> None:
    rule = "rule mine { match y = relu(x)\nrewrite y = relu(x)\nexact }"
    main, other = tmp_path / "main.dfc", tmp_path / "other.dfc"
    other.write_text(f"dfc 1\n{rule}\n")
    main.write_text('dfc 1\nimport "other.dfc"\nrecipe r { apply rules(other, mine) }\n')
    assert check_source(Source(main.read_text(), str(main))) == ([], [])
    assert codes("recipe r { apply rules(mine) }") == ["R008"]  # checking leaves nothing behind
    (tmp_path / "sub").mkdir()
    twin = tmp_path / "sub" / "other.dfc"
    twin.write_text(other.read_text() + "# another\n")
    main.write_text('dfc 1\nimport "other.dfc"\nimport "sub/other.dfc"\nrecipe r { }\n')
    (found,) = check_source(Source(main.read_text(), str(main)))[0]
    assert (found.code, place(found)[2]) == ("R009", "mine")


def test_a_recipe_of_steps_without_end() -> None:
    many = "recipe a {\n" + "dce\n" * 600 + "}\nrecipe b { apply a\napply a }\n"
    assert codes(many) == ["Q033"]
    wide = "recipe a {\n" + "dce\n" * 900 + "}\n"
    wide += "".join(f"recipe r{i} {{ apply a }}\n" for i in range(40))
    assert codes(wide) == ["Q033"]
    found, wrong = resolve_all(Source(f"dfc 1\n{wide}"), name="r1")
    assert found is None and [d.code for d in wrong] == ["Q033"]
