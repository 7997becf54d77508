"""Ops of the user's, the rules that use them, and engines."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.errors import DfcError
from dfc.ir.op import restored_ops
from dfc.rewrite.pass_ import find_pass
from dfc.testing import check_op
from tests.customs import MODEL, RULES, load

pytestmark = pytest.mark.usefixtures("forgets_what_is_defined")


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
