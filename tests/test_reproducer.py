"""A wrong rewrite as a small folder that shows it again, until it is put right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.manifest import write_manifest
from dfc.reproducer import default_folder, replay, writer
from dfc.rewrite import rulesets
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import find_pass
from dfc.rewrite.probe import make_probes
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rulesets import instead
from tests.seeded import BUGS, Bug, Seeded, host

RULES = """dfc 1
# A branch that is right.
rule merge_relus {
  match   y = relu(relu(x))
  rewrite y = relu(x)
  exact
}

# One that is not: the sum may be negative.
rule drop_relu {
  match   y = relu(add(a, b))
  rewrite y = add(a, b)
  exact
}

rule silu_from_parts {
  match   y = mul(x, sigmoid(x))
  rewrite y = silu(x)
  within  1e-6
}
"""


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)
        self.up = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        h = h * torch.sigmoid(h)
        r = torch.relu(x + self.up(h))
        return torch.relu(torch.relu(r - h))


def model() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[Block() for _ in range(3)]).eval(), (torch.randn(2, 8),)


def outcome_of(folder: Path, rules: str = RULES, dynamic: bool = False) -> Any:
    """The model fused with rules of which one is wrong, nothing proved before."""
    module, args = model()
    shapes = ({0: torch.export.Dim("B", max=16)},) if dynamic else None
    graph = dfc.trace(module, args, dynamic_shapes=shapes and {"input": shapes[0]})
    probes = make_probes(graph, list(args))
    with instead(rules_of(Source(rules, "mine.dfc"), "mine")):
        return run_passes(
            graph, [find_pass("fuse", {"rules": ("mine",)})], probes=probes, on_fault=writer(folder)
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("place") / "deep" / "reproducers"
    outcome = outcome_of(place)
    assert [x.rule for x in outcome.left_out] == ["mine.drop_relu"] * 3
    return [Path(x.reproducer) for x in outcome.left_out]


def test_each_wrong_rewrite_leaves_its_own_folder(folders: list[Path]) -> None:
    assert len(set(folders)) == 3 and all(f.is_dir() for f in folders)
    assert folders[0].parent.stat().st_mode & 0o777 == 0o700
    names = {str(p.relative_to(folders[0])) for p in folders[0].rglob("*") if p.is_file()}
    assert names == {
        "manifest.json", "README.txt", "graph.dfc", "weights.safetensors", "probe.safetensors",
        "recipe.dfc", "rules/mine.dfc",
    }  # fmt: skip


def test_it_holds_the_matched_nodes_alone(folders: list[Path]) -> None:
    graph = dfc.parse((folders[0] / "graph.dfc").read_text())
    assert [n.op for n in graph.nodes] == ["aten.add.Tensor", "aten.relu.default"]
    assert not graph.parameters, "weights that the match does not read are left out"
    assert sum(p.stat().st_size for p in folders[0].rglob("*")) < 40_000


def test_the_readme_tells_the_story(folders: list[Path]) -> None:
    text = (folders[0] / "README.txt").read_text()
    assert "`mine.drop_relu` at %relu" in text and "test_reproducer.py:" in text
    assert "the rule stands at mine.dfc:10:1" in text
    assert "witness" in text and f"dfc run {folders[0]}" in text


def test_it_is_replayed_on_the_command_line(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(folders[0])]) == 4
    shown = capsys.readouterr().out
    assert "still wrong" in shown and "allowed" in shown
    assert main(["run", str(folders[0]), "--json"]) == 4
    data = json.loads(capsys.readouterr().out)
    assert data["wrong"] and data["nodes"] == 2 and data["elements"]
    assert data["elements"][0]["error"] > data["elements"][0]["allowed"]


def test_replaying_leaves_the_users_rules_as_they_are(folders: list[Path]) -> None:
    mine = rules_of(Source(RULES.replace("drop_relu", "another"), "mine.dfc"), "mine")
    with instead(mine):
        assert replay(folders[0]).happens
        assert rulesets.all_sets()["mine"] is mine
    assert "mine" not in rulesets.all_sets()


def test_a_rule_that_was_put_right_is_gone(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = tmp_path / "fixed"
    shutil.copytree(folders[0], fixed)
    rules = fixed / "rules" / "mine.dfc"
    rules.write_text(
        rules.read_text().replace("rewrite y = add(a, b)", "rewrite y = relu(add(b, a))")
    )
    manifest = json.loads((fixed / "manifest.json").read_text())
    (fixed / "manifest.json").unlink()
    write_manifest(fixed, "reproducer", manifest["extra"])
    with pytest.raises(DfcError, match="R040"):
        replay(fixed)  # this one never ends, which is an error of the rule
    rules.write_text(RULES.replace("rewrite y = add(a, b)", "rewrite y = clamp_min(add(a, b), 0)"))
    (fixed / "manifest.json").unlink()
    write_manifest(fixed, "reproducer", manifest["extra"])
    assert main(["run", str(fixed)]) == 0
    assert "right: what was wrong no longer is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["graph.dfc", "probe.safetensors", "recipe.dfc", "rules/mine.dfc"])
def test_a_changed_byte_is_refused(folders: list[Path], tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert main(["run", str(copy)]) == 2


HOSTILE = {
    "graph.dfc": [
        "dfc 1\n",
        "\xff\x00",
        "dfc 1\ngraph @part(%x: f32[2]) -> f32[2] {\n  return %x\n}\n",
        "dfc 1\ngraph @part(%x: f32[2], %y: f32[9]) -> f32[2] {\n  return %x\n}\n",
    ],
    "recipe.dfc": [
        "dfc 1\nrecipe r {\n}\n",
        "dfc 1\nrecipe r {\n  cse\n  dce\n}\n",
        "dfc 1\nimport \"/etc/passwd\"\nrecipe r {\n  cse\n}\n",
        "dfc 1\nrecipe r {\n  os.system\n}\n",
    ],
    "rules/mine.dfc": ["dfc 1\nrule r {\n  match y = __import__(x)\n  rewrite y = x\n  exact\n}\n"],
    "probe.safetensors": ["", "not safetensors at all, by any means"],
    "weights.safetensors": ["", "not safetensors at all, by any means"],
    "README.txt": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, text", [(n, t) for n, texts in HOSTILE.items() for t in texts], ids=str
)
def test_a_folder_that_somebody_else_wrote_is_bad_input(
    folders: list[Path], tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    (copy / name).write_text(text, encoding="latin-1")
    extra = json.loads((copy / "manifest.json").read_text())["extra"]
    (copy / "manifest.json").unlink()
    write_manifest(copy, "reproducer", extra)
    assert main(["run", str(copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_sizes_that_are_symbols_stay_so(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, dynamic=True)
    graph = dfc.parse((Path(outcome.left_out[0].reproducer) / "graph.dfc").read_text())
    assert [str(v.type) for v in graph.inputs] == ["f32[B, 8]"] * 2 and "B" in graph.ranges
    assert replay(outcome.left_out[0].reproducer).happens


@pytest.mark.parametrize("b", [b for b in BUGS if b.by_results], ids=str)
def test_every_seeded_bug_is_reduced(b: Bug) -> None:
    graph, probes = host()
    cases = []

    def reduce_it(fault: Any) -> str:
        from dfc.rewrite.reduce import reduce

        cases.append(reduce(fault))
        return ""

    run_passes(graph, [Seeded((b,))], probes=probes, on_fault=reduce_it)
    (case,) = cases
    assert case is not None and case.wrong() is not None
    assert len(case.graph) <= 4, str(case.graph)


# Where, and how many


def test_the_place_is_the_users_cache_unless_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFC_REPRODUCERS", "none")
    assert default_folder() is None
    monkeypatch.setenv("DFC_REPRODUCERS", "/somewhere")
    assert default_folder() == Path("/somewhere")
    monkeypatch.delenv("DFC_REPRODUCERS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/cache/dfc/reproducers")


def test_the_same_fault_is_written_once(tmp_path: Path) -> None:
    first, second = (outcome_of(tmp_path).left_out for _ in range(2))
    assert [x.reproducer for x in first] == [x.reproducer for x in second]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfc.reproducer.MAX_BYTES", 100)
    outcome = outcome_of(tmp_path)
    assert "not written: it needs" in outcome.left_out[0].reproducer
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_costs_only_the_reproducer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = outcome_of(tmp_path / "file" / "place")
    assert "not written" in outcome.left_out[0].reproducer
    assert outcome.reports[0].verdict == "proved"


def test_compile_writes_them_and_says_where(tmp_path: Path) -> None:
    module, args = model()
    with instead(rules_of(Source(RULES, "mine.dfc"), "mine")):
        compiled = dfc.compile(
            module, args, passes=[find_pass("fuse", {"rules": ("mine",)})], engine="eager",
            reproducers=tmp_path,
        )  # fmt: skip
    told = [n for n in compiled.report.notes if "mine.drop_relu" in n]
    assert len(told) == 3 and str(tmp_path) in told[0]
    again = type(compiled.report).from_json(compiled.report.to_json())
    assert again.passes == compiled.report.passes
