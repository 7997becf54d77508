"""Passes, ops, engines and rules of the user's: by decorator, from a file, from a package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.ir.op import restored_ops
from dfc.lang.source import Source
from dfc.planning.custom import ENGINES
from dfc.recipe.resolve import resolve
from dfc.rewrite import rulesets
from dfc.rewrite.pass_ import PASSES, find_pass, pass_classes
from dfc.testing import check_op, check_pass

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test defines is gone after it."""
    sets = dict(rulesets._loaded)
    with PASSES.restored(), ENGINES.restored(), restored_ops():
        yield
    rulesets._loaded.clear()
    rulesets._loaded.update(sets)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x + x)
        return y + y


MODEL = Twice().eval(), (torch.arange(12.0).reshape(3, 4),)


def double_pass() -> Any:
    @dfc.pass_
    class Double(dfc.Pass):
        """Write `x + x` as `2 * x`.

        Needs:    a valid graph.
        Ensures:  nothing is added to itself.
        """

        name = "double"
        numerics = dfc.close(1e-6)

        limit: int | None = None
        how: Literal["mul", "exact"] = "mul"
        where: dfc.Selector | None = None
        factors: tuple[float, ...] = ()

        def run(self, graph: dfc.Graph, ctx: dfc.Context) -> int:
            changes = 0
            for node in graph.nodes:
                same = node.op == "aten.add.Tensor" and node.inputs[0] is node.inputs[1]
                if not same or changes == self.limit:
                    continue
                made = graph.add(
                    "aten.mul.Scalar", [node.inputs[0]], {"other": 2}, before=node, loc=node.loc
                )
                graph.replace(node, made)
                changes += 1
            return changes

    return Double


# Passes


def test_a_class_becomes_a_pass_with_its_fields_as_options() -> None:
    Double = double_pass()
    compiled = dfc.compile(*MODEL, passes=[Double(limit=1), "cse"], engine="eager")
    assert [r.step for r in compiled.report.passes] == ["double{limit=1}", "cse"]
    assert compiled.report.passes[0].changes == 1 and compiled.report.passes[0].verdict == "proved"
    assert torch.equal(compiled(MODEL[1][0]), MODEL[0](MODEL[1][0]))
    assert find_pass("double", {"how": "exact"}) == Double(how="exact")
    with pytest.raises(AttributeError):  # frozen: options do not change
        Double().limit = 3
    with pytest.raises(DfcError, match="`how` of pass `double`"):
        find_pass("double", {"how": "add"})


def test_a_class_or_a_name_stands_for_the_pass() -> None:
    Double = double_pass()
    for chosen in (Double, "double", Double()):
        report = dfc.compile(*MODEL, passes=[chosen], engine="eager").report
        assert report.passes[0].changes == 2
    with pytest.raises(DfcError, match="is no pass") as error:
        dfc.compile(*MODEL, passes=[len])  # type: ignore[list-item]
    assert error.value.code == "Q001"


def test_a_function_becomes_a_pass_with_its_keywords_as_options() -> None:
    @dfc.pass_(numerics=dfc.EXACT)
    def drop_relu(graph: dfc.Graph, ctx: dfc.Context, *, limit: int = 9) -> int:
        """Remove relus of relus."""
        changes = 0
        for node in graph.nodes:
            inner = node.inputs[0].node if node.op == "aten.relu.default" else None
            if inner is not None and inner.op == node.op and changes < limit:
                graph.replace(node, [node.inputs[0]])
                changes += 1
        return changes

    class Relus(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(torch.relu(torch.relu(x)))

    assert check_pass(drop_relu, Relus(), (torch.randn(4),), changes=2) == 2
    assert str(drop_relu(limit=1)) == "drop_relu{limit=1}"
    assert drop_relu.__doc__ == "Remove relus of relus."


def test_a_recipe_uses_the_verb_with_its_options() -> None:
    Double = double_pass()
    text = 'dfc 1\nrecipe r {\n  double with limit=1, how=exact, where="**", factors=[1, 2.5]\n}\n'
    (step,) = resolve(Source(text, "r.dfc")).passes()
    made = step.build({})
    assert isinstance(made, Double)
    assert (made.limit, made.how, made.factors) == (1, "exact", (1.0, 2.5))
    assert isinstance(made.where, dfc.Selector)
    with pytest.raises(DfcError) as error:
        resolve(Source("dfc 1\nrecipe r {\n  double with limt=1, how=sideways\n}\n", "r.dfc"))
    assert error.value.render().count("error[") == 2
    assert "r.dfc:3:15: error[Q002]: pass `double` has no option `limt`" in error.value.render()
    assert "did you mean `limit`?" in error.value.render()
    assert "`sideways` is none of mul, exact" in error.value.render()


GOOD = """\
class A:
    'Do.'
    name = 'a'
    numerics = dfc.EXACT
    def run(self, graph, ctx): return 0
"""
# definition -> its line that is wrong, what is said, and the help; the decorator is line 3
BAD = [
    (GOOD.replace("    name = 'a'\n", ""), 4, "the pass has no name", 'write `name = "a"`'),
    (GOOD.replace("    numerics = dfc.EXACT\n", ""), 4, "the pass has no `numerics`", "dfc.EXACT"),
    (GOOD.replace("def run", "def walk"), 4, "the pass has no `run`", "def run(self, graph, ctx)"),
    (GOOD + "    ratios: list = []", 9, "the default of `ratios` can change: []", "write a tuple"),
    (GOOD + "    ratio = 0.5", 9, "the option `ratio` has no type", "write `ratio: float = 0.5`"),
    (GOOD + "    numeric = 0.5", 9, "has no type", "did you mean `numerics`?"),
    (GOOD + "    ratio: float = 'half'", 9, "`ratio` is float, its default 'half'", ""),
    (GOOD + "    model: Exception = None", 9, "an option cannot be a Exception", "one of int"),
    (GOOD + "    ratio: Ratio = 3", 9, "the type of `ratio` is not known", ""),
    (GOOD + "    run: int = 3", 9, "`run` cannot be an option", ""),
    (GOOD.replace("name =", "name: str ="), 6, "`name` is what a pass says of itself", "`name ="),
    (GOOD.replace("'a'", "'when'"), 6, "`when` is a word of recipes", "another name"),
    (GOOD.replace("'a'", "'a b'"), 6, "'a b' cannot be the name of a pass", "letters"),
    (GOOD.replace("'a'", "'cse'"), 4, "pass `cse` exists already: dfc itself brings it", ""),
    (GOOD.replace("graph, ctx", "graph"), 8, "does not take (self, graph, ctx)", ""),
    (GOOD.replace("dfc.EXACT", "'exact'"), 7, "`numerics` is 'exact'", "dfc.EXACT"),
    ("def a(graph): return 0", 4, "takes something else than (graph, ctx)", "(graph, ctx, *, "),
    ("def a(graph, ctx, *, k=3): return 1", 4, "`k` has no type", "write `k: int = 3`"),
]


def load(path: Path, text: str) -> None:
    from dfc.cli.extensions import load_extension

    path.write_text(text)
    load_extension(str(path))


@pytest.mark.parametrize("text, line, message, help", BAD, ids=[b[2] for b in BAD])
def test_a_wrong_definition_is_told_with_its_line(
    text: str, line: int, message: str, help: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(DfcError) as error:
        load(file, f"from __future__ import annotations\nimport dfc\n@dfc.pass_\n{text}\n")
    shown = error.value.render()
    assert message in shown and help in shown
    spans = [d.span for d in error.value.diagnostics if message in d.message]
    assert [(s.file, s.line) for s in spans if s] == [(str(file), line)]
    assert spans[0] and spans[0].text == file.read_text().splitlines()[line - 1]
    assert error.value.status == 2 and "a" not in pass_classes()


def test_everything_wrong_with_a_definition_is_told_at_once(tmp_path: Path) -> None:
    text = "import dfc\n@dfc.pass_\nclass A:\n    x = 1\n    name = 'keep'\n    y: set = {1}\n"
    with pytest.raises(DfcError) as error:
        load(tmp_path / "mine.py", text)
    assert [d.span.line for d in error.value.diagnostics if d.span] == [3, 3, 4, 5, 6]


def test_two_definitions_never_overwrite_each_other(tmp_path: Path) -> None:
    text = f"import dfc\n@dfc.pass_\n{GOOD}"
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    load(first, text)
    with pytest.raises(DfcError) as error:
        load(second, text)
    shown = error.value.render()
    assert error.value.code == "Q003" and error.value.status == 2
    assert f"{second}:3:1: error[Q003]: pass `a` exists already: {first}:3 brings it" in shown
    assert PASSES.origin("a") == f"{first}:3"
    with pytest.raises(DfcError, match="exists already"):  # twice in one file as well
        load(tmp_path / "third.py", text.replace("'a'", "'b'") + "@dfc.pass_\n" + GOOD)


def test_a_file_or_a_cell_that_is_run_again_takes_its_own_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for limit in (3, 4):
        file.write_text(f"import dfc\n@dfc.pass_\n{GOOD}    limit: int = {limit}\n")
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "mine"})
        assert find_pass("a").limit == limit  # type: ignore[attr-defined]
    cell = f"import dfc\n@dfc.pass_\n{GOOD}    limit: int = 1\n".replace("'a'", "'of_a_cell'")
    code = f"""
import dfc
from dfc.rewrite.pass_ import find_pass
cell = {cell!r}
for n in (1, 2):
    text = cell.replace("= 1", f"= {{n}}")
    exec(compile(text, f"/tmp/ipykernel_7/{{n}}.py", "exec"), globals())
    assert find_pass("of_a_cell").limit == n
print("replaced")
"""
    assert python("-c", code).stdout == "replaced\n"


def python(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    found = [str(ROOT), *([str(path)] if path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done


def test_what_fails_inside_a_pass_is_the_users_with_its_line(tmp_path: Path) -> None:
    text = f"import dfc\n@dfc.pass_\n{GOOD}".replace("return 0", "\n        return graph.nods")
    load(tmp_path / "mine.py", text)
    with pytest.raises(DfcError) as error:
        dfc.compile(*MODEL, passes=["a"], engine="eager")
    shown = error.value.render()
    assert (error.value.code, error.value.status) == ("K040", 8)
    assert f"{tmp_path / 'mine.py'}:8" in shown and "the pass `a` raised AttributeError" in shown
    load(tmp_path / "other.py", f"import dfc\n@dfc.pass_\n{GOOD}".replace("'a'", "'b'")
         .replace("return 0", "return None"))  # fmt: skip
    with pytest.raises(DfcError, match="gave None, not a number of changes") as error:
        dfc.compile(*MODEL, passes=["b"], engine="eager")
    assert error.value.status == 8
    text = f"import dfc\n@dfc.pass_\n{GOOD}".replace("'a'", "'c'")
    text = text.replace("return 0", "graph.set_outputs([graph.inputs[0]]); return 0")
    load(tmp_path / "liar.py", text)
    with pytest.raises(DfcError, match="says 0 changes and changed the graph") as error:
        dfc.compile(*MODEL, passes=["c"], engine="eager", strict=True)
    assert error.value.status == 8 and "liar.py:7" in error.value.render()


def test_importing_dfc_for_a_pass_loads_no_torch() -> None:
    code = (
        "import sys, dfc; dfc.pass_, dfc.EXACT, dfc.op, dfc.engine; print('torch' in sys.modules)"
    )
    assert python("-c", code).stdout == "False\n"


def test_check_pass_finds_what_breaks_a_promise() -> None:
    assert check_pass(double_pass(), *MODEL) == 2

    @dfc.pass_(numerics=dfc.EXACT)
    def wrong(graph: dfc.Graph, ctx: dfc.Context) -> int:
        """Turn every relu into a tanh."""
        found = [n for n in graph.nodes if n.op == "aten.relu.default"]
        for n in found:
            made = graph.add("aten.tanh.default", list(n.inputs), {}, before=n)
            graph.replace(n, made)
        return len(found)

    with pytest.raises(AssertionError, match="`wrong`"):
        check_pass(wrong, *MODEL)
    with pytest.raises(AssertionError, match="made 0 changes to the model, not at least 1"):
        check_pass("fold_batch_norm", *MODEL)

    @dfc.pass_(numerics=dfc.EXACT)
    def endless(graph: dfc.Graph, ctx: dfc.Context) -> int:
        """Copy the first value, each time."""
        first = next(iter(graph.nodes))
        graph.add("aten.neg.default", [first.result], {})
        return 1

    with pytest.raises(AssertionError, match="finds 1 more to do"):
        check_pass(endless, *MODEL)


# Ops


def square_relu() -> Any:
    @dfc.op
    class SquareRelu(dfc.Op):
        """`relu(x) ** 2` (Primer, section 4.1).

        Shapes:  x: float[*S] -> float[*S]
        C1:      x is a float.
        """

        name = "mylib.square_relu"
        cases = ("x=f32[2,3]", "x=f64[4,S]", "x=f32[2,3] scale=0.5")
        rejects = ("C1 x=i32[2,3]",)

        scale: float = 1.0

        def infer(self, x: Any) -> Any:
            self.require("C1", x.dtype.is_float, f"x is {x}")
            return x

        def reference(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).square() * self.scale

        def decompose(self, b: Any, x: Any) -> Any:
            y = b("aten.relu.default", x)
            return b("aten.mul.Scalar", b("aten.mul.Tensor", y, y), other=self.scale)

    return SquareRelu


RULES = """\
dfc 1
# One op instead of two: nothing is written in between.
rule fuse_square_relu(x) {
  match   y = pow(relu(x), 2)
  where   floating(x)
  rewrite y = mylib.square_relu(x, scale=1.0)
  within  1e-6
  applies x: f32[4, 8]
  refuses x: i32[4, 8]
}
"""


class SquareReluNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) ** 2


def test_an_op_is_held_to_what_it_says() -> None:
    check_op(square_relu())


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("torch.relu(x).square()", "torch.relu(x) * 2", "`decompose` differs from `reference`"),
        ("            return x\n", "            return x.with_shape((1,))\n", "`infer` says"),
        ('rejects = ("C1 x=i32[2,3]",)', "rejects = ()", "C1 is missing from `rejects`"),
        ("x.dtype.is_float, f", "True, f", "not refused"),
        ("cases = (", "cases = () and (", "has no cases"),
        ("C1:      x is a float.", "", "C1 is missing from the docstring"),
    ],
)  # fmt: skip
def test_check_op_finds_what_is_not_so(old: str, new: str, message: str, tmp_path: Path) -> None:
    import inspect

    text = textwrap.dedent(inspect.getsource(square_relu))
    assert old in text
    head = "from typing import Any\nimport torch\nimport dfc\n"
    load(tmp_path / "ops.py", f"{head}{text.replace(old, new)}\nSquareRelu = square_relu()\n")
    from dfc.cli.sources import load_file

    with pytest.raises(AssertionError) as error:
        check_op(load_file(tmp_path / "ops.py").SquareRelu)
    assert message in str(error.value)


def test_an_op_works_in_rules_text_engines_and_onnx(tmp_path: Path) -> None:
    square_relu()
    (tmp_path / "mine.dfc").write_text(RULES)
    from dfc.cli.extensions import load_extension

    load_extension(str(tmp_path / "mine.dfc"))
    model, x = SquareReluNet().eval(), torch.randn(3, 8)
    compiled = dfc.compile(model, (x,), passes=[find_pass("fuse", {"rules": ("mine",)})])
    assert "mylib.square_relu" in [n.op for n in compiled.graph.nodes]
    assert compiled.report.passes[0].verdict == "proved"
    assert {e.name for e in compiled.report.engines if e.verdict != "refused"} == {
        "eager", "onnxruntime", "openvino",
    }  # fmt: skip
    torch.testing.assert_close(compiled(x), model(x))
    again = dfc.parse(str(compiled.graph))
    assert again == compiled.graph
    compiled.export(tmp_path / "mine.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "mine.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x))
    compiled.save(tmp_path / "mine.dfcpkg")
    torch.testing.assert_close(dfc.load(tmp_path / "mine.dfcpkg")(x), model(x))


def test_a_package_with_an_op_that_nobody_brings_says_what_to_do(tmp_path: Path) -> None:
    with restored_ops():
        test_an_op_works_in_rules_text_engines_and_onnx(tmp_path)
    with pytest.raises(DfcError) as error:
        dfc.load(tmp_path / "mine.dfcpkg")
    assert "unknown op `mylib.square_relu`" in str(error.value)
    assert "`--use FILE.py`" in str(error.value) and error.value.status == 2


def test_wrong_ops_are_told_with_their_line(tmp_path: Path) -> None:
    body = "    def infer(self, x): return x\n    def reference(self, x): return x\n"
    head = "import dfc\n@dfc.op\nclass A:\n"
    for i, (text, message) in enumerate(
        [
            (f"{head}{body}", "the op has no name"),
            (f"{head}    name = 'A b'\n{body}", "'A b' cannot be the name"),
            (f"{head}    name = 'aten.a'\n{body}", "`aten.` belongs to PyTorch"),
            (f"{head}    name = 'a'\n", "the op has no `infer`"),
            (f"{head}    name = 'a'\n    cases = 'x'\n{body}", "`cases` is no tuple of strings"),
            (f"{head}    name = 'a'\n{body}".replace("reference(self, x", "reference(self, z"),
             "`reference` takes other operands than `infer`"),
            (f"{head}    name = 'linear_gelu'\n{body}", "op `dfc.linear_gelu` exists already"),
        ]
    ):  # fmt: skip
        with pytest.raises(DfcError) as error:
            load(tmp_path / f"bad{i}.py", text)
        assert message in error.value.message and f"bad{i}.py:" in error.value.render()


# Engines


def test_an_engine_is_chosen_by_its_name() -> None:
    @dfc.engine
    class Backwards:
        """Runs eagerly, and counts."""

        name = "counting"
        devices = ("cpu",)
        calls = 0

        def supports(self, node: Any) -> str | None:
            return None

        def build(self, graph: dfc.Graph, device: str = "cpu", threads: int | None = None) -> Any:
            from dfc.runtime.engines import find_engine

            inner = find_engine("eager").build(graph, device)

            def run(inputs: Any) -> Any:
                Backwards.calls += 1
                return inner(inputs)

            return run

    compiled = dfc.compile(*MODEL, engine="counting")
    before = Backwards.calls
    assert torch.equal(compiled(MODEL[1][0]), MODEL[0](MODEL[1][0]))
    assert Backwards.calls == before + 1
    with pytest.raises(DfcError, match="engine `eager` exists already: dfc itself"):
        dfc.engine(type("E", (Backwards,), {"name": "eager"}))
    with pytest.raises(DfcError, match="the engine names no devices"):
        dfc.engine(type("E", (), {"name": "mine"}))


# The command line

FILE = """
import torch
import dfc
from typing import Literal

@dfc.pass_
class Halve(dfc.Pass):
    \"\"\"Write `x / 2` as `x * 0.5`.\"\"\"
    name = "halve"
    numerics = dfc.EXACT
    limit: int | None = None

    def run(self, graph, ctx):
        divisions = [n for n in graph.nodes if n.op == "aten.div.Scalar"]
        found = [n for n in divisions if n.attributes.get("other") == 2]
        for n in found[: self.limit]:
            made = graph.add("aten.mul.Scalar", [n.inputs[0]], {"other": 0.5}, before=n, loc=n.loc)
            graph.replace(n, made)
        return len(found[: self.limit])

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x / 2) / 2

def build():
    return Net().eval(), (torch.randn(3, 4),)
"""


def test_use_brings_a_file_for_compile_list_and_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "halves.py"
    file.write_text(FILE)
    model = f"{file}:build"
    given = ["-p", "halve{limit=1},dce", "--engine", "eager", "--json"]
    assert main(["compile", model, "--use", str(file), *given]) == 0
    passes = json.loads(capsys.readouterr().out)["report"]["passes"]
    assert [(p["step"], p["changes"]) for p in passes] == [("halve{limit=1}", 1), ("dce", 0)]
    assert main(["list", "passes", "halve", "--use", str(file), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["from"] == f"{file}:7" and row["does"] == "Write `x / 2` as `x * 0.5`"
    assert row["options"] == [
        {"name": "limit", "type": "whole number or none", "default": "none"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, status, message",
    [
        ("missing.py", 2, "there is no `missing.py`"),
        ("halves.py:build", 2, "takes a whole file"),
        ("missing.dfc", 2, "there is no `missing.dfc`"),
        ("raises.py", 8, "`raises.py` raised ZeroDivisionError"),
        ("syntax.py", 8, "is not valid Python"),
        ("recipe.dfc", 2, "has no rules"),
        ("wrong.dfc", 2, "unknown op `mylib.square_relu`"),
    ],
)
def test_use_of_what_is_wrong(
    name: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("halves.py").write_text(FILE)
    Path("raises.py").write_text("x = 1\ny = x / 0\n")
    Path("syntax.py").write_text("def f(:\n")
    Path("recipe.dfc").write_text("dfc 1\nrecipe r {\n  cse\n}\n")
    Path("wrong.dfc").write_text(RULES)
    assert main(["list", "--use", name]) == status
    shown = capsys.readouterr().err
    assert message in shown
    if name == "raises.py":
        assert "raises.py:2" in shown


# Packages

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "dfc-demo"
version = "1.0"

[project.entry-points."dfc.passes"]
demo_drop = "dfc_demo.passes:DemoDrop"
demo_broken = "dfc_demo.broken:Broken"
demo_other = "dfc_demo.passes:DemoDrop"

[project.entry-points."dfc.ops"]
demo = "dfc_demo.ops"

[project.entry-points."dfc.engines"]
demo_engine = "dfc_demo.engine:Demo"

[tool.setuptools]
packages = ["dfc_demo"]
"""
PACKAGE = {
    "passes.py": """
import dfc

@dfc.pass_
class DemoDrop(dfc.Pass):
    \"\"\"Remove relus of relus.\"\"\"
    name = "demo_drop"
    numerics = dfc.EXACT
    def run(self, graph, ctx):
        return 0
""",
    "broken.py": "import a_library_that_is_not_there\n",
    "ops.py": """
import dfc, torch

@dfc.op
class Twice(dfc.Op):
    \"\"\"Twice a tensor.\"\"\"
    name = "demo.twice"
    cases = ("x=f32[2]",)
    def infer(self, x):
        return x
    def reference(self, x):
        return x * 2
""",
    "engine.py": """
import dfc

@dfc.engine
class Demo:
    \"\"\"Runs eagerly.\"\"\"
    name = "demo_engine"
    devices = ("cpu",)
    def supports(self, node):
        return None
    def build(self, graph, device="cpu", threads=None):
        from dfc.runtime.engines import find_engine
        return find_engine("eager").build(graph, device)
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real distribution, built and installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    (source / "dfc_demo").mkdir()
    (source / "dfc_demo" / "__init__.py").touch()
    (source / "pyproject.toml").write_text(PYPROJECT)
    for name, text in PACKAGE.items():
        (source / "dfc_demo" / name).write_text(text)
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
         "--no-build-isolation", "--target", str(target), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return target


def test_a_package_brings_passes_ops_and_engines(site: Path) -> None:
    code = """
import sys, torch, dfc
from dfc.rewrite.pass_ import find_pass, pass_classes
assert "demo_drop" in pass_classes() and "dfc_demo" not in sys.modules, "loaded too early"
class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x)
x = torch.randn(3)
c = dfc.compile(Net().eval(), (x,), passes=["demo_drop", "cse"], engine="demo_engine")
print(c.report.passes[0].step, c.engine.name, torch.equal(c(x), torch.relu(x)))
g = dfc.parse("dfc 1 graph @g(%x: f32[2]) -> f32[2] { %y: f32[2] = demo.twice(%x) return %y }")
c = dfc.compile(g, (torch.ones(2),), engine="eager")
print(c(torch.ones(2)).tolist())
"""
    assert python("-c", code, path=site).stdout == "demo_drop demo_engine True\n[2.0, 2.0]\n"


def test_a_package_that_does_not_load_is_named_and_breaks_nothing_else(site: Path) -> None:
    code = """
import dfc
from dfc.rewrite.pass_ import find_pass
for name in ("demo_broken", "demo_other"):
    try:
        find_pass(name)
    except dfc.DfcError as e:
        print(e.code, e.status, e.render())
print(find_pass("demo_drop"), find_pass("cse"))
"""
    shown = python("-c", code, path=site).stdout
    assert "Q041 7" in shown and "the package `dfc-demo` (dfc_demo.broken:Broken)" in shown
    assert "ModuleNotFoundError: No module named 'a_library_that_is_not_there'" in shown
    assert "calls itself `demo_drop`" in shown
    assert shown.endswith("demo_drop cse\n")
    rows = json.loads(
        python(str(Path(sys.executable).parent / "dfc"), "list", "--json", path=site).stdout
    )
    found = {r["name"]: r for r in rows}
    assert found["demo_broken"]["does"].startswith("missing: `demo_broken` of the package")
    assert found["demo_drop"]["from"] == "dfc-demo" and found["cse"]["from"] == "dfc"


def test_a_name_that_two_bring_is_refused_and_both_are_named(site: Path, tmp_path: Path) -> None:
    info = tmp_path / "other_demo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-demo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dfc.passes]\ndemo_drop = other_demo:Drop\ncse = other_demo:Cse\n"
    )
    code = f"""
import sys; sys.path.append({str(site)!r})
import dfc
from dfc.rewrite.pass_ import find_pass
for name in ("demo_drop", "cse"):
    try:
        find_pass(name)
    except dfc.DfcError as e:
        print(e)
try:
    @dfc.pass_(numerics=dfc.EXACT)
    def demo_broken(graph, ctx) -> int:
        return 0
except dfc.DfcError as e:
    print(e)
print(find_pass("dce"))
"""
    shown = python("-c", code, path=tmp_path).stdout
    assert "`dfc-demo`" in shown and "`other-demo`" in shown
    assert "pass `cse` exists already: dfc itself, but also the package `other-demo`" in shown
    assert "pass `demo_broken` exists already: the package `dfc-demo`" in shown
    assert shown.endswith("dce\n")


# What is written about it


def blocks() -> list[tuple[str, str, str]]:
    """The blocks of the page: language, file, text."""
    import re

    page = (ROOT / "docs" / "writing-passes.md").read_text()
    found = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [(kind, file, text) for kind, file, text in found]


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex
    import tomllib

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, Any] = {"dfc": dfc, "__name__": "page"}
    seen = set()
    for kind, file, text in blocks():
        seen.add(kind)
        if file:
            (tmp_path / file).write_text(text)
        elif kind == "python":
            exec(compile(text, "page.md", "exec"), space)
        elif kind == "toml":
            groups = tomllib.loads(text)["project"]["entry-points"]
            assert set(groups) == {"dfc.passes", "dfc.ops", "dfc.engines"}
        elif kind == "console":
            for line in text.splitlines():
                _, command, *given = shlex.split(line)
                assert command == "dfc" and main(given) == 0, capsys.readouterr().err
    assert seen == {"python", "dfc", "toml", "console"}
    shown = capsys.readouterr().out
    assert "folded     %mul (aten.mul.Scalar" in shown and "the weights hold 0.25" in shown
    for name in ("my_passes", "my_ops"):
        sys.modules.pop(name, None)


def test_the_example_pass_runs_by_itself() -> None:
    shown = python("examples/custom_pass.py").stdout
    assert "fold_scale               4 changes" in shown and "proved" in shown
    assert "the weights hold the factor 0.25" in shown and "layers.0..3.self_attn (4)" in shown


def test_the_example_rule_is_proved_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "examples" / "custom_rule.dfc")
    assert main(["test", file]) == 0
    assert "swish: proved" in capsys.readouterr().out
    from dfc.cli.extensions import load_extension

    load_extension(file)

    class Swish(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    compiled = dfc.compile(
        Swish(), (torch.randn(4),), passes=[find_pass("fuse", {"rules": ("custom_rule",)})]
    )
    assert [n.op for n in compiled.graph.nodes] == ["aten.silu.default"]
    plan = resolve(Source(Path(file).read_text(), file))
    assert [p.name for p in plan.passes()] == ["canonicalize", "fuse"]
