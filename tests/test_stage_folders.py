"""Folders of ONNX stages: equal to the model, whole or not there, and refused when changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.emit.onnx_stages import export_stages
from dfc.errors import DfcError
from dfc.manifest import write_manifest
from dfc.package import read_package, read_probes
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.bundle import read_bundle
from tests.test_pipeline import B, captured, leaves, stages

S = torch.export.Dim("S", min=1, max=64)


class Many(nn.Module):
    """Several inputs of different types, one of them handed back; several outputs; two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor) -> dict[str, Any]:
        x = first = self.table(ids) * scale
        for layer in self.layers:
            x = torch.where(keep[..., None], torch.relu(layer(x)), first)
        return {"logits": x @ self.table.weight.T, "parts": (x.mean(1), keep), "best": x.argmax(-1)}


def many(size: int, length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(size)
    ids = torch.randint(12, (size, length))
    return ids, torch.rand(size, 1, 8) + 0.5, torch.rand(size, length) > 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {0: B, 1: S}
    compiled = dfc.compile(
        Many().eval(), many(4, 3), dynamic_shapes=(sizes, {0: B}, sizes), engine="eager", passes=[]
    )
    path = tmp_path_factory.mktemp("stages") / "many.stages"
    compiled.export(path, stages=3)
    return path


def reference() -> nn.Module:
    torch.manual_seed(0)
    return Many().eval()


def flat(x: dict[str, Any]) -> list[torch.Tensor]:
    return [x["logits"], *x["parts"], x["best"]]


def test_a_folder_gives_what_the_model_gives_at_any_size(folder: Path) -> None:
    """Shape buckets follow each other without new sessions or threads; no size divides evenly."""
    model = reference()
    with read_bundle(folder).pipeline(microbatches=4) as pipeline, torch.no_grad():
        for size, length in ((1, 1), (5, 3), (11, 7), (6, 20), (5, 3)):
            args = many(size, length)
            found, expected = pipeline(*args), model(*args)
            assert list(found) == list(expected)
            for f, e in zip(flat(found), flat(expected), strict=True):
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
            assert pipeline.report().program.microbatches == min(4, size)


@pytest.mark.parametrize("name", ["branches", "tied", "unet"])
def test_skips_and_shared_weights_are_in_their_stages(name: str, tmp_path: Path) -> None:
    model, args, graph = captured(name)
    compiled = dfc.compile(graph, args, engine="eager", passes=[])
    path = tmp_path / "stages"
    placed = stages(compiled.graph, 4)
    compiled.export(path, stages=placed)
    bundle = read_bundle(path)
    with bundle.pipeline(microbatches=1) as pipeline, torch.no_grad():
        for f, e in zip(leaves(pipeline(*args)), leaves(model(*args)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    data = bundle.data
    assert [s["file"] for s in data["stages"]] == [f"stage_0{i}.onnx" for i in range(4)]
    skips = [e for e in data["edges"] if e["to"] - e["from"] > 1]
    assert skips or name != "unet"
    if name == "tied":
        assert data["tied"] == [{"parameter": "table.weight", "stages": [0, 3]}]


def test_the_files_are_all_that_others_need(folder: Path) -> None:
    """Plain ONNX Runtime and numpy, told by plan.json alone, give the same results."""
    data = json.loads((folder / "plan.json").read_text())
    assert data["sizes"] == {"B": [1, 64], "S": [1, 64]} and data["batch"] == "B"
    assert "B" in data["inputs"][0]["type"] and data["program"]["placement"] == [0, 1, 2]
    args = many(5, 4)
    made = {(HOST, p["name"]): x.numpy() for p, x in zip(data["inputs"], args, strict=True)}
    for i, stage in enumerate(data["stages"]):
        onnx.checker.check_model(str(folder / stage["file"]), full_check=True)
        session = onnxruntime.InferenceSession(folder / stage["file"])
        feeds = {p["name"]: made[p["from"], p["as"]] for p in stage["inputs"]}
        names = [p["name"] for p in stage["outputs"]]
        results = session.run(names, feeds)
        made.update(((i, n), x) for n, x in zip(names, results, strict=True))
    with torch.no_grad():
        expected = flat(reference()(*args))
    for port, e in zip(data["outputs"], expected, strict=True):
        np.testing.assert_allclose(made[port["from"], port["as"]], e, rtol=1e-4, atol=1e-5)


def test_the_files_chain_by_the_names_of_their_values(folder: Path) -> None:
    """Without plan.json: what one file hands on is called as the next one asks for it."""
    graph, args = reference(), many(5, 4)
    values = {}
    for file in sorted(folder.glob("stage_*.onnx")):
        session = onnxruntime.InferenceSession(file)
        if not values:
            first = json.loads((folder / "plan.json").read_text())["inputs"]
            values = {p["name"]: x.numpy() for p, x in zip(first, args, strict=True)}
        names = [x.name for x in session.get_outputs()]
        results = session.run(names, {x.name: values[x.name] for x in session.get_inputs()})
        assert not {*names} & {*values}, "a name means one value"
        values.update(zip(names, results, strict=True))
    with torch.no_grad():
        expected = flat(graph(*args))
    whole = json.loads((folder / "plan.json").read_text())["outputs"]
    for port, e in zip(whole, expected, strict=True):
        np.testing.assert_allclose(values[port["as"]], e, rtol=1e-4, atol=1e-5)


def test_a_folder_whose_outputs_are_numbered_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema 1, as it was written."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    graph = dfc.trace(model, (torch.randn(2, 3),))
    stage_of = {n: i for i, n in enumerate(graph.nodes)}
    export_stages(graph, tmp_path / "new", stage_of=stage_of)
    monkeypatch.setattr("dfc.emit.onnx_stages.SCHEMA", 1)
    export_stages(graph, tmp_path / "old", stage_of=stage_of)
    monkeypatch.undo()
    for folder, schema, name in (("new", 2, "linear"), ("old", 1, "output.0")):
        data = read_bundle(tmp_path / folder).data
        told = data["stages"][0]["outputs"][0]["name"], data["stages"][1]["inputs"][0]["as"]
        assert (data["schema"], *told) == (schema, name, name)
        assert main(["run", str(tmp_path / folder), "--random"]) == 0


def test_a_recipe_emits_a_folder_that_the_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    model = folder.parent / "model.py"
    model.write_text(
        "import torch\nfrom tests.test_stage_folders import B, S, Many, many\n"
        "def build():\n    torch.manual_seed(0)\n    sizes = {0: B, 1: S}\n"
        "    return Many().eval(), many(4, 3), {}, (sizes, {0: B}, sizes)\n"
    )
    recipe = tmp_path / "small.dfc"
    recipe.write_text("dfc 1\n\nrecipe small {\n  emit onnx with stages=2\n}\n")
    package = tmp_path / "many.dfcpkg"
    given = ["compile", f"{model}:build", "-r", str(recipe), "--engine", "eager", "-o"]
    assert main([*given, str(package)]) == 0
    made = tmp_path / "many.stages"
    assert (made / "stage_01.onnx").exists() and not (made / "stage_02.onnx").exists()
    assert main([*given, str(package)]) == 2  # it exists
    capsys.readouterr()

    np.savez(tmp_path / "in.npz", **dict(zip(("ids", "scale", "keep"), many(7, 5), strict=True)))
    out, trace = tmp_path / "out.npz", tmp_path / "step.json"
    ran = ["run", str(made), str(tmp_path / "in.npz"), "-m", "3", "-o", str(out), "--trace"]
    assert main([*ran, str(trace), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engine"] == "onnxruntime" and told["pipeline"]["microbatches"] == 3
    assert {e["pid"] for e in json.loads(trace.read_text())["traceEvents"]} == {0, 1}
    with torch.no_grad():
        expected = flat(reference()(*many(7, 5)))
    with np.load(out) as found:
        for name, e in zip(("logits", "parts.0", "parts.1", "best"), expected, strict=True):
            np.testing.assert_allclose(found[name], e, rtol=1e-4, atol=1e-5)
    (example,) = read_probes(made / "probes.safetensors")  # and no results, which are large
    assert len(example.inputs) == 3 and not example.original and not example.witness
    assert main(["run", str(made)]) == 0  # on the example that it keeps
    assert "the step of 4 microbatches took" in capsys.readouterr().out
    assert main(["run", str(made), "--pipeline", "2"]) == 2


def test_a_partition_is_emitted_and_run_as_it_was_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of a rank, its stages and the number of microbatches come from the plan."""
    lane = "cpu(cores=1, mem=1GB, bw=1GB/s, peak=1GFLOPS)"
    recipe = (
        f"dfc 1\n\ntarget two {{\n  device a : {lane}\n  device b : {lane}\n"
        "  link a <-> b : pcie(bw=1GB/s, latency=1us)\n}\n\nrecipe r for two {\n"
        "  partition on a, b with microbatches=6\n  emit onnx with stages=separate\n}\n"
    )
    model, args, graph = captured("chain")
    compiled = dfc.compile(graph, args, recipe=recipe, engine="eager")
    assert compiled.plan is not None
    package, made = tmp_path / "chain.dfcpkg", tmp_path / "chain.stages"
    compiled.save(package)
    assert compiled.emit(tmp_path / "chain") == [str(made)]
    bundle = read_bundle(made)
    assert bundle.program == compiled.plan.program and bundle.program.microbatches == 6
    with bundle.pipeline() as pipeline, torch.no_grad():
        x = torch.randn(11, 8)
        torch.testing.assert_close(pipeline(x), model(x), rtol=1e-4, atol=1e-5)
    assert main(["run", str(package), "--size", "B=12", "--pipeline", "plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    assert told["microbatches"] == 6 and len(told["stages"]) == 2
    assert main(["run", str(package), "--pipeline", "some"]) == 2


def test_stages_are_those_of_the_graph_or_asked_for(tmp_path: Path) -> None:
    _, args, graph = captured("chain")
    compiled = dfc.compile(graph, args, engine="eager")
    with pytest.raises(DfcError, match=r"X005.*not partitioned") as error:
        compiled.export(tmp_path / "a", stages="separate")
    assert error.value.status == 2
    with pytest.raises(DfcError, match=r"X005.*`apart` are no stages"):
        compiled.export(tmp_path / "a", stages="apart")
    for node, stage in stages(compiled.graph, 2).items():
        compiled.graph.set_stage(node, stage)
    compiled.export(tmp_path / "a", stages="separate")
    assert len(read_bundle(tmp_path / "a").stages) == 2
    assert main(["compile", "x.py:f", "--stages", "2"]) == 2
    assert main(["compile", "x.py:f", "--onnx", str(tmp_path / "b"), "--stages", "no"]) == 2


def test_fewer_stages_than_asked_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "small.py"
    model.write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 4), (torch.ones(2, 4),)\n"
    )
    folder = str(tmp_path / "small.stages")
    given = ["compile", f"{model}:build", "--engine", "eager", "--onnx", folder, "--stages", "9"]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "1 stage, not 9: no more of its nodes can be apart" in told
    assert f"next: dfc run {folder} --random" in told


def test_a_folder_is_published_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, args, graph = captured("chain")
    compiled = dfc.compile(graph, args, engine="eager")
    path = tmp_path / "stages"
    compiled.export(path, stages=2)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(DfcError, match="D010"):
        compiled.export(path, stages=3)

    def fails(folder: Path) -> None:
        assert (folder / "stage_02.onnx").exists()
        raise DfcError("D013", "the disk is full", status=7)

    monkeypatch.setattr(compiled, "_write_example", fails)
    with pytest.raises(DfcError, match="the disk is full"):
        compiled.export(path, stages=3, force=True)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["stages"]
    monkeypatch.undo()
    compiled.export(path, stages=3, force=True)
    assert len(read_bundle(path).stages) == 3


def relist(path: Path) -> None:
    """A manifest for whatever the folder holds: what somebody with dfc at hand can do."""
    (path / "manifest.json").unlink()
    write_manifest(path, "stages")


def changed(path: Path, change: Any) -> None:
    data = json.loads((path / "plan.json").read_text())
    change(data)
    (path / "plan.json").write_text(json.dumps(data))
    relist(path)


def first_input(data: Any) -> None:
    data["stages"][1]["inputs"][0]["type"] = "f32[7]"


def other_program(data: Any) -> None:
    data["program"]["ranks"][1] = data["program"]["ranks"][1].replace("F(1,0) F(1,1)", "F(1,1)")


@pytest.mark.parametrize("change, said", [
    (lambda d: d.update(schema=7), "D061.*7"),
    (lambda d: d.update(edges=[]), r"D062.*`edges` is \[\]"),
    (first_input, r'D062.*stages\[1\].inputs\[0\].type` is "f32\[7\]"'),
    (lambda d: d["stages"][0].update(sha256="0" * 64), r"D062.*stages\[0\].sha256"),
    (lambda d: d["stages"][0].update(file="../x.onnx"), r"D062.*stages\[0\].file"),
    (lambda d: d.pop("program"), "D060.*KeyError: 'program'"),
    (lambda d: d["program"].update(placement=[0, 0, 0]), "D062.*placement"),
    (lambda d: d["program"].update(ranks=["0: F(0,0)"], placement=[0]), "D062.*1 stage.*has 3"),
    (other_program, r"N022.*F\(1,0\) is missing"),
], ids=range(9))  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, change: Any, said: str
) -> None:
    path = tmp_path / "stages"
    shutil.copytree(folder, path)
    changed(path, change)
    with pytest.raises(DfcError, match=said) as error, read_bundle(path).pipeline() as pipeline:
        pipeline(*many(8, 2))
    assert error.value.status == 2


def test_a_folder_of_stages_is_no_package_and_says_what_runs_it(folder: Path) -> None:
    with pytest.raises(DfcError, match=r"D040.*a folder of ONNX stages(.|\n)*`dfc run .*` runs"):
        read_package(folder)


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ("--on processes --links gloo", "--on, --links"),
        ("--devices cpu,cpu", "--devices"),
        ("--engine eager --pipeline 2 --on torchrun", "--pipeline, --engine, --on"),
    ],
)
def test_a_folder_leaves_no_choice_of_where_it_runs(
    folder: Path, given: str, left_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(folder), *given.split()]) == 2
    told = capsys.readouterr().err
    assert "cut into its stages already, and runs in ONNX Runtime in threads" in told
    assert f"leave out {left_out};" in told


def test_a_folder_runs_in_threads_also_if_that_is_said(folder: Path) -> None:
    assert main(["run", str(folder), "--on", "threads"]) == 0


def test_files_that_were_exchanged_damaged_or_lost_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stages"
    shutil.copytree(folder, path)
    last = path / "stage_02.onnx"
    whole = last.read_bytes()
    last.write_bytes(whole[:100] + b"?" + whole[101:])
    with pytest.raises(DfcError, match=r"D027.*stage_02.onnx. is damaged"):
        read_bundle(path)
    last.unlink()
    with pytest.raises(DfcError, match=r"D024.*stage_02.onnx. is missing"):
        read_bundle(path)
    (path / "stage_01.onnx").rename(last)
    (path / "stage_01.onnx").write_bytes(whole)  # each in the other's place, and listed so
    digests = json.loads((path / "plan.json").read_text())["stages"]
    changed(path, lambda d: (d["stages"][1].update(sha256=digests[2]["sha256"]),
                             d["stages"][2].update(sha256=digests[1]["sha256"])))  # fmt: skip
    with pytest.raises(DfcError, match=r"D063.*stage_01.onnx. has the (inputs|outputs)"):
        read_bundle(path).pipeline()
    last.write_bytes(b"not ONNX")
    relist(path)
    with pytest.raises(DfcError, match=r"D062.*stages\[2\].sha256"):
        read_bundle(path)


def test_a_folder_without_a_graph_or_with_another_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stages"
    shutil.copytree(folder, path)
    graph = path / "graph.dfc"
    text = graph.read_text()
    graph.write_text(text.replace(" stage 2", " stage 1"))
    relist(path)
    with pytest.raises(DfcError, match=r"D062.*3 stages"):
        read_bundle(path)
    graph.unlink()
    relist(path)
    with pytest.raises(DfcError, match=r"D060.*graph.dfc is missing"):
        read_bundle(path)
    assert main(["run", str(path)]) == 2


def test_a_model_that_hands_back_a_parameter_has_no_stages(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), self.layer.weight

    compiled = dfc.compile(Head(), (torch.randn(2, 3),), engine="eager")
    with pytest.raises(DfcError, match=r"X006.*`layer.weight`"):
        compiled.export(tmp_path / "stages", stages=1)
