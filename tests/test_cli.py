"""Every verb of the `dfc` command: what it prints, what it leaves, and its exit status."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dfc
from dfc.cli import main
from dfc.cli.command import VERBS
from dfc.cli.steps import parse_steps
from dfc.recipe.sources import DEFAULT_RECIPE
from tests.command import NET, Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    (made / "net.py").write_text(NET)
    return made


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    path = folder / "net.dfcpkg"
    assert main(["compile", f"{folder}/net.py:build", "-o", str(path), "--engine", "eager"]) == 0
    return path


@pytest.fixture(scope="module")
def ids(folder: Path) -> Path:
    path = folder / "ids.dfcpkg"
    assert main(["compile", f"{folder}/net.py:ids", "-o", str(path), "--engine", "eager"]) == 0
    return path


# the command itself


def test_help_costs_little_more_than_its_library() -> None:
    """In processor time, which a neighbour on the same core stretches: typer's own with it."""
    took: dict[str, float] = {}
    for _ in range(5):
        for code in ("import dfc.cli; dfc.cli.main(['--help'])", "import typer"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            took[code] = min(took.get(code, 9.0), used)
    help, typer = took.values()
    assert help < 1.7 * typer


@pytest.mark.parametrize(
    ("argv", "imported"), [(["--help"], set()), (["doctor", "--help"], {"doctor"})]
)
def test_help_imports_the_verb_that_was_asked_for_alone(
    argv: list[str], imported: set[str]
) -> None:
    code = (
        f"import sys, dfc.cli; status = dfc.cli.main({argv});"
        "print(status, *(name for name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    status, *modules = done.stderr.split()
    assert status == "0"
    assert {f"dfc.cli.{verb}" for verb in VERBS} & {*modules} == {f"dfc.cli.{v}" for v in imported}
    assert {"torch", "onnx", "onnxruntime", "numpy", "rich"} & {*modules} == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_and_described_options(run: Run, verb: str) -> None:
    done = run(verb, "--help")
    assert done.status == 0
    assert done.out.splitlines()[2].strip() == VERBS[verb]  # as the overview says it
    examples = [x for x in done.out.splitlines() if x.startswith(f"    dfc {verb}")]
    assert 1 <= len(examples) <= 4


def test_overview_names_every_verb_whole(run: Run) -> None:
    done = run("--help")
    listed = done.out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == [*VERBS]
    assert "..." not in listed


def test_version_and_no_arguments(run: Run) -> None:
    assert run("--version").out == f"dfc {dfc.__version__}\n"
    assert run().status == 0


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["compil", "x"], "did you mean `compile`"),
        (["export", "x"], "`dfc compile MODEL --onnx FILE` writes ONNX"),
        (["compile"], "dfc compile --help"),
        (["compile", "x", "--fast"], "dfc compile --help"),
        (["compile", "x", "--engin", "eager"], "did you mean `--engine`?"),
        (["run", "x", "--nope"], "help: see `dfc run --help`"),
        (["bench", "x", "--seconds", "soon"], "dfc bench --help"),
        (["list", "pases"], "did you mean `passes`"),
    ],
)
def test_a_wrong_command_line_is_status_2(run: Run, argv: list[str], hint: str) -> None:
    done = run(*argv)
    assert (done.status, done.out) == (2, "")
    assert "error[Q010]" in done.err and hint in done.err
    assert done.err.lower().count("did you mean") <= 1


# compile


def test_compile_tells_the_story(run: Run, folder: Path, tmp_path: Path) -> None:
    out, onnx, page = tmp_path / "a.dfcpkg", tmp_path / "a.onnx", tmp_path / "a.html"
    done = run("compile", f"{folder}/net.py:build", "-o", out, "--onnx", onnx, "--html", page)
    assert done.status == 0, done.err
    for part in ("proved on 3 probes", "before", "after", "fold_batch_norm", "largest error",
                 f"wrote {out}", f"wrote {onnx}", f"next: dfc bench {out}"):  # fmt: skip
        assert part in done.out
    assert len(done.out.splitlines()) < 40
    assert max(map(len, done.out.splitlines())) < 200
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.dfcpkg", "a.html", "a.onnx"]

    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 8)
    logits, total = session.run(None, {"x": x.numpy()})
    expected = dfc.load(out)(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected["logits"])
    torch.testing.assert_close(torch.tensor(total), expected["total"])


def test_compile_json_is_data_alone(run: Run, folder: Path) -> None:
    done = run("compile", f"{folder}/net.py:build", "--json", "--engine", "eager",
               "--print-after", "all")  # fmt: skip
    assert done.status == 0
    data = done.data
    assert data["engine"] == "eager" and data["report"]["proved"]
    assert data["largest_error"]["output"] in ("logits", "total")
    assert data["report"]["nodes_after"] == data["report"]["nodes_before"] - 1
    assert done.err.count("# after ") == 7


def test_compile_takes_passes_with_options(run: Run, folder: Path) -> None:
    done = run("compile", f"{folder}/net.py:build", "-p", "canonicalize,cse{limit=3}", "--json",
               "--engine", "eager", "--print-after", "cse")  # fmt: skip
    assert [p["step"] for p in done.data["report"]["passes"]] == ["canonicalize", "cse{limit=3}"]
    assert done.err.count("# after cse{limit=3}\ndfc 1\n") == 1


def test_compile_graph_text_is_unproved(run: Run, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "net.dfc"
    text.write_text(run("show", f"{folder}/net.py:build").out)
    done = run("compile", text, "-o", tmp_path / "n.dfcpkg", "--json")
    assert done.status == 0
    assert done.data["report"]["proof"] == "unproved"
    assert any("no weights" in n for n in done.data["report"]["notes"])
    ran = run("run", tmp_path / "n.dfcpkg", "--random")
    assert ran.status == 2 and "no weights" in ran.err
    verified = run("verify", tmp_path / "n.dfcpkg")
    assert verified.status == 0 and "unproved: it holds no weights" in verified.out


def test_weights_come_from_a_file(run: Run, folder: Path, package: Path, tmp_path: Path) -> None:
    """For a graph's text, whose digests they must have, and for a model on the meta device."""
    text, weights, other = (
        tmp_path / name for name in ("net.dfc", "a.safetensors", "b.safetensors")
    )
    text.write_text(run("show", f"{folder}/net.py:build").out)
    space: dict[str, Any] = {}
    exec(NET, space)
    held = space["build"]()[0].state_dict()
    save_file(held, weights)
    save_file({name: x + 1 for name, x in held.items()}, other)
    expected = run("run", package, "--random", "--size", "B=3", "--json").data["outputs"]
    for model, size in ((text, ["--size", "B=3"]), (f"{folder}/net.py:meta", [])):
        out = tmp_path / "n.dfcpkg"
        done = run("compile", model, "--weights", weights, "-o", out, "--force", "--json",
                   "--engine", "eager")  # fmt: skip
        assert done.status == 0, done.err
        found = run("run", out, "--random", *size, "--json").data["outputs"]
        for a, b in zip(found, expected, strict=True):
            assert a["type"] == b["type"] and a["mean"] == pytest.approx(b["mean"], abs=1e-6)
        if model == text:
            assert done.data["report"]["proved"]
            assert any("inputs drawn for it" in note for note in done.data["report"]["notes"])
    wrong = run("compile", text, "--weights", other)
    assert wrong.status == 2 and "D042" in wrong.err and "are not those that" in wrong.err
    given = run("compile", f"{folder}/net.py:build", "--weights", weights)
    assert given.status == 2 and "the model has all its weights" in given.err


def test_compile_a_model_without_weights(run: Run, folder: Path) -> None:
    done = run("compile", f"{folder}/net.py:meta")
    assert done.status == 0 and "unproved" in done.out and "no weights" in done.out


def test_compile_a_package_again(run: Run, package: Path) -> None:
    done = run("compile", package, "--json", "--engine", "eager")
    assert done.status == 0 and done.data["report"]["proved"]


def test_compile_an_exported_program(run: Run, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    x = torch.randn(3, 4)
    batch = torch.export.Dim("batch", max=32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    out = tmp_path / "m.dfcpkg"
    done = run("compile", tmp_path / "m.pt2", "-o", out, "--engine", "eager")
    assert done.status == 0, done.err
    y = torch.randn(7, 4)
    torch.testing.assert_close(dfc.load(out)(y), model(y))


def test_compile_a_module_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_test").mkdir()
    (tmp_path / "nets_of_test" / "small.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    done = run("compile", "nets_of_test.small:build", "--engine", "eager")
    assert done.status == 0, done.err


# run


def test_run_reads_npz_and_writes_npz(run: Run, package: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    done = run("run", package, tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert done.status == 0, done.err
    assert "logits  f32[2, 4]" in done.out
    expected = dfc.load(package)(torch.from_numpy(x))
    with np.load(tmp_path / "out.npz") as found:
        assert sorted(found.files) == ["logits", "total"]
        assert np.array_equal(found["logits"], expected["logits"].numpy())


def test_run_reads_npy_in_order(run: Run, package: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 8), np.float32))
    done = run("run", package, tmp_path / "x.npy", "--json")
    assert done.status == 0 and done.data["outputs"][1]["mean"] == 8.0


def test_run_keeps_bfloat16_in_safetensors(run: Run, ids: Path, tmp_path: Path) -> None:
    save_file(
        {"ids": torch.tensor([[1, 2]]), "scale": torch.tensor(2.0)}, tmp_path / "i.safetensors"
    )
    done = run("run", ids, tmp_path / "i.safetensors", "-o", tmp_path / "o.safetensors")
    assert done.status == 0, done.err
    found = load_file(tmp_path / "o.safetensors")
    assert found["output.1"].dtype == torch.bfloat16
    assert found["output.0"].shape == (1, 2, 4)
    refused = run("run", ids, tmp_path / "i.safetensors", "-o", tmp_path / "o.npz")
    assert refused.status == 2 and "numpy has no type" in refused.err
    assert not (tmp_path / "o.npz").exists()


def test_run_draws_inputs_in_range(run: Run, ids: Path, tmp_path: Path) -> None:
    argv = ["run", ids, "--random", "--size", "B=4,S=16", "--json"]
    first, again, other = run(*argv), run(*argv), run(*argv, "--seed", "1")
    assert first.status == 0, first.err
    assert first.data == again.data != other.data
    assert [o["type"] for o in first.data["outputs"]] == ["f32[4, 16, 4]", "bf16[4, 16]"]
    assert 0 <= first.data["outputs"][1]["min"] <= first.data["outputs"][1]["max"] <= 9


def test_run_without_inputs_takes_the_example(run: Run, package: Path, folder: Path) -> None:
    of_package = run("run", package, "--json").data["outputs"]
    of_model = run("run", f"{folder}/net.py:build", "--json").data["outputs"]
    assert of_package == of_model


# bench, verify, show


def test_bench_puts_the_model_beside_the_engines(run: Run, folder: Path) -> None:
    done = run("bench", f"{folder}/net.py:build", "--seconds", "0.05", "--json", "--size", "B=6")
    assert done.status == 0, done.err
    rows = done.data["engines"]
    assert [r["engine"] for r in rows] == ["pytorch", "eager", "onnxruntime"]
    assert rows[0]["ratio"] == 1.0
    assert all(r["p50_ms"] > 0 and r["spread_ms"] >= 0 and r["runs"] >= 5 for r in rows)
    assert all(r["error"] < 1e-5 for r in rows[1:])


def test_bench_prints_a_table(run: Run, package: Path) -> None:
    done = run("bench", package, "--seconds", "0.05", "--engine", "eager")
    assert done.status == 0 and "1.00x" in done.out and "runs alternate" in done.out


def test_verify_proves_again(run: Run, package: Path) -> None:
    done = run("verify", package, "--engine", "eager,onnxruntime")
    assert done.status == 0, done.err
    assert "proved again on eager" in done.out and "proved again on onnxruntime" in done.out
    data = run("verify", package, "--json").data
    assert data["engines"][0]["agrees"] and data["engines"][0]["largest_error"]["error"] < 1e-5
    assert run("verify", package, "--expect", f"sha256:{data['sha256']}").status == 0
    assert run("verify", package, "--expect", "sha256:" + "0" * 64).status == 2


def test_verify_finds_an_engine_that_is_wrong(
    run: Run, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.runtime.engines.eager import Eager

    honest = Eager.build

    def skewed(self: Any, *args: Any) -> Any:
        build = honest(self, *args)
        return lambda inputs: [x * 1.01 for x in build(inputs)]

    monkeypatch.setattr(Eager, "build", skewed)
    done = run("verify", package, "--engine", "eager")
    assert done.status == 4 and "WRONG on eager" in done.out and "V033" in done.err


def test_show_prints_text_that_reads_back(run: Run, package: Path, folder: Path) -> None:
    text = run("show", package).out
    assert dfc.parse(text) == dfc.load(package).graph
    assert str(dfc.parse(text)) == text
    assert "batch_norm" in run("show", f"{folder}/net.py:build").out


def test_show_in_summary_and_resolved(run: Run, package: Path) -> None:
    summary = run("show", package, "--summary")
    assert "aten.linear.default" in summary.out and "1..64" in summary.out
    resolved_ = run("show", package, "--resolved")
    assert (
        f"recipe {DEFAULT_RECIPE} {{" in resolved_.out and "\n  fold_batch_norm\n" in resolved_.out
    )
    data = run("show", package, "--json").data
    assert data["summary"]["ops"]["aten.linear.default"] == 2
    assert data["summary"]["inputs"] == {"x": "f32[B, 8]"}
    assert data["resolved"]["engine"] == "eager" and data["text"].startswith("dfc 1\n")
    assert set(run("show", package, "--summary", "--json").data) == {"model", "summary"}


# list, doctor


def test_list_names_passes_engines_and_ops(run: Run) -> None:
    passes = {p["name"]: p for p in run("list", "--json").data}
    assert {"canonicalize", "cse", "dce", "fold_batch_norm", "fold_constants"} <= set(passes)
    assert passes["cse"]["options"] == [
        {"name": "limit", "type": "whole number or none", "default": "none"},
        {"name": "skip", "type": "list of whole number", "default": "[]"},
    ]
    assert all(p["does"] and p["numerics"] for p in passes.values())
    shown = run("list", "passes", "pin").out
    assert "select: selector, device: name\n" in " ".join(shown.split(" ")), "what must be given"
    engines = {e["name"]: e for e in run("list", "engines", "--json").data}
    assert engines["eager"]["state"] == engines["onnxruntime"]["state"] == "available"
    assert "dfc.linear_gelu" in run("list", "ops").out
    assert "aten.cumsum.default" in run("list", "ops", "cumsum").out


def test_doctor_knows_what_is_here_and_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("doctor", "--json")
    assert done.status == 0
    assert done.data["versions"]["torch"] == torch.__version__
    assert done.data["cpu"]["cores"] >= 1 and done.data["cpu"]["memory_bytes"] > 1 << 28
    from dfc.cli import doctor

    monkeypatch.setitem(doctor._NEEDED, "no-such-library", "nothing")
    broken = run("doctor")
    assert broken.status == 7 and "missing: pip install no-such-library" in broken.out


# small parts


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("cse", ["cse"]),
        (" cse{limit=3} ,dce,", ["cse{limit=3}", "dce"]),
        ("cse{skip=(3, 5)}", ["cse{skip=[3, 5]}"]),
        ("fold_constants{growth=0}", ["fold_constants{growth=0}"]),
        ("decompose{ops=('linear_w4',)}", ["decompose{ops=[linear_w4]}"]),
        ("decompose{ops=linear_w4}", ["decompose{ops=[linear_w4]}"]),
        ("decompose{ops=[]}, prune{refit=yes}", ["decompose", "prune{refit=yes}"]),
        ("sparsify{pattern='2:4', ratio=0.25}", ['sparsify{ratio=0.25, pattern="2:4"}']),
    ],
)
def test_steps_parse_and_print(text: str, steps: list[str]) -> None:
    parsed = parse_steps(text)
    assert [str(p) for p in parsed] == steps
    assert parse_steps(",".join(map(str, parsed))) == parsed


def test_the_reader_may_leave(package: Path) -> None:
    """`dfc show m | head` is no error."""
    code = f"from dfc.cli import main; raise SystemExit(main(['show', {str(package)!r}]))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr


# select


def test_select_shows_what_a_selector_finds(run: Run, folder: Path) -> None:
    model = f"{folder}/net.py:build"
    done = run("select", model, '"fc" | op(relu)')
    assert done.status == 0
    assert "2 of 5 nodes, in 2 modules; 2 of " in done.out and "fc.weight" in done.out
    data = run("select", model, 'param("*.weight") & op(linear)', "--json").data
    assert [p["name"] for p in data["parameters"]] == ["fc.weight", "head.weight"]
    assert data["parameters"][0]["bytes"] == 16 * 8 * 4
    assert data["modules"] == {"fc": 1, "head": 1}
    assert data["nodes"][0]["op"] == "aten.linear.default"
    plain = run("select", model, "fc*", "--json").data  # a shell takes quotes away
    assert plain["selector"] == '"fc*"' and plain["modules"] == {"fc": 1}


def test_select_names_what_is_near(run: Run, folder: Path) -> None:
    done = run("select", f"{folder}/net.py:build", '"hed"')
    assert (done.status, done.out) == (2, "")
    assert "SELECTOR:1:1: error[Q021]: no module matches `hed`" in done.err
    assert "did you mean `head`" in done.err
    assert run("select", f"{folder}/none.py:build", '"a').status == 2  # text first, then the model
