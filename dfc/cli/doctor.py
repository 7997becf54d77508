"""`dfc doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from typing import Any

from dfc.cli.options import Json
from dfc.counting import counted

# distribution -> what it is for; the first that is there of a group stands for it
_NEEDED = {
    "torch": "capture, the eager and inductor engines",
    "numpy": "arrays",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime-gpu": "the onnxruntime engine, proving exports",
    "networkx": "analysis",
    "lark": "the language",
    "safetensors": "packages",
    "scipy": "planning",
    "typer": "this command",
    "rich": "tables",
}
_OPTIONAL = {
    "transformers": "pip install 'dfc-compiler[hf]'",
    "openvino": "pip install 'dfc-compiler[openvino]'",
    "pygls": "pip install 'dfc-compiler[lsp]'",
    "ray": "pip install 'dfc-compiler[ray]'",
    "pyarrow": "pip install 'dfc-compiler[rows]'",
    "pyspark": "pip install 'dfc-compiler[spark]'",
}
_ALTERNATIVES = {"onnxruntime-gpu": ("onnxruntime",)}


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and what is missing.

    \b
    Examples:
      dfc doctor
      dfc doctor --json
    """
    from dfc.cli.progress import Progress

    with Progress() as say:
        say("looking at libraries and devices")
        data = _look()
    if as_json:
        from dfc.cli.tables import print_json

        print_json(data)
    else:
        _print(data)
    if data["missing"]:
        import typer

        raise typer.Exit(7)


def _look() -> dict[str, Any]:
    import dfc
    from dfc.runtime.allocation import why_not

    why = why_not()
    versions = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    missing = [f"pip install {n}  # {_NEEDED[n]}" for n in _NEEDED if versions[n] is None]
    advice = [f"{how}  # optional" for n, how in _OPTIONAL.items() if versions[n] is None]
    devices: list[str] = []
    cache = None
    engines: list[dict[str, Any]] = []
    kernels = None
    on_devices: dict[str, str] = {}
    if versions["torch"] is not None:
        import torch
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        devices = [
            f"cuda:{i} {torch.cuda.get_device_name(i)}, "
            f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            for i in range(torch.cuda.device_count())
        ]
        from dfc.cli.list import engine_rows
        from dfc.runtime.engines.inductor import use_own_cache
        from dfc.runtime.kernels.cuda import kind
        from dfc.runtime.kernels.library import state

        use_own_cache()
        cache = cache_dir()
        engines = engine_rows()
        found = state()
        kernels = asdict(found)
        on_devices = {f"cuda:{i}": kind(f"cuda:{i}").reason for i in range(len(devices))}
        if found.advice:
            advice.append(f"{found.advice}  # kernels for int4 and int8 linear layers")
    return {
        "dfc": dfc.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu": {
            "name": _cpu_name(),
            "cores": _cores(),
            "memory_bytes": _memory(),
        },
        "devices": devices,
        "engines": engines,
        "kernels": kernels,
        "device_kernels": on_devices,
        "keeps_pages": {"kept": why is None, "reason": why},
        "onnxruntime_providers": _providers(),
        "cache": cache,
        "missing": missing,
        "advice": advice,
    }


def _version(name: str) -> str | None:
    from importlib import metadata  # a sixth of the time that `dfc --help` would take

    for candidate in (name, *_ALTERNATIVES.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _print(data: dict[str, Any]) -> None:
    from dfc.cli.tables import print_table, print_text

    cpu = data["cpu"]
    print_text(f"dfc {data['dfc']}, python {data['python']} ({sys.executable}), {data['platform']}")
    print_text(
        f"cpu {cpu['name']}, {counted(cpu['cores'], 'core')}, {cpu['memory_bytes'] / 2**30:.1f} GiB"
    )
    print_text("\n".join(data["devices"]) or "no CUDA device: only the CPU is used")
    print_text("")
    print_table(
        ["library", "version"], [[n, v or "not installed"] for n, v in data["versions"].items()]
    )
    print_text("")
    rows = [[e["name"], e["state"], ", ".join(e["devices"]), e["does"]] for e in data["engines"]]
    print_table(["engine", "", "devices", ""], rows)
    print_text(f"\nONNX Runtime providers: {', '.join(data['onnxruntime_providers']) or 'none'}")
    if data["kernels"] is not None:
        print_text(f"kernels for int4 and int8 linear layers: {data['kernels']['reason']}")
    for name, words in data["device_kernels"].items():
        print_text(f"kernels on {name}: {words}")
    why = data["keeps_pages"]["reason"]
    print_text(
        f"memory: malloc is left as it is, since {why}" if why else
        "memory: engines keep the pages of what is freed (DFC_KEEP_PAGES=0 gives them back)"
    )  # fmt: skip
    print_text(f"kernel cache: {data['cache']}")
    for line in data["missing"]:
        print_text(f"missing: {line}")
    for line in data["advice"]:
        print_text(f"to get more: {line}")
    if not data["missing"]:
        print_text("everything that dfc needs is here")
