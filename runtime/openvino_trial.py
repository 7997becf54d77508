"""Which options OpenVINO survives a model with, tried in a process of its own.

Why:     a fault in its compiler ends the process, and no `except` helps: 2026.4.1 dies on two MLPs
         with residuals in a row, where its snippets join them. Of sizes that vary it compiles much
         when it runs, and dies then: of two layers of bf16, the first with int8 groups.
Ensures: what dies is compiled again without snippets, and refused where that dies as well; what
         came out is kept in the user's cache, by the model, the options, the version and the
         processor, so that a model is tried once.
Cost:    one more compilation, a run on zeros and half a second, the first time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from dfc.errors import DfcError
from dfc.rewrite.proofs import cache_folder

WITHOUT_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
_COMPILE = """
import ctypes, faulthandler, json, sys
import openvino
core = openvino.Core()
made = core.compile_model(core.read_model(sys.argv[1]), "CPU", json.loads(sys.argv[2]))
if any(port.partial_shape.is_dynamic for port in made.inputs):
    request = made.create_infer_request()
    for i, port in enumerate(made.inputs):
        shape = [2 if d.is_dynamic else d.get_length() for d in port.partial_shape]
        zeros = openvino.Tensor(port.element_type, openvino.Shape(shape))
        ctypes.memset(zeros.data.ctypes.data, 0, zeros.byte_size)
        request.set_input_tensor(i, zeros)
    faulthandler.dump_traceback_later(60, exit=True)  # a loop that zeros do not end
    request.infer()
"""


def survived(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to compile the ONNX at `path` with: those given, or these without snippets.

    Raises:  DfcError K003 when OpenVINO dies of the model either way.
    """
    death = ""
    for more in ({}, WITHOUT_SNIPPETS):
        tried = {**options, **more}
        death = _remembered(path, tried)
        if not death:
            return tried
    raise DfcError("K003", f"engine `openvino` cannot take the model: its compiler died of {death}")


def _remembered(path: Path, options: Mapping[str, Any]) -> str:
    """What the compiler dies of, from the cache where it was tried before; "" when it lives."""
    folder = cache_folder("openvino")
    if folder is None:
        return _death(path, options)
    entry = folder / _key(path, options)
    try:
        return entry.read_text(encoding="utf-8")
    except OSError:
        death = _death(path, options)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as new:
        new.write(death.encode())
        new.flush()
        os.link(new.name, entry)  # whole, or not there
    return death


def _key(path: Path, options: Mapping[str, Any]) -> str:
    """By the model without the weights that lie beside it: sizes decide what is compiled."""
    import openvino

    known = [openvino.__version__, _processor(), sorted(options.items()), "run"]
    found = sha256(json.dumps(known).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def _death(path: Path, options: Mapping[str, Any]) -> str:
    """The signal that ends a trial; an exception is no death: it comes again in here, or was for
    the sizes that were tried.
    """
    if not sys.executable:  # embedded in another program
        return ""
    command = [sys.executable, "-I", "-c", _COMPILE, str(path), json.dumps(dict(options))]
    found = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode
    if found >= 0:
        return ""
    try:
        return signal.Signals(-found).name
    except ValueError:
        return f"signal {-found}"
