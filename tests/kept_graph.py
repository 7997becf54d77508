"""A graph and its stages in a folder, for processes of a test: to capture it takes them seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dfc.ir.graph import Graph, Node
from dfc.runtime.pipeline.folder import read_graph, write_graphs


def keep(folder: Path, graph: Graph, stages: Mapping[Node, int]) -> None:
    told = write_graphs(folder, [graph]), [stages[n] for n in graph.nodes]
    (folder / "told.json").write_text(json.dumps(told))


def kept(folder: str) -> tuple[Graph, dict[Node, int]]:
    weights, stages = json.loads((Path(folder) / "told.json").read_text())
    graph = read_graph(Path(folder), weights, 0)
    return graph, dict(zip(graph.nodes, stages, strict=True))
