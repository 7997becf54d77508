"""`dfc tune`: a package's engine, chosen again by measuring, written all or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.package import read_package
from dfc.planning.host import is_another, machine_text, this_machine
from dfc.recipe.tuning import tune
from dfc.report import Report
from tests.work_clock import WorkClock

QUICK = ["--seconds", "0.05"]


class Net(torch.nn.Module):
    """A convolution, so that the layout matters, and a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(torch.relu(self.conv(x)).mean((2, 3))) + self.count


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tune") / "net.dfcpkg"
    sizes = {"x": {0: torch.export.Dim("B", max=16)}}
    dfc.compile(
        Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes, engine="eager"
    ).save(path)
    return path


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "net.dfcpkg"))


def run(capsys: Any, *words: str) -> tuple[int, Any, str]:
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def test_every_engine_is_measured_and_the_choice_written(package: Path, capsys: Any) -> None:
    names = "eager,eager:channels_last,onnxruntime,openvino"
    status, told, _ = run(capsys, "tune", str(package), "--engines", names, *QUICK)
    assert status == 0 and told["engine"]["before"] == "eager"
    verdicts = {e["name"]: e["verdict"] for e in told["engines"]}
    assert set(verdicts) == set(names.split(",")) and sorted(verdicts.values()) == [
        "chosen", "slower", "slower", "slower",
    ]  # fmt: skip
    assert all(e["p50_ms"] > 0 for e in told["engines"])
    held = read_package(package)
    assert held.engine == told["engine"]["after"] == next(
        n for n, v in verdicts.items() if v == "chosen"
    )  # fmt: skip
    assert held.report.machine == this_machine() == told["machine"]
    assert held.lock["measured_on"] == machine_text(told["machine"])
    assert held.report.decisions[-1].step == "tune" and len(held.probes) > 1
    x = torch.randn(3, 3, 8, 8)
    theirs, mine = Net().eval(), dfc.load(package)
    theirs.load_state_dict(
        {n: p.data.tensor() for n, p in held.graph.parameters.items() if p.data is not None}
    )
    for _ in range(2):  # the buffer counts on
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert main(["verify", str(package)]) == 0


def test_the_engine_stays_unless_another_is_faster(package: Path) -> None:
    tuned = tune(package, ["eager"], seconds=0.05)
    assert (tuned.before, tuned.after, tuned.decision.verdict) == ("eager", "eager", "kept")


def test_a_slower_engine_takes_no_place(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = WorkClock(monkeypatch)

    @dfc.engine
    class Slow:
        name = "slow_one"
        devices = ("cpu",)

        def supports(self, node: Any) -> None:
            return None

        def build(self, graph: Any, device: str = "cpu", threads: int | None = None) -> Any:
            from dfc.runtime.engines import find_engine

            inner = find_engine("eager").build(graph, device)

            def run(inputs: Any) -> Any:
                clock.sleep(0.005)
                return inner(inputs)

            return run

    tuned = tune(package, ["slow_one"], seconds=0.05)
    assert tuned.after == "eager"
    assert {e.name: e.verdict for e in tuned.engines} == {"eager": "chosen", "slow_one": "slower"}
    package_of_slow = read_package(package)
    package_of_slow.report.engines = []
    slow = dfc.load(package, engine="slow_one")
    slow.save(package, force=True)
    tuned = tune(package, ["eager"], seconds=0.05)
    assert (tuned.before, tuned.after, tuned.decision.verdict) == ("slow_one", "eager", "taken")
    assert tuned.decision.ratio is not None and tuned.decision.ratio < 0.5


def test_a_wrong_engine_is_named_and_left_out(package: Path) -> None:
    @dfc.engine
    class Wrong:
        name = "wrong_one"
        devices = ("cpu",)

        def supports(self, node: Any) -> None:
            return None

        def build(self, graph: Any, device: str = "cpu", threads: int | None = None) -> Any:
            from dfc.runtime.engines import find_engine

            inner = find_engine("eager").build(graph, device)
            return lambda inputs: [x * 1.01 for x in inner(inputs)]

    tuned = tune(package, ["wrong_one"], seconds=0.05)
    (wrong,) = [e for e in tuned.engines if e.name == "wrong_one"]
    assert wrong.verdict == "wrong" and "too far from the witness" in wrong.reason
    assert tuned.after == "eager"


def test_the_budget_leaves_out_what_compiles_long(package: Path, capsys: Any) -> None:
    status, told, _ = run(capsys, "tune", str(package), "--budget", "5s", *QUICK,
                          "--engines", "eager,inductor")  # fmt: skip
    assert status == 0
    (left,) = [e for e in told["engines"] if e["name"] == "inductor"]
    assert left["verdict"] == "not tried" and "compiling takes at least 30 s" in left["reason"]


def test_other_sizes_and_another_place(package: Path, tmp_path: Path, capsys: Any) -> None:
    there = tmp_path / "there.dfcpkg"
    before = (package / "manifest.json").read_bytes()
    words = ["tune", str(package), "-o", str(there), "--size", "B=7", "--engines", "eager", *QUICK]
    status, told, _ = run(capsys, *words)
    assert status == 0 and told["inputs"] == "random, seed 0" and told["written"] == str(there)
    assert (package / "manifest.json").read_bytes() == before
    assert read_package(there).engine == "eager"
    status, _, err = run(capsys, *words)
    assert status == 2 and "there.dfcpkg` exists" in err


def test_what_is_killed_while_writing_leaves_the_package_whole(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = {p.name: p.read_bytes() for p in package.iterdir()}
    monkeypatch.setenv("DFC_FAULT", "publish.rename:1:enospc")
    status, _, err = run(capsys, "tune", str(package), "--engines", "eager", *QUICK)
    monkeypatch.delenv("DFC_FAULT")
    assert status == 7, err
    assert {p.name: p.read_bytes() for p in package.iterdir()} == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--budget", "20"], "`20` is no time"),
        (["--engines", "eagre"], "did you mean `eager`"),
        (["--engines", "eager:nhwc"], "no form `nhwc`: there are channels_last"),
        (["--engines", "openvino:fast"], "no form `fast`: there are hint"),
    ],
)
def test_bad_words_are_refused(package: Path, words: list[str], message: str, capsys: Any) -> None:
    status, _, err = run(capsys, "tune", str(package), *words)
    assert status == 2 and message in err


def test_a_package_without_probes_or_weights_cannot_be_tuned(tmp_path: Path, capsys: Any) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
        dfc.compile(model, (torch.ones(1, 2),)).save(tmp_path / "m.dfcpkg")
    status, _, err = run(capsys, "tune", str(tmp_path / "m.dfcpkg"))
    assert status == 2 and "no weights" in err


def test_a_package_measured_elsewhere_says_so(package: Path) -> None:
    report = Report.from_json((package / "report.json").read_text())
    assert report.machine == this_machine() and not dfc.load(package).report.notes
    compiled = dfc.load(package)
    compiled.report.machine = {**report.machine, "cpu": "Another One"}
    compiled.save(package, force=True)
    again = dfc.load(package)
    assert "another machine (Another One" in again.report.notes[-1]
    assert "dfc tune" in again.report.notes[-1]
    tuned = tune(package, ["eager"], seconds=0.05)
    tuned.compiled.save(package, force=True)
    assert not any("another machine" in n for n in dfc.load(package).report.notes)


def test_machines_differ_by_what_times_depend_on() -> None:
    here = this_machine()
    assert here["cpu"] and int(here["threads"]) == torch.get_num_threads()
    assert not is_another({}, here) and not is_another(here, here)
    assert not is_another({**here, "threads": "77"}, here)
    assert is_another({**here, "features": "none"}, here)
    assert "2 cores" in machine_text({"cpu": "X", "cores": "2", "threads": "1"})


def test_channels_last_gives_the_same_and_in_order() -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, y.view(y.shape[0], -1) * 2

    x = torch.randn(2, 3, 9, 9)
    model = Views().eval()
    compiled = dfc.compile(model, (x,), engine="eager:channels_last")
    for got, wanted in zip(compiled(x), model(x), strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, wanted)


def test_several_engines_may_be_named() -> None:
    model = torch.nn.Linear(4, 4)
    report = dfc.compile(model, (torch.ones(1, 4),), engine="eager,eager:channels_last").report
    assert [e.name for e in report.engines] == ["eager", "eager:channels_last"]
    with pytest.raises(dfc.DfcError, match="unknown engine `eagre`"):
        dfc.compile(model, (torch.ones(1, 4),), engine="eager,eagre", passes=[])
