"""Packages: what is saved comes back, whatever its type; what was changed is found and named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc import package
from dfc.cli import main
from dfc.manifest import NAME, write_manifest
from dfc.package import check_weights, read_package
from dfc.recipe.sources import DEFAULT_RECIPE
from dfc.recipe.tuning import tune

FILES = ["graph.dfc", "lock.json", "manifest.json", "probes.safetensors", "recipe.dfc",
         "report.json", "weights.safetensors"]  # fmt: skip


class Holds(nn.Module):
    """One buffer of any type, and a result that depends on it and on the input."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", held)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.held, Tensor)
        return x + self.held.to(x.dtype).sum(), self.held.flatten()


class Counts(nn.Module):
    """Writes to a buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.total += x.sum(0)
        return x * self.seen + self.total


def _net() -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.GELU(), nn.Linear(300, 2)).eval()
    return model, (torch.randn(3, 4),), ({0: torch.export.Dim("B", max=16)},)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "net.dfcpkg"
    model, args, shapes = _net()
    dfc.compile(model, args, dynamic_shapes=shapes, engine="eager").save(path)
    return path


def test_a_package_is_plain_files_and_no_code(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == FILES
    lock = json.loads((saved / "lock.json").read_text())
    assert lock["torch"] == torch.__version__.split("+")[0] and lock["engine"] == "eager"
    assert (saved / "recipe.dfc").read_text().startswith(f"dfc 1\n\nrecipe {DEFAULT_RECIPE} {{\n")
    manifest = json.loads((saved / NAME).read_text())
    assert [f["path"] for f in manifest["files"]] == [f for f in FILES if f != NAME]


def test_a_package_comes_back_whole(saved: Path) -> None:
    model, args, shapes = _net()
    compiled = dfc.compile(model, args, dynamic_shapes=shapes, engine="eager")
    assert re.fullmatch(r"<dfc.Compiled: \d+ nodes, run by eager>", repr(compiled))
    loaded = dfc.load(saved)
    assert loaded.graph == compiled.graph and str(loaded.graph) == str(compiled.graph)
    assert loaded.recipe == compiled.recipe
    assert loaded.report.proof == compiled.report.proof
    assert [p.label for p in loaded.probes] == [p.label for p in compiled.probes]
    for batch in (1, 5, 16):
        x = torch.randn(batch, 4)
        assert torch.equal(loaded(x), compiled(x))
    with pytest.raises(dfc.DfcError, match="K015"):
        loaded(torch.randn(17, 4))


def test_results_of_probes_that_outweigh_the_weights_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, 100)

    path, x = tmp_path / "wide.dfcpkg", torch.randn(20, 8)
    monkeypatch.setattr(package, "_RESULTS", 20_000)
    sizes = ({0: torch.export.Dim("B", min=1, max=64)},)
    compiled = dfc.compile(Wide(8, 8).eval(), (x,), dynamic_shapes=sizes, engine="eager")
    compiled.save(path)
    assert all(p.original is not None for p in compiled.probes)
    held = dfc.load(path).probes  # a row has 800 results of 4 bytes, and of 8 in float64
    assert [(len(p.inputs[0]), p.original is not None) for p in held] == [
        (20, False), (1, True), (21, False),
    ]  # fmt: skip
    assert (path / "probes.safetensors").stat().st_size < 20_000
    assert main(["verify", str(path), "--engine", "eager,onnxruntime"]) == 0
    told = capsys.readouterr().out
    assert "of 2 probes it holds inputs alone" in told and told.count("proved again on") == 2
    again = tmp_path / "again.dfcpkg"
    tuned = tune(path, ["eager"], seconds=0.01).compiled
    tuned.save(again)
    assert torch.equal(tuned(x), compiled(x))
    assert (again / "probes.safetensors").read_bytes() == (path / "probes.safetensors").read_bytes()
    # what lies there is believed as before: another result is found
    for results in (held[1].original, held[1].witness):
        results[0].add_(1)
    package.write_probes(tmp_path / "other", held)
    (tmp_path / "other").replace(path / "probes.safetensors")
    (path / NAME).unlink()
    write_manifest(path, package.KIND)
    assert main(["verify", str(path)]) != 0


def test_probes_whose_inputs_outweigh_the_weights_are_left_out_but_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(-1)

    path, x = tmp_path / "mean.dfcpkg", torch.randn(20, 100)
    monkeypatch.setattr(package, "_RESULTS", 1_000)
    sizes = ({0: torch.export.Dim("B", min=1, max=64)},)
    dfc.compile(Mean(), (x,), dynamic_shapes=sizes, engine="eager").save(path)
    held = dfc.load(path).probes
    assert [(len(p.inputs[0]), p.original is not None) for p in held] == [(20, True), (1, True)]
    monkeypatch.setattr(package, "_RESULTS", 30)  # none fits, nor do results
    dfc.load(path).save(path, force=True)
    assert [(len(p.inputs[0]), p.original) for p in dfc.load(path).probes] == [(20, None)]
    assert main(["verify", str(path)]) == 0
    told = capsys.readouterr().out
    assert "largest error against the original unknown: the original's results are not" in told


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.dfcpkg"
    dfc.load(saved).save(again)
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


@pytest.mark.parametrize(
    "held",
    [
        torch.randn(3, dtype=torch.complex64),
        torch.randn(2, 3).half(),
        torch.tensor([1.5, float("nan"), float("inf"), -0.0]).bfloat16(),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.tensor(2.5),
        torch.tensor([2**40, -1]),
        torch.arange(6, dtype=torch.uint8).reshape(2, 3).T,
        torch.randn(2, 2, dtype=torch.float64),
        torch.tensor([-128, 127], dtype=torch.int8),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}".removeprefix("torch."),
)
def test_every_type_survives(held: Tensor, tmp_path: Path) -> None:
    model = Holds(held)
    x = torch.ones(2, dtype=torch.complex64 if held.is_complex() else torch.float32)
    dfc.compile(model, (x,), engine="eager", passes=[]).save(tmp_path / "h.dfcpkg")
    loaded = dfc.load(tmp_path / "h.dfcpkg")
    check_weights(loaded.graph)
    for got, expected in zip(loaded(x), model(x), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))
    (p,) = loaded.graph.parameters.values()
    assert p.data is not None and torch.equal(
        torch.nan_to_num(p.data.tensor()), torch.nan_to_num(held)
    )
    assert main(["verify", str(tmp_path / "h.dfcpkg")]) == 0


def test_a_type_that_a_package_cannot_hold_is_named(tmp_path: Path) -> None:
    compiled = dfc.compile(
        Holds(torch.randn(3, dtype=torch.complex128)),
        (torch.ones(2, dtype=torch.complex64),),
        engine="eager",
        passes=[],
    )
    with pytest.raises(dfc.DfcError, match=r"!held: a package cannot hold c128") as found:
        compiled.save(tmp_path / "h.dfcpkg")
    assert found.value.status == 3
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_one_entry(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    ids = torch.tensor([[0, 4]])
    model = Tied()
    dfc.compile(model, (ids,), engine="eager").save(tmp_path / "t.dfcpkg")
    loaded = dfc.load(tmp_path / "t.dfcpkg")
    assert len(loaded.graph.parameters) == 1
    torch.testing.assert_close(loaded(ids), model(ids))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_its_file_named(saved: Path, tmp_path: Path, name: str) -> None:
    size = (saved / name).stat().st_size
    for i, at in enumerate((0, size // 2, size - 1)):
        broken = tmp_path / f"broken{i}.dfcpkg"
        shutil.copytree(saved, broken)
        data = bytearray((broken / name).read_bytes())
        data[at] ^= 1
        (broken / name).write_bytes(data)
        with pytest.raises(dfc.DfcError) as found:
            dfc.load(broken)
        assert found.value.status == 2
        assert name in found.value.message or (name == NAME and found.value.code == "D021")


@pytest.mark.parametrize("change", ["missing", "extra", "longer", "linked"])
def test_other_damage_is_named(saved: Path, tmp_path: Path, change: str) -> None:
    broken = tmp_path / "broken.dfcpkg"
    shutil.copytree(saved, broken)
    victim = broken / "weights.safetensors"
    if change == "missing":
        victim.unlink()
    elif change == "extra":
        (broken / "payload.pkl").write_bytes(b"x")
    elif change == "longer":
        victim.write_bytes(victim.read_bytes() + b"\0")
    else:
        victim.unlink()
        victim.symlink_to(saved / "weights.safetensors")
    with pytest.raises(dfc.DfcError) as found:
        dfc.load(broken)
    assert found.value.status == 2
    assert ("payload.pkl" if change == "extra" else "weights.safetensors") in found.value.message


def _forged(saved: Path, folder: Path, name: str, change: Callable[[str], str]) -> Path:
    """A package that somebody else wrote: its manifest is right, what it holds is not."""
    shutil.copytree(saved, folder)
    (folder / NAME).unlink()
    text = (folder / name).read_bytes().decode("latin-1")
    (folder / name).write_bytes(change(text).encode("latin-1"))
    write_manifest(folder, "package")
    return folder


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lock.json", lambda t: "{}"),
        ("lock.json", lambda t: t.replace('"eager"', '"../evil"')),
        ("report.json", lambda t: "[1, 2"),
        ("report.json", lambda t: t.replace('"model"', '"modell"')),
        ("graph.dfc", lambda t: t.replace("aten.gelu.default", "aten.gelu.nothing")),
        ("graph.dfc", lambda t: t.replace("f32[300, 4]", "f32[301, 4]")),
        ("weights.safetensors", lambda t: t.replace("F32", "F64")),
        ("weights.safetensors", lambda t: "\xff" * 64),
        ("weights.safetensors", lambda t: t.replace("0.weight", "9.weight")),
        ("probes.safetensors", lambda t: "\0" * 8),
        ("probes.safetensors", lambda t: t.replace("0.inputs.0", "0.inputs.z")),
    ],
)
def test_a_forged_package_is_refused(
    saved: Path, tmp_path: Path, name: str, change: Callable[[str], str]
) -> None:
    forged = _forged(saved, tmp_path / "forged.dfcpkg", name, change)
    with pytest.raises(dfc.DfcError) as found:
        dfc.load(forged)
    assert found.value.status == 2, found.value


def test_other_numbers_are_found_by_their_digest(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = _forged(saved, tmp_path / "f.dfcpkg", "weights.safetensors", lambda t: t[:-1] + "!")
    with pytest.raises(dfc.DfcError, match="D042"):
        check_weights(read_package(forged).graph)
    assert main(["verify", str(forged)]) == 2
    assert "are not those that the graph names" in capsys.readouterr().err


def test_verify_does_not_believe_the_report(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph is another one, the bytes are as listed, the report still says `proved`."""
    forged = _forged(
        saved, tmp_path / "f.dfcpkg", "graph.dfc",
        lambda t: t.replace('approximate="none"', 'approximate="tanh"'),
    )  # fmt: skip
    assert 'approximate="tanh"' in (forged / "graph.dfc").read_text()
    assert main(["verify", str(forged)]) == 4
    assert "too far from the witness" in capsys.readouterr().err


def test_state_stays_with_the_loaded_model(tmp_path: Path) -> None:
    model = Counts()
    x = torch.arange(6.0).reshape(2, 3)
    compiled = dfc.compile(model, (x,), engine="eager")
    assert compiled(x) is not None  # what one copy has seen is no part of the package
    compiled.save(tmp_path / "c.dfcpkg")
    loaded, other = dfc.load(tmp_path / "c.dfcpkg"), dfc.load(tmp_path / "c.dfcpkg")
    for i in range(3):
        torch.testing.assert_close(loaded(x + i), model(x + i))
    assert int(loaded.state["seen"]) == 3
    torch.testing.assert_close(loaded.state["total"], model.total)
    assert int(other.state["seen"]) == 0
    assert main(["verify", str(tmp_path / "c.dfcpkg")]) == 0


@dataclass
class Result:
    value: Tensor
    twice: Tensor


class Returns(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x + 1, x * 2)


def test_a_result_class_need_not_exist_where_it_is_loaded(tmp_path: Path) -> None:
    torch.export.register_dataclass(Result, serialized_type_name="test.Result")
    x = torch.ones(2)
    compiled = dfc.compile(Returns().eval(), (x,), engine="eager")
    assert type(compiled(x)) is Result
    compiled.save(tmp_path / "r.dfcpkg")
    assert type(dfc.load(tmp_path / "r.dfcpkg")(x)) is Result
    elsewhere = """if True:
        import sys, torch, dfc
        found = dfc.load(sys.argv[1])(torch.ones(2))
        assert found.value.tolist() == found["value"].tolist() == [2.0, 2.0]
        assert found.twice.tolist() == [2.0, 2.0]
        assert list(found) == ["value", "twice"]
    """
    argv = [sys.executable, "-c", elsewhere, str(tmp_path / "r.dfcpkg")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_numbers_among_inputs_and_outputs_survive(tmp_path: Path) -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor, n: int) -> tuple[Tensor, int]:
            return x.expand(n, 3) + 1.0, n

    shapes = {"x": None, "n": torch.export.Dim.DYNAMIC}
    model, args = Repeats().eval(), (torch.ones(3), 4)
    compiled = dfc.compile(model, args, dynamic_shapes=shapes, engine="eager")
    compiled.save(tmp_path / "n.dfcpkg")
    y, n = dfc.load(tmp_path / "n.dfcpkg")(torch.ones(3), 7)
    assert (tuple(y.shape), n) == ((7, 3), 7)
    assert main(["verify", str(tmp_path / "n.dfcpkg")]) == 0


def test_an_existing_package_is_replaced_only_by_force(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.dfcpkg"
    loaded = dfc.load(saved)
    loaded.save(path)
    with pytest.raises(dfc.DfcError, match="D010"):
        loaded.save(path)
    loaded.save(path, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(dfc.DfcError, match="D011"):
        loaded.save(tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "net.dfcpkg"]


def test_ops_of_transformers_are_found_where_it_is_not_imported() -> None:
    """A package of a mixture of experts is read in a process that never saw the model."""
    pytest.importorskip("transformers.integrations.moe")
    code = (
        "from dfc.ir.op import lookup; import dfc.ops;"
        "print(lookup('transformers.grouped_mm_fallback.default').name)"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "transformers.grouped_mm_fallback.default", done.stderr
