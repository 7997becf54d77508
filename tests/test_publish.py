"""Whatever happens while publishing: the old, the new or nothing, and no litter for long."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfc.errors import DfcError
from dfc.publish import durable, faults, owner, publish_file, publish_folder, require_space, sweep
from dfc.publish.faults import HITS
from tests.store import DEAD_PID, ROOT, leave_dead, litter, spawn, state, write

SCENARIOS = [
    (what, before, renames)
    for what in ("folder", "file")
    for before, renames in (("absent", "system"), ("old", "system"), ("old", "plain"))
]


def prepare(tmp_path: Path, what: str, before: str) -> Path:
    final = tmp_path / ("m.bin" if what == "file" else "m.dfcpkg")
    if before == "old":
        write(what, final, "old")
    leave_dead(tmp_path)
    return final


def fault_points(tmp_path: Path, what: str, before: str, renames: str) -> list[str]:
    """Every `name:n` that one run of a scenario passes."""
    rehearsal = tmp_path / "rehearsal"
    rehearsal.mkdir()
    final = prepare(rehearsal, what, before)
    child = spawn(what, final, "new", renames)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert (state(what, final), litter(rehearsal)) == ("new", [])
    hits = json.loads(out.splitlines()[-1])
    return [f"{name}:{n}" for name, count in hits.items() for n in range(1, count + 1)]


# ---- death -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what, before, renames", SCENARIOS)
def test_kill_at_every_fault_point_leaves_old_or_new(
    tmp_path: Path, what: str, before: str, renames: str
) -> None:
    points = fault_points(tmp_path, what, before, renames)
    assert len(points) >= 7
    seen = set()
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        folder.mkdir()
        final = prepare(folder, what, before)
        child = spawn(what, final, "new", renames, fault=f"{point}:kill")
        _, err = child.communicate(timeout=300)
        assert child.returncode == -signal.SIGKILL, (point, err)
        found = state(what, final)
        allowed = {before, "new"} | ({"absent"} if renames == "plain" else set())
        assert found in allowed, point
        seen.add(found)
        litter(folder)
        if found == "absent":
            sweep(folder)
            assert state(what, final) == before, point
            assert litter(folder) == [], point
        write(what, final, "nxt")
        assert (state(what, final), litter(folder)) == ("nxt", []), point
    assert {before, "new"} <= seen or before == "absent"


@pytest.mark.parametrize("what, before, renames", SCENARIOS)
@pytest.mark.parametrize("how", ["term", "int"])
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path, what: str, before: str, renames: str, how: str
) -> None:
    names = ["test.write", "publish.create", "publish.rename", "publish.fsync_parent"]
    if renames == "plain" and before == "old":
        names += ["publish.move_aside", "publish.rename_after_aside"]
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        final = prepare(folder, what, before)
        child = spawn(what, final, "new", renames, fault=f"{name}:1:{how}")
        _, err = child.communicate(timeout=300)
        assert child.returncode == -(signal.SIGTERM if how == "term" else signal.SIGINT), err
        after = "new" if name == "publish.fsync_parent" else before
        assert (state(what, final), litter(folder)) == (after, []), name


def kill_at_random(tmp_path: Path, rounds: int) -> None:
    final = tmp_path / "m.dfcpkg"
    rng = random.Random(0)
    write("folder", final, "old")
    for _ in range(rounds):
        child = spawn("folder", final, "new", rounds=1_000_000)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.communicate()
        assert state("folder", final) in ("old", "new")
        assert len(litter(tmp_path)) <= 1
    sweep(tmp_path)
    assert litter(tmp_path) == []


def test_random_kills_leave_old_or_new(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 15)


@pytest.mark.slow
def test_a_thousand_random_kills_leave_old_or_new(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 1000)


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what, before, renames", SCENARIOS)
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_an_error_at_every_fault_point_is_clean(
    tmp_path: Path,
    what: str,
    before: str,
    renames: str,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if renames == "plain":
        monkeypatch.setattr(durable, "_system_rename", lambda: None)
    monkeypatch.setenv("DFC_FAULT", "")
    final = prepare(tmp_path, what, before)
    HITS.clear()
    write(what, final, "new")
    failed = 0
    for name, count in dict(HITS).items():
        for n in range(1, count + 1):
            folder = tmp_path / f"{name}-{n}"
            folder.mkdir()
            final = prepare(folder, what, before)
            HITS.clear()
            monkeypatch.setenv("DFC_FAULT", f"{name}:{n}:{error}")
            if name in ("publish.sweep", "publish.remove", "publish.recover"):
                write(what, final, "new")  # cleaning up is never worth an error
                assert state(what, final) == "new", name
            else:
                failed += 1
                with pytest.raises(DfcError) as caught:
                    write(what, final, "new")
                assert (caught.value.code, caught.value.status) == ("D013", 7)
                assert str(final) in caught.value.message
                assert re.search(r"after \d+ bytes; \d+ bytes are free", caught.value.message)
                assert (state(what, final), litter(folder)) == (before, []), name
            monkeypatch.setenv("DFC_FAULT", "")
            write(what, final, "nxt")
            assert (state(what, final), litter(folder)) == ("nxt", []), name
    assert failed >= 5


LIMITED = """
import resource, signal, sys
from pathlib import Path
from dfc.errors import DfcError
from dfc.publish import publish_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with publish_folder(sys.argv[1]) as temp:
        {write}
except DfcError as error:
    print(error)
    sys.exit(error.status)
"""


@pytest.mark.parametrize(
    "body",
    [
        "(temp / 'weights').write_bytes(bytes(70_000))",
        "import numpy, safetensors.numpy as s; "
        "s.save_file({'w': numpy.zeros(70_000)}, temp / 'weights.safetensors')",
    ],
    ids=["python", "safetensors"],
)
def test_a_file_size_limit_is_a_clean_error(tmp_path: Path, body: str) -> None:
    final = tmp_path / "m.dfcpkg"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(write=body), str(final)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 7, done.stderr
    assert f"error[D013]: cannot write `{final}`: file too large, after " in done.stdout
    assert os.listdir(tmp_path) == []


def test_missing_space_is_said_before_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(DfcError, match=r"MB are missing") as caught,
        publish_folder(tmp_path / "m", expect_bytes=1 << 60),
    ):
        raise AssertionError("the block must not run")
    assert (caught.value.code, caught.value.status) == ("D012", 7)
    assert os.listdir(tmp_path) == []
    require_space(tmp_path, 1)


def test_an_error_of_the_block_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish_folder(tmp_path / "m") as temp:
        (temp / "a").write_bytes(b"a")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), publish_folder(tmp_path / "m"):
        (tmp_path / "nowhere").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_read_error_of_the_block_names_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(DfcError) as caught, publish_folder(tmp_path / "m"):
        raise PermissionError(13, "Permission denied", "/models/weights.bin")
    assert "the error was met at `/models/weights.bin`" in str(caught.value)


# ---- what may be replaced ----------------------------------------------------------------------


def test_an_existing_target_is_an_error_without_force(tmp_path: Path) -> None:
    final = tmp_path / "m.dfcpkg"
    write("folder", final, "old")
    with pytest.raises(DfcError) as caught, publish_folder(final):
        raise AssertionError("the block must not run")
    assert (caught.value.code, caught.value.status) == ("D010", 2)
    assert state("folder", final) == "old"


@pytest.mark.parametrize("renames", ["system", "plain"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_lost_race_is_an_error_and_the_winner_stays(
    tmp_path: Path, what: str, renames: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if renames == "plain":
        monkeypatch.setattr(durable, "_system_rename", lambda: None)
    final = tmp_path / "m.bin"
    loser = publish_folder(final) if what == "folder" else publish_file(final)
    with pytest.raises(DfcError) as caught, loser:
        write(what, final, "new")
    assert caught.value.code == "D010"
    assert (state(what, final), litter(tmp_path)) == ("new", [])


def test_force_never_removes_what_dfc_did_not_write(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    link = tmp_path / "link"
    link.symlink_to(work)
    plain = tmp_path / "plain"
    plain.write_text("text")
    for refused in (
        publish_folder(work, force=True),
        publish_folder(link, force=True),
        publish_folder(plain, force=True),
        publish_file(work, force=True),
        publish_file(link, force=True),
    ):
        with pytest.raises(DfcError) as caught, refused:
            raise AssertionError("the block must not run")
        assert caught.value.code == "D011"
    assert (work / "thesis.txt").read_text() == "years of work"


def test_force_replaces_an_empty_folder(tmp_path: Path) -> None:
    final = tmp_path / "m.dfcpkg"
    final.mkdir()
    write("folder", final, "new")
    assert (state("folder", final), litter(tmp_path)) == ("new", [])


@pytest.mark.parametrize("name", ["missing/m", "file/m", "..", "x" * 300, ".tmp-1-2-3"])
def test_an_impossible_target_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DfcError) as caught, publish_folder(tmp_path / name, force=True):
        raise AssertionError("the block must not run")
    assert caught.value.code == "D011"


@pytest.mark.parametrize("name", ["", ".", "./"])
@pytest.mark.parametrize("force", [False, True])
def test_the_current_folder_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, force: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(DfcError, match="cannot be the name of an output"),
        publish_folder(name, force=force),
    ):
        raise AssertionError("the block must not run")


# ---- leftovers ---------------------------------------------------------------------------------


def test_sweep_spares_the_living_the_foreign_and_the_users_own(tmp_path: Path) -> None:
    here, pid, start = owner.here(), os.getpid(), owner.start_time(os.getpid())
    spared = [
        f".tmp-{os.getppid()}-{owner.start_time(os.getppid())}-{here}00000000",  # alive
        f".tmp-{DEAD_PID}-1-ffffffff00000000",  # another machine, young
        ".tmp-mine",
        ".old-notes",
    ]
    swept = [
        f".tmp-{pid}-{start}-{here}00000000",  # ours, of a publish that is over
        f".tmp-{DEAD_PID}-1-{here}00000001",  # dead
        f".tmp-{pid}-{start + 1}-{here}00000002.bin",  # the number was given to a new process
        f".tmp-{DEAD_PID}-1-ffffffff00000003",  # another machine, two days old
    ]
    for name in [*spared, *swept]:
        (tmp_path / name).write_text("")
    os.utime(tmp_path / swept[-1], (time.time() - 2 * 86400,) * 2)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(spared)


def test_sweep_takes_a_zombie_for_dead(tmp_path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = owner.start_time(zombie.pid)
    leftover = tmp_path / f".tmp-{zombie.pid}-{start}-{owner.here()}00000000"
    leftover.write_text("")
    sweep(tmp_path)
    assert leftover.exists()
    zombie.kill()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    sweep(tmp_path)
    assert not leftover.exists()
    zombie.communicate()


def test_sweep_removes_a_planted_link_and_not_its_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep").write_text("")
    for prefix in (".tmp", ".old"):
        (tmp_path / f"{prefix}-{DEAD_PID}-1-{owner.here()}00000000").symlink_to(target)
    sweep(tmp_path)
    assert (target / "keep").exists()
    assert litter(tmp_path) == []


# ---- the rest ----------------------------------------------------------------------------------


def test_modes_follow_the_umask_and_are_closed_until_then(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with publish_folder(tmp_path / "m") as folder, publish_file(tmp_path / "m.bin") as file:
            assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
            assert file.suffix == ".bin"
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("m", "m.bin")]
    assert modes == [0o750, 0o640]


def test_a_relative_target_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with publish_file("a.bin"):
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "a.bin").exists()


def test_signal_handlers_are_left_as_they_were(tmp_path: Path) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGHUP, mine)
    try:
        with publish_file(tmp_path / "a"):
            assert signal.getsignal(signal.SIGHUP) is mine
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_racing_writers_leave_one_whole_result(tmp_path: Path) -> None:
    final = tmp_path / "m.dfcpkg"
    children = [spawn("folder", final, name, rounds=20) for name in ("one", "two", "six")]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], errors
    assert state("folder", final) in ("one", "two", "six")
    assert litter(tmp_path) == []


@pytest.mark.parametrize("plan", ["x", "a:b:kill", "a:1:explode", "a:1"])
def test_an_unreadable_fault_plan_is_refused(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFC_FAULT", plan)
    with pytest.raises(DfcError, match="D014"):
        faults.fault_point("a")


@pytest.mark.parametrize("target", ["/etc", "/etc/passwd"])
def test_a_block_cannot_publish_a_link(tmp_path: Path, target: str) -> None:
    with pytest.raises((AssertionError, DfcError)), publish_folder(tmp_path / "m") as temp:
        (temp / "link").symlink_to(target)
    assert os.listdir(tmp_path) == []
