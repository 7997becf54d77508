"""What `--use` brings from a file, what installed packages bring, and the page about both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.lang.source import Source
from dfc.recipe.resolve import resolve
from dfc.rewrite.pass_ import find_pass
from tests.customs import ROOT, RULES, python

pytestmark = pytest.mark.usefixtures("forgets_what_is_defined")

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
