"""What a hurried user types, and what surrounds the command: one line that helps, its status, and
nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dfc
from dfc.cli import main
from dfc.cli.failures import guarded
from dfc.errors import DfcError
from dfc.ir.verify import verify
from dfc.planning.layouts import check_counts
from tests.command import NET, Run

NESTED = """
import torch


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())

    def forward(self, x):
        return self.encoder(x)


def build():
    return Outer(), (torch.ones(2, 4),)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("unlucky")
    (made / "net.py").write_text(NET + "\n\ndef train(module, data):\n    return None\n")
    (made / "nothing").mkdir()
    package = str(made / "net.dfcpkg")
    assert main(["compile", f"{made}/net.py:build", "-o", package, "--engine", "eager"]) == 0
    return made


# The command line

WORDS = [
    ("run {}/net.dfcpkg --size B=2 --size B=3", "`--size` takes one value, and is given 2 times"),
    ("run {}/net.dfcpkg -o a.npz --output b.npz", "`--output` takes one value"),
    ("run {}/net.dfcpkg --size B=2,B=3", "`B` is given twice: 2 and 3"),
    ("run {}/net.dfcpkg --size ,", "`` is no size"),
    ("run {}/net.dfcpkg --size B=²", "`B=²` is no size"),
    ("run {}/net.dfcpkg --pipeline ²", "`²` is neither a number"),
    ("run {}/net.dfcpkg --egine eager", "did you mean `--engine`?"),
    ("bench {}/net.dfcpkg --threads 1000000000", "less than or equal to 4096"),
    ("bench {}/net.dfcpkg --seconds inf", "less than or equal to 86400"),
    ("plan {}/net.py:build --stages-per-device 1000", "1000 stages a device are more than the"),
    ("plan {}/net.py:build --by speed", "there are time, latency, memory, cost"),
    ("plan {}/net.py:build -m 1000000000", "1000000000 microbatches on 1 device"),
    ("compile {}/net.py:build --contrib", "name it: --onnx FILE"),
    ("compile {}/net.py:build --name small", "name it: -r FILE"),
    ("compile {}/net.py:build --use nothing", "is a folder without Python code"),
    ("compile {}/net.py:make", "it has `build`"),
    ("compile {0}/net.py:build --function t={0}/net.py:train", "names no function `t`"),
    ("compile {}/net.py:build --set cse.limit=3 --set cse.limit=4", "as 3 and as 4"),
    ("compile {}/net.py:build -p cse{{skip=[-1]}}", "`skip` names changes by number, from 0"),
    ("compile {}/net.py:build -p fuse{{limit=-1}}", "`limit` counts changes: it is 0 or more"),
    ("compile {}/net.py:build -p equalize{{rounds=0}}", "`rounds` is at least 1, got 0"),
]


@pytest.mark.parametrize(("words", "said"), WORDS, ids=[w[0].replace("{}/", "") for w in WORDS])
def test_words_that_mean_nothing(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.chdir(home)
    done = run(*words.replace("{}", "{0}").format(home).split())
    assert (done.status, done.out) == (2, "")
    assert said in done.err and "Traceback" not in done.err
    assert not list(home.glob("*.npz"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["run", ""], "MODEL"),
        (["tune", ""], "PACKAGE"),  # no longer the folder that one stands in
        (["check", "x.dfc", ""], "FILE"),
        (["run", "m", "--engine", ""], "--engine"),
        (["compile", "m", "-o", ""], "--output"),
        (["compile", "m", "--data", ""], "--data"),
        (["plan", "m", "--on", ""], "--on"),
    ],
)
def test_an_unset_variable_of_a_script_is_told(run: Run, words: list[str], name: str) -> None:
    done = run(*words)
    assert (done.status, done.out) == (2, "")
    assert f"`{name}` is empty" in done.err


def test_flags_may_stand_twice(run: Run, home: Path) -> None:
    assert run("run", home / "net.dfcpkg", "--random", "--json", "--random", "--json").status == 0


@pytest.mark.parametrize("content", [b"", b"PK", b"text"])
def test_a_broken_exported_program_is_one_error(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    done = run("show", tmp_path / "m.pt2")
    assert done.status == 2 and "is no exported program" in done.err
    assert "W1" not in done.err and len(done.err.splitlines()) == 1  # torch warns of it as well


@pytest.mark.parametrize("module", ["dfc", "dfc.cli"])
def test_the_command_is_a_module_too(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and dfc.__version__ in done.stdout


# Ctrl-C before anything is there to be interrupted


def imported(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `dfc doctor`, which imports the typer of this folder, where Ctrl-C is heeded."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.path.insert(0, {str(folder)!r});"
        "from dfc.cli import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=50
    )


def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path: Path) -> None:
    """Whatever is imported first: typer stands for all of it."""
    (tmp_path / "typer.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(60)\n"
    )
    done = imported(tmp_path)
    assert done.returncode == 130
    assert done.stderr == "dfc: interrupted; nothing was left half-written\n"


def test_after_ctrl_c_nothing_is_waited_for(tmp_path: Path) -> None:
    """A thread of some library would go on for a minute; what is done at an exit is done."""
    (tmp_path / "typer.py").write_text(
        "import atexit, os, signal, sys, threading, time\n"
        "atexit.register(lambda: print('left', file=sys.stderr))\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    done = imported(tmp_path)
    assert time.monotonic() - began < 50
    assert done.returncode == 130
    assert done.stderr == "dfc: interrupted; nothing was left half-written\nleft\n"


def test_a_signal_that_a_library_swallowed_comes_again(tmp_path: Path) -> None:
    """Here a finalizer does, as modules in C do while they are imported."""
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\n\n\nclass Ends:\n    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n\n\n"
        "Ends()\n"
        "try:\n    time.sleep(60)\nfinally:\n    time.sleep(1)  # not while the stack unwinds\n"
        "    print('left')\n"
    )
    done = imported(tmp_path)
    assert (done.returncode, done.stdout) == (130, "left\n")
    assert done.stderr == "dfc: interrupted; nothing was left half-written\n"


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    """As a launcher sends it to a rank that holds a folder."""
    (tmp_path / "net.py").write_text(
        "import os, signal, tempfile\n\n\ndef build():\n"
        "    with tempfile.TemporaryDirectory():\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        finally:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)  # again, while it ends\n"
    )
    own = tmp_path / "temporary"
    own.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dfc.cli", "compile", f"{tmp_path}/net.py:build", "-o", "x"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": str(own)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    assert os.listdir(own) == []


def test_ctrl_c_that_a_library_turned_into_an_error_is_no_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As compiled modules do whose import it ends, and what reports that they are not there."""

    def ended() -> int:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as e:
                raise ImportError("initialization failed") from e
        except ImportError:
            raise DfcError("K001", "it is not installed") from None

    with pytest.raises(KeyboardInterrupt):
        guarded(ended, ["bench"])
    assert capsys.readouterr().err == ""


def test_an_error_that_is_its_own_cause_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        error = DfcError("K001", "it is not installed")
        raise error from error

    assert guarded(fails, ["bench"]) == DfcError("K001", "").status
    assert "it is not installed" in capsys.readouterr().err


def test_nothing_is_imported_before_the_command_minds_ctrl_c() -> None:
    """Its script imports two files of ours, and no other (`atexit` is in Python itself)."""
    code = "import sys; there = {*sys.modules}; import dfc.cli; print(*{*sys.modules} - there)"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert {*done.stdout.split()} == {"__future__", "atexit", "dfc", "dfc.cli"}, done.stderr


# In Python


def test_a_step_that_nobody_waits_for_is_not_planned() -> None:
    check_counts(nodes=10, devices=4096, microbatches=4096, chunks=1)
    with pytest.raises(DfcError, match="a step repeats") as e:
        check_counts(nodes=10, devices=2, microbatches=10**9, chunks=1)
    assert e.value.status == 2


def test_an_unknown_op_is_told_once_for_all_its_nodes() -> None:
    lines = "".join(f"  %n{i}: f32[2] = aten.expp.default(%x)\n" for i in range(5))
    other = "  %m: f32[2] = aten.siin.default(%x)\n"
    graph = dfc.parse(f"dfc 1\ngraph @f(%x: f32[2]) -> f32[2] {{\n{lines}{other}  return %m\n}}\n")
    with pytest.raises(DfcError) as e:
        verify(graph)
    assert [d.code for d in e.value.diagnostics] == ["V010", "V010"]
    assert e.value.diagnostics[0].notes == ("node %n0", "4 more nodes have it")


def test_a_module_that_only_holds_others_is_told_how_to_mean_them(run: Run, home: Path) -> None:
    (home / "nested.py").write_text(NESTED)
    done = run("select", f"{home}/nested.py:build", '"encoder"')
    assert done.status == 2 and "did you mean `encoder.**`?" in done.err
    assert run("select", f"{home}/nested.py:build", '"encoder.**"').status == 0


# Standard streams, folders and files that are not what they seem

GRAPH = "dfc 1\ngraph @f(%x: f32[2]) -> f32[2] {\n  return %x\n}\n"


@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 7, "cannot write the output: no space left on device"),
        ("2>/dev/full", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(
    tmp_path: Path, streams: str, status: int, said: str
) -> None:
    (tmp_path / "g.dfc").write_text(GRAPH)
    command = f"set -o pipefail; {sys.executable} -m dfc.cli check g.dfc {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "internal error" not in done.stderr


def test_stdin_that_is_closed_is_empty(tmp_path: Path) -> None:
    command = f"{sys.executable} -m dfc.cli check - <&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "<stdin>:1:1: error[P003]" in done.stderr


def test_what_a_terminal_cannot_show_is_written_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "µ.dfc").write_text(GRAPH, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "dfc.cli", "check", "µ.dfc"], cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\xb5.dfc: valid\n")


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && {sys.executable} -m dfc.cli list"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7 and "the folder that this runs in is gone" in done.stderr


@pytest.mark.parametrize(
    "words",
    ["test {0}", "compile m -r {0}", "compile m -t {0}", "check {0}", "show {0}"],
)
def test_a_pipe_in_the_place_of_a_text_is_not_waited_for(
    run: Run, tmp_path: Path, words: str
) -> None:
    os.mkfifo(tmp_path / "f.dfc")
    done = run(*words.format(tmp_path / "f.dfc").split())
    assert done.status == 2 and "is no regular file" in done.err


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    done = run("run", tmp_path)
    assert done.status == 2 and "manifest.json` is a FIFO" in done.err


def test_a_device_in_the_place_of_a_text_is_not_read(run: Run) -> None:
    """/dev/zero has no end."""
    done = run("compile", "m", "-r", "/dev/zero")
    assert done.status == 2 and "`/dev/zero` is no regular file" in done.err
