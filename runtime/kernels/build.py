"""Compiles the kernels: one C++ compiler, one command, no other tool.

    python -m dfc.runtime.kernels.build     puts the library beside this file

The package's own build (setup.py) runs the same when it is installed. This file imports nothing of
dfc, so that setup.py can load it by its path.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAME = "libdfc_kernels.so"
SOURCES = (
    "linear.cpp", "fixes.cpp", "portable.cpp", "avx2.cpp", "lanes.cpp", "avx512vnni.cpp", "amx.cpp",
    "avx512rows.cpp", "attention.cpp", "avx512bf16.cpp", "cpu.cpp", "threads.cpp",
)  # fmt: skip
HEADERS = (
    "kernels.h", "avx2.h", "avx512.h", "emulated.h", "emulated_bf16.h", "emulated_tiles.h",
    "attention.h", "cpu.h", "norm.h", "threads.h",
)  # fmt: skip
# No flag says which CPU: each file says for itself what its functions may use, and the library asks
# the CPU when it runs. Products and sums are fused only where the source says so, as on all paths.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall")
SHARED = ("-shared",)
SECONDS = 600


class BuildError(Exception):
    """The kernels could not be compiled; the text says why."""


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first that is there."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return [found] if found else None


def build(target: Path, extra: Sequence[str] = (), sources: Sequence[Path] | None = None) -> Path:
    """Compile the sources, those of the library unless others are given, into `target`.

    Ensures:  a target that is in use by another process stays whole: the new one is renamed to it.
    Raises:   BuildError when there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise BuildError("there is no C++ compiler (c++, g++, clang++, or what $CXX says)")
    files = [FOLDER / s for s in SOURCES] if sources is None else list(sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-build-") as folder:
        made = Path(folder) / target.name
        run = [*command, *FLAGS, *(SHARED if sources is None else ()), *extra]
        _run([*run, *map(str, files), "-o", str(made)])
        os.replace(made, target)
    return target


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(f"`{command[0]}` failed: {e}") from e
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed:\n{done.stderr.strip()[-4000:]}")


def main() -> int:
    try:
        print(f"built {build(FOLDER / NAME)}")
    except BuildError as e:
        print(f"the kernels are not built: {e}", file=sys.stderr)
        return 7
    return 0


if __name__ == "__main__":
    sys.exit(main())
