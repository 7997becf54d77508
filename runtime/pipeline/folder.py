"""What ranks are made of, in a folder: stage graphs as text, weights by reference, edges.

    pipeline.json      versions, placement, engines, threads, edges
    stage_00.dfc ...   one graph a stage, without weights
    weights.safetensors  only what no file holds yet

A rank reads its own stages. Values have numbers instead of names, the same in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.types import TensorType, Type
from dfc.ir.weights import SafetensorsData, TensorData, write_safetensors
from dfc.planning.engine import Runner
from dfc.planning.stages import StageGraph
from dfc.runtime.pipeline.lanes import Run, Values
from dfc.runtime.pipeline.links import Doing, Traffic
from dfc.runtime.pipeline.rank import Done, run_rank
from dfc.runtime.pipeline.rank_device import RankDevice
from dfc.runtime.pipeline.routes import Edge, Routes
from dfc.runtime.pipeline.streams import on_stream
from dfc.runtime.tiers.stages import (
    STREAMS,
    Brought,
    build_stage,
    close_all,
    plan_data,
    plan_of,
)

if TYPE_CHECKING:
    from dfc.ir.graph import Graph, Parameter, ParameterData
    from dfc.planning.actions import Action
    from dfc.planning.tiers import Tiers

_FILE = "pipeline.json"
_LINE = 64  # bytes


@dataclass(frozen=True)
class Assembly:
    """What every rank has to know of the whole, the same for all."""

    placement: list[int]
    engines: list[str]  # of each stage
    threads: list[int]  # of each rank
    devices: list[str]  # of each rank
    edges: list[list[Any]]  # source, target, values, backward
    takes: list[list[int]]  # of each stage, by number
    gives: list[list[int]]
    weights: dict[str, list[str]]  # file and key of each parameter
    versions: dict[str, str] = field(default_factory=dict)
    tiers: list[dict[str, Any]] = field(default_factory=list)  # of each stage, where it has a plan

    def routed(self) -> list[Edge]:
        return [Edge(s, t, tuple(v), back) for s, t, v, back in self.edges]

    @property
    def digest(self) -> str:
        """Equal for ranks that run the same plan with the same versions."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What has to be equal on all ranks."""
    import platform

    import torch

    import dfc

    python = ".".join(platform.python_version_tuple()[:2])
    return {"dfc": dfc.__version__, "torch": torch.__version__, "python": python}


def assembly(
    stages: Sequence[StageGraph],
    edges: Sequence[Edge],
    placement: Sequence[int],
    engines: Sequence[str],
    threads: Sequence[int],
    devices: Sequence[str] = (),
    tiers: Sequence[Tiers] = (),
) -> tuple[Assembly, dict[Hashable, int]]:
    """What the ranks have to know, without weights, and the number of each value.

    Without `devices` every rank computes on the processor.
    """
    numbers: dict[Hashable, int] = {}
    for e in edges:
        for v in e.values:
            numbers.setdefault(v, len(numbers))
    for s in stages:
        for v in (*s.takes, *s.gives):
            numbers.setdefault(v, len(numbers))
    made = Assembly(
        list(placement), list(engines), list(threads),
        list(devices) or ["cpu"] * len(threads),
        [[e.source, e.target, [numbers[v] for v in e.values], e.backward] for e in edges],
        [[numbers[v] for v in s.takes] for s in stages],
        [[numbers[v] for v in s.gives] for s in stages],
        {}, versions(), [plan_data(t) for t in tiers],
    )  # fmt: skip
    return made, numbers


def write_assembly(folder: Path, made: Assembly, stages: Sequence[StageGraph]) -> None:
    """Write the folder. Weights that a file holds stay there; others are written once."""
    made.weights.update(write_graphs(folder, [s.graph for s in stages]))
    (folder / _FILE).write_text(json.dumps(asdict(made)), encoding="utf-8")


def write_graphs(folder: Path, graphs: Sequence[Graph]) -> dict[str, list[str]]:
    """Write graphs without weights, and those that no file holds; file and key of each weight."""
    loose: dict[str, Parameter] = {}
    weights: dict[str, list[str]] = {}
    for i, graph in enumerate(graphs):
        bare = graph.copy()
        for name, p in graph.parameters.items():
            if isinstance(p.data, SafetensorsData):
                weights[name] = [str(p.data.path.absolute()), p.data.key]
            elif p.data is not None:
                loose[name] = p
                weights[name] = [str(folder / "weights.safetensors"), name]
            bare.parameters[name].data = None
        (folder / _stage(i)).write_text(str(bare), encoding="utf-8")
    if loose:
        types = {name: p.type for name, p in loose.items()}
        tensors = (p.data.tensor() for p in loose.values() if p.data is not None)
        write_safetensors(folder / "weights.safetensors", types, tensors)  # type: ignore[arg-type]
    return weights


def read_assembly(folder: Path) -> Assembly:
    """What `write_assembly` wrote.

    Raises:  DfcError N055 when this process has other versions than who wrote it.
    """
    made = Assembly(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    mine = versions()
    for what, version in made.versions.items():
        if mine.get(what) != version:
            raise DfcError(
                "N055", f"the plan was made with {what} {version}, this rank has {mine.get(what)}",
                help="install the same versions everywhere",
            )  # fmt: skip
    return made


def read_graph(
    folder: Path, weights: Mapping[str, Sequence[str]], number: int, copied: bool = False
) -> Graph:
    """A graph of `write_graphs`, its weights mapped from their files; with `copied`, those that
    lay in memory when they were written lie there as they did: aligned."""
    from dfc.lang.graph_parser import parse_graph

    path = folder / _stage(number)
    graph = parse_graph(path.read_text(encoding="utf-8"), str(path))
    for name, p in graph.parameters.items():
        if name in weights:
            file, key = weights[name]
            data = SafetensorsData(Path(file), key)
            p.data = aligned(name, data) if copied and Path(file).parent == folder else data
    return graph


def aligned(name: str, data: ParameterData) -> ParameterData:
    """Weights as PyTorch aligns its own; files have them anywhere.

    Why:     products of what lies elsewhere are rounded in another order.
    """
    x = data.tensor()
    return TensorData(name, x.clone()) if x.data_ptr() % _LINE else data


class Stages:
    """The stages of one rank, built for their engines on its device.

    `device` is what that is called in this process, where it is called otherwise.
    """

    def __init__(
        self, made: Assembly, graphs: dict[int, Graph], rank: int, device: str = ""
    ) -> None:
        self.made, self.graphs, self.rank = made, graphs, rank
        self.device = RankDevice(device or made.devices[rank])
        self._runners = {s: self._built(s, made.threads[rank]) for s in graphs}
        self.brought = Brought(self._runners)
        self._paced: Run = self.device.paced(self._run, len(made.placement))

    def row(
        self, routes: Routes, traffic: Traffic, microbatches: Sequence[int], doing: Doing
    ) -> Done:  # fmt: skip
        """This rank's row of a program, for these microbatches.

        Raises:  DfcError K050 for an action that fails, LinkLost, Abandoned.
        """
        with self.device.step():
            done = run_rank(self.rank, routes, self._paced, traffic, microbatches, doing)
        return Done(self.device.timed(done.spans), done.sent)

    def _built(self, stage: int, threads: int) -> Runner:
        from dfc.runtime.engines import find_engine

        name, graph, device = self.made.engines[stage], self.graphs[stage], self.device.name
        if self.made.tiers and name == STREAMS:
            return build_stage(graph, plan_of(self.made.tiers[stage]), device)
        return on_stream(name, find_engine(name).build(graph, device, threads), device)

    def close(self) -> None:
        """End what runners hold."""
        close_all(list(self._runners.values()))

    def _run(self, action: Action, values: Values) -> Values:
        """A forward action, as lanes run it; values go by number."""
        s = action.stage
        results = self._runners[s]([values[k] for k in self.made.takes[s]])
        return dict(zip(self.made.gives[s], results, strict=False))

    def types(self, edges: Sequence[Edge]) -> dict[int, list[Type]]:
        """The types of the edges that this rank has part in."""
        known: dict[Hashable, Type] = {}
        for s, g in self.graphs.items():
            known.update(zip(self.made.takes[s], (v.type for v in g.inputs), strict=True))
            known.update(zip(self.made.gives[s], (v.type for v in g.outputs), strict=True))
        return {
            i: [known[v] for v in e.values]
            for i, e in enumerate(edges)
            if all(v in known for v in e.values)
        }


def stages_of(made: Assembly, rank: int) -> list[int]:
    return [s for s, r in enumerate(made.placement) if r == rank]


def _stage(i: int) -> str:
    return f"stage_{i:02d}.dfc"


__all__ = ["Assembly", "Run", "Stages", "TensorType", "assembly", "read_assembly", "read_graph"]
