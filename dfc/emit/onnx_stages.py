"""A partitioned graph as a folder of ONNX files, one a stage, that run as a pipeline.

    manifest.json           closed list of files with sha256
    plan.json               stages, edges, types, tied parameters, actions: see `STAGES`
    graph.dfc               the whole graph, each node with its stage
    stage_00.onnx ...       standard operators, inputs and outputs named as in plan.json
    probes.safetensors      an example and its results, where there is one

Every stage is run in ONNX Runtime against the graph's own results before anything is published,
and so are all of them one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfc.counting import counted
from dfc.emit.onnx_export import Probe, Written, _parts, compare, export_onnx
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import interpret
from dfc.ir.tree import Leaf, Map
from dfc.planning.actions import Program
from dfc.planning.schedules import forward_program
from dfc.planning.stages import HOST, StageGraph, split

KIND = "stages"  # of the manifest
PLAN = "plan.json"
GRAPH = "graph.dfc"
PROBES = "probes.safetensors"
SCHEMA = 2  # 1 numbered the outputs of each stage; such folders are read
MICROBATCHES = 8
_BLOCK = 1 << 20


def is_stages(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it holds ONNX stages."""
    from dfc.manifest import kind_of

    return kind_of(path) == KIND


def staged(graph: Graph, stage_of: Mapping[Node, int] | None = None) -> dict[Node, int]:
    """The stage of every node: the given one, else its own.

    Raises:  DfcError X005 for a graph that is not partitioned.
    """
    if stage_of is not None:
        return dict(stage_of)
    found = {n: n.stage for n in graph.nodes if n.stage is not None}
    if not found:
        raise DfcError(
            "X005", "the model is not partitioned: its nodes have no stages",
            help="write `partition` before `emit`, or say how many: stages=2", status=2,
        )  # fmt: skip
    return found


def export_stages(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    stage_of: Mapping[Node, int] | None = None,
    program: Program | None = None,
    batch: str | None = None,
    probes: Sequence[Probe] = (),
    force: bool = False,
    beside: Callable[[Path], None] = lambda folder: None,
    **options: Any,
) -> list[Written]:
    """Write the folder, all or nothing.

    `program` says what each rank does; by default each stage has its own. `beside` may write more
    files into the folder. `options` are those of `export_onnx`.
    Raises:  DfcError X005 for a graph without stages, N050 for stages that cannot be, X006 for an
             output that no stage makes; what `export_onnx` raises, D010.. for the folder.
    """
    from dfc.manifest import write_manifest
    from dfc.publish import publish_folder

    stages_of = staged(graph, stage_of)
    stages = stage_graphs(graph, stages_of)
    _refuse_parameters(graph)
    actions = program or forward_program(range(len(stages)), MICROBATCHES)
    if actions.stages != len(stages):
        raise DfcError(
            "N054", f"the program has {counted(actions.stages, 'stage')}, the graph {len(stages)}"
        )
    shown = _with_stages(graph, stages_of)
    with publish_folder(path, force=force, expect_bytes=_bytes(stages)) as temp:
        traced = [_run_stages(graph, stages, _parts(p)[0]) for p in probes]
        written = []
        for i, stage in enumerate(stages):
            own = [(found[i].inputs, found[i].outputs) for found in traced]
            file = temp / stage_file(i)
            try:
                written.append(export_onnx(stage.graph, file, probes=own, **options))
            except DfcError as e:
                raise _in_stage(e, i) from e
        _prove_whole(graph, stages, temp, probes, options.get("rtol", 1e-4))
        (temp / GRAPH).write_text(str(shown), encoding="utf-8")
        plan = plan_data(graph, stages, actions, batch, temp)
        (temp / PLAN).write_text(json.dumps(plan, indent=1, sort_keys=True) + "\n", "utf-8")
        beside(temp)
        write_manifest(temp, KIND)
    return written


def stage_graphs(
    graph: Graph, stage_of: Mapping[Node, int], schema: int | None = None
) -> list[StageGraph]:
    """The stages, as their files have them: what one hands on has its value's name, by which the
    later ones ask for it; what only leaves the model is called as in the file of the whole.

    Raises:  DfcError N050.
    """
    from dfc.emit.onnx import output_names

    stages = split(graph, stage_of)
    if (schema or SCHEMA) == 1:
        return stages
    ends = dict(zip(graph.outputs, output_names(graph), strict=True))
    taken = {v for stage in stages for v in stage.takes}
    used = {v.name for stage in stages for v in (*stage.takes, *stage.gives)}
    for stage in stages:
        own = [v in taken or v not in ends or ends[v] in used for v in stage.gives]
        names = [v.name if o else ends[v] for v, o in zip(stage.gives, own, strict=True)]
        stage.graph.output_tree = Map(tuple(names), tuple(Leaf() for _ in names))
    return stages


def stage_file(index: int) -> str:
    return f"stage_{index:02}.onnx"


def plan_data(
    graph: Graph, stages: Sequence[StageGraph], program: Program, batch: str | None, folder: Path,
    schema: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What plan.json holds besides the digests of its files: all that a runtime needs to know."""
    from dfc.emit.onnx import input_names, output_names

    home = {v: (HOST, name) for v, name in zip(graph.inputs, input_names(graph), strict=True)}
    rows = []
    for i, stage in enumerate(stages):
        takes, gives = input_names(stage.graph), output_names(stage.graph)
        home.update((v, (i, name)) for v, name in zip(stage.gives, gives, strict=True))
        file = stage_file(i)
        rows.append({
            "file": file,
            "sha256": _sha256(folder / file),
            "nodes": len(stage.graph),
            "inputs": [_port(name, v, home[v]) for name, v in zip(takes, stage.takes, strict=True)],
            "outputs": [_port(name, v) for name, v in zip(gives, stage.gives, strict=True)],
        })  # fmt: skip
    ends = zip(output_names(graph), graph.outputs, strict=True)
    return {
        "schema": schema or SCHEMA,
        "kind": KIND,
        "model": graph.name,
        "batch": batch,
        "inputs": [_port(n, v) for n, v in zip(input_names(graph), graph.inputs, strict=True)],
        "outputs": [_port(n, v, home[v]) for n, v in ends],
        "sizes": {name: list(ends) for name, ends in sorted(graph.ranges.items())},
        "stages": rows,
        "edges": _edges(stages),
        "tied": _tied(stages),
        "program": {
            "name": program.name,
            "placement": list(program.placement),
            "microbatches": program.microbatches,
            "ranks": str(program).splitlines(),
        },
    }


def _port(name: str, value: Value, source: tuple[int, str] | None = None) -> dict[str, Any]:
    """One input or output: its ONNX name, its value in the graph, its type, where it comes from."""
    found: dict[str, Any] = {"name": name, "value": value.name, "type": str(value.type)}
    if source is not None:
        found |= {"from": source[0], "as": source[1]}
    return found


def _edges(stages: Sequence[StageGraph]) -> list[dict[str, Any]]:
    found: dict[tuple[int, int], list[str]] = {}
    for i, stage in enumerate(stages):
        for v, source in zip(stage.takes, stage.sources, strict=True):
            if source != HOST:
                found.setdefault((source, i), []).append(v.name)
    return [{"from": a, "to": b, "values": names} for (a, b), names in sorted(found.items())]


def _tied(stages: Sequence[StageGraph]) -> list[dict[str, Any]]:
    """Parameters that several stages hold: each file has its copy."""
    users: dict[str, list[int]] = {}
    for i, stage in enumerate(stages):
        for name in stage.graph.parameters:
            users.setdefault(name, []).append(i)
    return [{"parameter": n, "stages": s} for n, s in sorted(users.items()) if len(s) > 1]


def _refuse_parameters(graph: Graph) -> None:
    for v in graph.outputs:
        if isinstance(v, Parameter):
            raise DfcError(
                "X006", f"the model hands back its parameter `{v.name}`, which no stage computes",
                help="let the model return what it computes only", status=3,
            )  # fmt: skip


def _with_stages(graph: Graph, stage_of: Mapping[Node, int]) -> Graph:
    copy, _ = graph.copy_with_map()
    for mine, node in zip(copy.nodes, graph.nodes, strict=True):
        copy.set_stage(mine, stage_of[node])
    return copy


class _Traced:
    """What a stage took and gave on a probe."""

    def __init__(self, inputs: list[Any], outputs: list[Any]) -> None:
        self.inputs, self.outputs = inputs, outputs


def _run_stages(graph: Graph, stages: Sequence[StageGraph], inputs: Sequence[Any]) -> list[_Traced]:
    values: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    found = []
    for stage in stages:
        taken = [values[v] for v in stage.takes]
        made = interpret(stage.graph, taken)
        values.update(zip(stage.gives, made, strict=True))
        found.append(_Traced(taken, list(made)))
    return found


def _prove_whole(
    graph: Graph, stages: Sequence[StageGraph], folder: Path, probes: Sequence[Probe], rtol: float
) -> None:
    """All stages one after another in ONNX Runtime, against the model's own results."""
    from dfc.emit.onnx import is_random, output_names
    from dfc.emit.onnx_run import Session
    from dfc.ops.rounding import ROUNDED_RTOL, rounds_values

    if not probes:
        return
    sessions = [Session(folder / stage_file(i), s.graph) for i, s in enumerate(stages)]
    for index, probe in enumerate(probes):
        inputs, expected, witness = _parts(probe)
        values: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
        for stage, session in zip(stages, sessions, strict=True):
            made = session.run([values[v] for v in stage.takes])
            values.update(zip(stage.gives, made, strict=True))
        compare(
            graph, inputs, expected, [values[v] for v in graph.outputs], output_names(graph),
            rtol=rtol, random=is_random(graph), witness=witness,
            where=f"probe {index}, all stages",
            rounded=ROUNDED_RTOL if rounds_values(graph) else 0.0,
        )  # fmt: skip


def _in_stage(error: DfcError, stage: int) -> DfcError:
    message = f"stage {stage}: {error.message}"
    return DfcError(
        error.code, message, help=error.diagnostics[0].help, notes=error.diagnostics[0].notes,
        status=error.status,
    )  # fmt: skip


def _bytes(stages: Sequence[StageGraph]) -> int:
    held = [p for s in stages for p in s.graph.parameters.values() if p.data is not None]
    return sum(p.data.tensor().nbytes for p in held if p.data is not None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
