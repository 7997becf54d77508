"""Passes of the user's: a class, a function, what is wrong with them, what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import dfc
from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.recipe.resolve import resolve
from dfc.rewrite.pass_ import PASSES, find_pass, pass_classes
from dfc.testing import check_pass
from tests.customs import MODEL, load, python

pytestmark = pytest.mark.usefixtures("forgets_what_is_defined")


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
