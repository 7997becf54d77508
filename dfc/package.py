"""The artefact: a plain folder of graph text, weights, probes and the report, listed and hashed.

    manifest.json        closed list of files with sha256
    graph.dfc            the rewritten graph
    weights.safetensors  its parameters
    recipe.dfc           the recipe that made it, resolved
    probes.safetensors   probe inputs, the original's outputs and the witness's
    lock.json            versions, seed, engine, device
    report.json          what was done and why
    plan.json            which device runs which stage and when, if it is partitioned

It holds graphs and numbers, never code.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, HashOnly
from dfc.ir.types import DTYPES, TensorType, dtype_of
from dfc.ir.verify import verify
from dfc.ir.weights import SAFETENSORS, SafetensorsData, tensor_sha256, write_safetensors
from dfc.lang.graph_parser import parse_graph
from dfc.manifest import check_manifest, write_manifest
from dfc.planning.host import machine_text
from dfc.publish import publish_folder
from dfc.report import Report

if TYPE_CHECKING:
    import torch

    from dfc.compiled import Compiled
    from dfc.planning.pipeline import Plan
    from dfc.rewrite.probe import Probe

KIND = "package"
PLAN = "plan.json"
# What the results of probes may take, beside weights of so many times as much.
_RESULTS = 16 * 2**20
_SHARE = 8


@dataclass
class Package:
    """What a package holds, read and checked."""

    graph: Graph
    report: Report
    engine: str
    recipe: str
    probes: list[Any]
    lock: dict[str, Any]
    plan: Plan | None = None


def write_package(compiled: Compiled, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a package beside its place and rename it.

    Raises:  DfcError D010 when the target exists, D012.. when it cannot be written.
    """
    graph = compiled.graph
    weights = {name: p for name, p in graph.parameters.items() if p.data is not None}
    total = sum(_bytes(p.type) for p in weights.values())
    with publish_folder(path, force=force, expect_bytes=total + 1_000_000) as temp:
        types = {n: p.type for n, p in weights.items()}
        write_safetensors(
            temp / "weights.safetensors",
            types,  # type: ignore[arg-type]
            (p.data.tensor() for p in weights.values()),  # type: ignore[union-attr]
        )
        (temp / "graph.dfc").write_text(str(graph), encoding="utf-8")
        (temp / "recipe.dfc").write_text(compiled.recipe, encoding="utf-8")
        (temp / "report.json").write_text(compiled.report.to_json(), encoding="utf-8")
        (temp / "lock.json").write_text(_json(_lock(compiled)), encoding="utf-8")
        most = max(_RESULTS, total // _SHARE)
        probes = lighter(compiled.probes, max(_RESULTS, total))
        write_probes(temp / "probes.safetensors", within_bytes(probes, most))
        if compiled.plan is not None:
            from dfc.planning.planfile import to_text

            (temp / PLAN).write_text(to_text(compiled.plan), encoding="utf-8")
        write_manifest(temp, KIND)


def read_package(path: Path) -> Package:
    """Check every byte, then read; the graph is verified, the weights' digests are not.

    Raises:  DfcError D family when the folder is not a package or was changed, P and V families
             (status 2 too) for a graph that is none.
    """
    manifest = check_manifest(path)
    if manifest["kind"] != KIND:
        from dfc.emit.onnx_stages import KIND as STAGES

        if manifest["kind"] == STAGES:
            help = f"`dfc run {path}` runs it"
            raise DfcError("D040", f"{path} is a folder of ONNX stages, not a package", help=help)
        raise DfcError("D040", f"{path} is a {manifest['kind']}, not a package")
    try:
        return _read(path)
    except DfcError:
        raise
    except Exception as e:  # the bytes are those that were listed: somebody else wrote them
        reason = f"{type(e).__name__}: {e}"
        raise DfcError("D044", f"{path} holds what dfc does not write: {reason}") from e


def _read(path: Path) -> Package:
    graph = parse_graph((path / "graph.dfc").read_text(encoding="utf-8"), str(path / "graph.dfc"))
    try:
        verify(graph)
    except DfcError as e:
        raise DfcError.of(e.diagnostics, status=2) from e
    attach_held(graph, path / "weights.safetensors")
    report = Report.from_json((path / "report.json").read_text(encoding="utf-8"))
    lock = json.loads((path / "lock.json").read_text(encoding="utf-8"))
    probes = read_probes(path / "probes.safetensors")
    for probe in probes:
        if not probe.original and graph.result.inputs:  # they were left out: see `within_bytes`
            probe.original = probe.witness = None
    recipe = (path / "recipe.dfc").read_text(encoding="utf-8")
    return Package(graph, report, lock["engine"], recipe, probes, lock, _read_plan(path, graph))


def _read_plan(path: Path, graph: Graph) -> Plan | None:
    """The plan, held against the graph; None for a package that is not partitioned."""
    file = path / PLAN
    if not file.exists():
        return None
    from dfc.planning.planfile import of_text

    return of_text(file.read_text(encoding="utf-8"), graph, str(file))


def attach_held(graph: Graph, path: Path) -> None:
    """Give the parameters their data, after comparing names and types with the file's."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        held = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118 - not a dict
        for name, p in graph.parameters.items():
            if p.data is None:
                continue
            if name not in held:
                raise DfcError("D041", f"{path}: the weights lack !{name}")
            found = held[name]
            assert isinstance(p.type, TensorType)
            expected = SAFETENSORS[p.type.dtype.name], list(p.type.shape)
            if (found.get_dtype(), list(found.get_shape())) != expected:
                raise DfcError(
                    "D041",
                    f"{path}: !{name} is {found.get_dtype()}{found.get_shape()}, "
                    f"the graph says {p.type}",
                )
            assert isinstance(p.data, HashOnly)
            p.data = SafetensorsData(path, name, p.data.digest)


def attach_weights(graph: Graph, path: Path) -> None:
    """Give parameters without data their numbers from a safetensors file, by name or alias.

    Raises:  DfcError D044 for a file that is not safetensors, D041 for what it lacks, Q055 where
             every parameter has its numbers.
    """
    from safetensors import SafetensorError, safe_open

    if all(p.data is not None for p in graph.parameters.values()):
        message = f"the model has all its weights: nothing would be read from {path}"
        raise DfcError("Q055", message, help="leave the file out", status=2)
    try:
        with safe_open(path, framework="pt") as f:
            held = {k: (f.get_slice(k).get_dtype(), f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise DfcError("D044", f"{path} cannot be read as safetensors: {e}") from e
    for p in graph.parameters.values():
        if p.data is not None:
            continue
        key = next((n for n in (p.name, *p.aliases) if n in held), None)
        if key is None:
            raise DfcError("D041", f"{path}: the weights lack !{p.name}")
        assert isinstance(p.type, TensorType)
        dtype, shape = held[key]
        if (dtype, list(shape)) != (SAFETENSORS.get(p.type.dtype.name), list(p.type.shape)):
            raise DfcError("D041", f"{path}: !{key} is {dtype}{shape}, the graph says {p.type}")
        p.data = SafetensorsData(path, key)


def check_weights(graph: Graph) -> None:
    """Compare each parameter's numbers with the digest that the graph states.

    Raises:  DfcError D042 that names the parameter.
    """
    for name, p in graph.parameters.items():
        if p.data is not None and tensor_sha256(p.data.tensor()) != p.data.sha256():
            raise DfcError("D042", f"the numbers of !{name} are not those that the graph names")


def _bytes(t: object) -> int:
    assert isinstance(t, TensorType)
    return int(t.numel) * t.dtype.itemsize  # type: ignore[arg-type]


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _lock(compiled: Compiled) -> dict[str, Any]:
    import torch

    import dfc

    return {
        "dfc": dfc.__version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "engine": compiled.engine.name,
        "device": compiled.device,
        "measured_on": machine_text(compiled.report.machine),
        "seed": 0,
    }


def lighter(probes: Sequence[Probe], most: int) -> list[Probe]:
    """The example, and the smallest of the other probes as long as their inputs fit.

    Why:  the keys and values that a decoder looks up are inputs, and took four times as much as
          its weights in eight bits.
    """
    held, left = {0}, most
    for i in sorted(range(1, len(probes)), key=lambda i: _tensor_bytes(probes[i].inputs)):
        left -= _tensor_bytes(probes[i].inputs)
        held |= {i} if left >= 0 else set()
    return [p for i, p in enumerate(probes) if i in held]


def _tensor_bytes(values: Iterable[Any]) -> int:
    import torch

    return sum(x.nbytes for x in values if isinstance(x, torch.Tensor))


def within_bytes(probes: Sequence[Probe], most: int) -> list[Probe]:
    """The probes with their results as long as those fit, the small ones first; the others have
    their inputs alone, and whoever asks computes results by the package's own graph.

    Why:  what an encoder gives for a few seconds of sound, in float64 as well, took thirty times as
          much as its weights in eight bits.
    """

    def size(probe: Probe) -> int:
        return _tensor_bytes([*(probe.original or ()), *(probe.witness or ())])

    held, left = set(), most
    for i, probe in sorted(enumerate(probes), key=lambda x: size(x[1])):
        left -= size(probe)
        held |= {i} if left >= 0 else set()
    return [p if i in held else replace(p, original=None, witness=None)
            for i, p in enumerate(probes)]  # fmt: skip


def write_probes(path: Path, probes: list[Any]) -> None:
    """Tensors as they are; Python numbers in the metadata of the first entry's name."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for i, probe in enumerate(probes):
        for kind in ("inputs", "original", "witness"):
            for j, x in enumerate(getattr(probe, kind) or ()):
                key = f"{i}.{kind}.{j}"
                if isinstance(x, torch.Tensor):
                    wide = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
                    tensors[key + (".complex" if x.is_complex() else "")] = wide
                else:
                    wide_dtype = torch.float64 if isinstance(x, float) else None
                    tensors[f"{key}.{type(x).__name__}"] = torch.tensor(x, dtype=wide_dtype)
    types = {k: TensorType.of(x) for k, x in tensors.items()}
    labels = {str(i): probe.label for i, probe in enumerate(probes)}
    write_safetensors(path, types, iter(tensors.values()), labels)


def read_probes(path: Path) -> list[Any]:
    import torch
    from safetensors import safe_open

    from dfc.rewrite.probe import Probe

    found: dict[int, dict[str, dict[int, Any]]] = {}
    with safe_open(path, framework="pt") as f:
        labels = f.metadata() or {}
        for key in f.keys():  # noqa: SIM118 - not a dict
            parts = key.split(".")
            x: Any = f.get_tensor(key)
            if parts[3:] == ["complex"]:
                x = torch.view_as_complex(x)
            elif parts[3:]:
                x = x.item()
            found.setdefault(int(parts[0]), {}).setdefault(parts[1], {})[int(parts[2])] = x

    def ordered(values: dict[int, Any]) -> list[Any]:
        return [values[j] for j in sorted(values)]

    return [
        Probe(
            labels.get(str(i), f"probe {i}"),
            ordered(kinds.get("inputs", {})),
            ordered(kinds.get("original", {})),
            ordered(kinds.get("witness", {})),
        )
        for i, kinds in sorted(found.items())
    ]


__all__ = ["DTYPES", "Package", "check_weights", "dtype_of", "read_package", "write_package"]
