"""A folder of ONNX stages as a pipeline: read, checked, and run in ONNX Runtime.

The manifest answers for every byte. What `plan.json` says is believed only after it agrees with
the graph, whose nodes carry their stages, and with the inputs and outputs of the files themselves.

D060  plan.json cannot be read     D062  it is not a plan of this graph
D061  another schema               D063  a stage file is not what it says
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dfc.emit.onnx_run import Session
from dfc.emit.onnx_stages import GRAPH, KIND, PLAN, SCHEMA, plan_data, stage_graphs
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.verify import verify
from dfc.lang.graph_parser import parse_graph
from dfc.manifest import check_manifest
from dfc.planning.actions import Program, of_rows, parse_program
from dfc.planning.engine import Runner
from dfc.planning.schedules import forward_of
from dfc.planning.stages import StageGraph
from dfc.runtime.pipeline.local import Pipeline


@dataclass(frozen=True)
class Bundle:
    """A folder of stages, read and checked."""

    path: Path
    graph: Graph
    stage_of: Mapping[Node, int]
    stages: list[StageGraph]
    data: Mapping[str, Any]  # plan.json
    program: Program

    def pipeline(
        self, *, microbatches: int | None = None, threads: int | None = None
    ) -> Pipeline:  # fmt: skip
        """The stages, ready to be called like the model.

        Raises:  DfcError X002 for a file that ONNX Runtime refuses, D063.
        """
        return Pipeline(
            self.graph, self.stage_of, build=self.runner, batch=self.data["batch"],
            microbatches=microbatches or self.program.microbatches, threads=threads,
            placement=self.program.placement, program=partial(forward_of, self.program),
        )  # fmt: skip

    def runner(self, index: int, stage: StageGraph, threads: int) -> Runner:
        """A stage in a session of its own.

        Raises:  DfcError D063 when the file has other inputs or outputs than the plan says.
        """
        row = self.data["stages"][index]
        session = Session(self.path / row["file"], stage.graph, threads=threads)
        for what, found in (("inputs", session.inputs), ("outputs", session.outputs)):
            told = [port["name"] for port in row[what]]
            if found != told:
                raise DfcError(
                    "D063", f"`{self.path / row['file']}` has the {what} {found}, "
                    f"{PLAN} says {told}",
                )  # fmt: skip
        return session.run


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Check every byte, then what the parts say of each other.

    Raises:  DfcError D020.. for the folder, P and V families (status 2) for the graph, D060..D063,
             N020.. for a program that may not run.
    """
    folder = Path(path)
    check_manifest(folder, kind=KIND)
    graph = _graph(folder / GRAPH)
    data = _data(folder / PLAN)
    stage_of = {n: n.stage for n in graph.nodes if n.stage is not None}
    try:
        stages = stage_graphs(graph, stage_of, data["schema"])
    except DfcError as e:
        raise DfcError("D062", f"{folder / GRAPH}: {e.message}") from e
    program = _program(data, folder / PLAN)
    if program.stages != len(stages):
        raise DfcError(
            "D062", f"{folder / PLAN} has actions of {program.stages} stages, "
            f"{GRAPH} has {len(stages)}",
        )  # fmt: skip
    follows = plan_data(graph, stages, program, data.get("batch"), folder, data["schema"])
    _agree(data, follows, folder / PLAN)
    return Bundle(folder, graph, stage_of, stages, data, program)


def _graph(path: Path) -> Graph:
    graph = parse_graph(_text(path), str(path))
    try:
        verify(graph)
    except DfcError as e:
        raise DfcError.of(e.diagnostics, status=2) from e
    return graph


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise DfcError("D060", f"{path} is missing") from e
    except UnicodeDecodeError as e:
        raise DfcError("D060", f"{path} is not UTF-8 text: byte {e.start} is wrong") from e


def _data(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_text(path))
    except ValueError as e:
        raise DfcError("D060", f"{path} is not JSON: {e}") from e
    schema = (data.get("schema"), data.get("kind")) if isinstance(data, dict) else None
    if schema not in ((1, KIND), (SCHEMA, KIND)):
        raise DfcError("D061", f"{path} is no plan of {KIND} that this dfc reads: {schema}")
    found: dict[str, Any] = data
    return found


def _program(data: Mapping[str, Any], path: Path) -> Program:
    try:
        told = data["program"]
        read = parse_program("\n".join(told["ranks"]), str(told["name"]), str(path))
        placement = [int(rank) for rank in told["placement"]]
    except (KeyError, TypeError, ValueError) as e:
        message = f"{path} holds what dfc does not write: {type(e).__name__}: {e}"
        raise DfcError("D060", message) from e
    if placement != list(read.placement):
        raise DfcError("D062", f"{path}: the actions are not those of the placement {placement}")
    return of_rows(read.name, read.ranks, placement)


def _agree(told: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """What plan.json says, against what follows from the graph and the files."""
    for key, value in found.items():
        if told.get(key) != value:
            where = _where(key, told.get(key), value)
            raise DfcError("D062", f"{path} disagrees with {GRAPH} and its files: {where}")


def _where(key: str, told: Any, found: Any) -> str:
    """The first place at which two values differ."""
    if isinstance(told, dict) and isinstance(found, dict):
        for k in sorted({*told, *found}):
            if told.get(k) != found.get(k):
                return _where(f"{key}.{k}", told.get(k), found.get(k))
    if isinstance(told, list) and isinstance(found, list) and len(told) == len(found):
        for i, (a, b) in enumerate(zip(told, found, strict=True)):
            if a != b:
                return _where(f"{key}[{i}]", a, b)
    return f"`{key}` is {_short(told)}, it should be {_short(found)}"


def _short(x: Any) -> str:
    text = json.dumps(x)
    return text if len(text) <= 80 else f"{text[:77]}..."
