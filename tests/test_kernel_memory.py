"""The kernels touch no memory of others, and start no threads of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfc.runtime.kernels import build
from tests.kernel_layers import IN_CI, needs_kernels, paths

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests" / "kernels" / "drive.cpp"


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    needs_kernels()


def drive(tmp_path: Path, *flags: str) -> str:
    sources = [build.FOLDER / s for s in build.SOURCES] + [DRIVER]
    extra = ("-O1", "-w", f"-I{build.FOLDER}", *flags)
    try:
        program = build.build(tmp_path / "drive", extra, sources)
    except build.BuildError as e:
        if IN_CI and build.compiler() is None:
            raise
        pytest.skip(str(e).splitlines()[0])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failures: 0" in done.stdout
    return done.stdout


def test_nothing_outside_of_a_buffer_is_touched(tmp_path: Path) -> None:
    said = drive(tmp_path)
    assert f"paths: {' '.join(paths())}\n" in said
    compared = re.search(r"compared: (\d+)", said)
    assert compared is not None and int(compared[1]) >= 390 * len(paths())


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    drive(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


EMULATED = ("-DDFC_SIMDE", "-Wno-psabi", "-O0")  # optimized, it compiles for longer than it runs


needs_simde = pytest.mark.skipif(
    not Path("/usr/include/simde/x86/avx512.h").exists(), reason="needs SIMDe: libsimde-dev"
)


@needs_simde
def test_paths_for_other_cpus_give_the_same_bits_when_emulated(tmp_path: Path) -> None:
    assert "paths: amx avx512vnni avx2 portable" in drive(tmp_path, *EMULATED)


@pytest.mark.slow  # a minute of compiling
@needs_simde
def test_sanitizers_find_nothing_in_paths_for_other_cpus(tmp_path: Path) -> None:
    drive(tmp_path, *EMULATED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def test_there_is_one_pool_of_threads() -> None:
    """In a process of its own: torch starts its pool, and the kernels then run on that."""
    code = """
import re, os, torch
from dfc.runtime.kernels import library, linear
torch.set_num_threads(3)
torch.randn(2000, 2000).exp().sum()
torch.nn.functional.linear(torch.randn(64, 2048), torch.randn(2048, 2048))
before = os.listdir('/proc/self/task')
for rows in (1, 64):
    for n in (4096, 64, 4096):  # 64: work for two threads; the third is not ended
        codes = torch.randint(-128, 128, (n, 2048), dtype=torch.int8)
        linear.linear(torch.randn(rows, 2048), linear.pack_w8(codes, torch.ones(n)), None, n)
assert library.library().shares_threads
print(len(before), before == os.listdir('/proc/self/task'))
maps = open('/proc/self/maps').read()
print(sorted(set(re.findall(r'lib(?:gomp|iomp5|omp)[-.\\w]*', maps))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
    )
    assert done.returncode == 0, done.stderr
    counts, libraries = done.stdout.splitlines()[-2:]
    before, same = counts.split()
    assert int(before) >= 3 and same == "True"
    assert libraries.count("'") == 2, libraries
