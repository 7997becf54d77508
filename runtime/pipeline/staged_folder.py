"""A staged model in a folder, as the ranks of a trainer are started from it.

Differentiating is dear and is done once: the ranks read the joint graphs of their stages as text,
as they do the model's graph. Weights stay in their files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dfc.capture.training import Joint
from dfc.ir.graph import Graph, Value
from dfc.planning.stages import StageGraph
from dfc.runtime.pipeline.differentiated import Differentiated, Flow
from dfc.runtime.pipeline.folder import aligned, read_graph, write_graphs
from dfc.runtime.pipeline.staged_model import StagedModel


def write_staged(folder: Path, model: StagedModel) -> dict[str, Any]:
    """Write the graphs of a model and of its stages; what `read_staged` needs beside them.

    Raises:  DfcError N070 for an operator that PyTorch cannot differentiate.
    """
    joints = [part.whole for part in model.parts]
    weights = write_graphs(folder, [model.graph, *(joint.graph for joint in joints)])
    return {"weights": weights, "stages": model.stage_of, "joints": list(map(_told, joints))}


def read_staged(folder: Path, told: Mapping[str, Any]) -> StagedModel:
    """The model, whose joint graphs are read when they are first asked for."""
    graph = read_graph(folder, told["weights"], 0)
    stages = {n: s for n, s in zip(graph.nodes, told["stages"], strict=True) if s is not None}
    parts = partial(_parts, folder, told)
    return StagedModel(graph, stages, parts=parts)


def _parts(
    folder: Path, told: Mapping[str, Any], stages: Sequence[StageGraph]
) -> list[Differentiated]:
    def joint(number: int) -> Joint:
        graph = read_graph(folder, told["weights"], 1 + number)
        for p in graph.parameters.values():
            p.data = p.data and aligned(p.name, p.data)
        return _joint(graph, told["joints"][number])

    found = []
    for number, (stage, roles) in enumerate(zip(stages, told["joints"], strict=True)):
        flow = Flow(tuple(roles["takes"]), tuple(roles["gradients"]))
        found.append(Differentiated(number, stage, flow, partial(joint, number)))
    return found


def _told(joint: Joint) -> dict[str, Any]:
    """The roles of a joint graph's inputs and outputs, which are in the order of `Joint`'s."""
    return {
        "inputs": len(joint.inputs), "lifted": _lifted(joint), "state": list(joint.state),
        "outputs": len(joint.outputs), "tangents": _present(joint.tangents),
        "takes": _present(joint.input_gradients), "gradients": list(joint.weight_gradients),
    }  # fmt: skip


def _lifted(joint: Joint) -> list[str]:
    """The names of weights and of buffers that change, in the order of the graph's inputs."""
    names = {v: n for n, v in (*joint.weights.items(), *joint.state.items())}
    return [names[v] for v in joint.graph.inputs if v in names]


def _joint(graph: Graph, roles: Mapping[str, Any]) -> Joint:
    inputs, outputs = iter(graph.inputs), iter(graph.outputs)

    def optional(has: Collection[bool], values: Iterable[Value]) -> tuple[Value | None, ...]:
        it = iter(values)
        return tuple(next(it) if h else None for h in has)

    own = tuple(next(inputs) for _ in range(roles["inputs"]))
    lifted = {name: next(inputs) for name in roles["lifted"]}
    return Joint(
        graph=graph,
        inputs=own,
        weights={n: v for n, v in lifted.items() if n not in roles["state"]},
        state={n: lifted[n] for n in roles["state"]},
        tangents=optional(roles["tangents"], inputs),
        outputs=tuple(next(outputs) for _ in range(roles["outputs"])),
        input_gradients=optional(roles["takes"], outputs),
        weight_gradients={name: next(outputs) for name in roles["gradients"]},
    )


def _present(values: Iterable[Value | None]) -> list[bool]:
    return [v is not None for v in values]
