"""A model to be trained in stages: its loss, its stages with their gradients, their edges.

This is all that depends on the model and on how it is cut, and nothing of how it is run: trainers
in one process and in several take the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfc.capture.loss import loss_of, with_loss
from dfc.emit.checks import lift_checks
from dfc.emit.trainable import refuse_own_gradients, trainable
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import TensorType
from dfc.planning.stages import StageGraph, split
from dfc.runtime.pipeline.differentiated import (
    Differentiated,
    differentiated,
    edges_of,
    readers_of,
)
from dfc.runtime.pipeline.dropout import masked

if TYPE_CHECKING:
    import torch


class StagedModel:
    """A differentiated model.

    `graph` is called like the model, targets last; `inputs` says which value of the stages stands
    for which of its inputs; `masks` are inputs of the stages alone. `read` are the types of the
    weights that some stage trains, `state` the buffers that the model writes to, with what it
    writes, `checks` what must be true for the model to be what was traced, and what to say where it
    is not. `parts` makes the differentiated stages, where they are at hand already.
    Raises:  DfcError N050 for stages that are not convex or numbered, N07x for what cannot be
             trained, as a model that defines gradients itself.
    """

    def __init__(
        self,
        graph: Graph,
        stage_of: Mapping[Node, int],
        loss: Callable[..., Any] | None = None,
        targets: Sequence[TensorType | str] = (),
        parts: Callable[[Sequence[StageGraph]], list[Differentiated]] | None = None,
    ) -> None:
        self.graph = with_loss(graph, loss, targets) if loss else graph
        refuse_own_gradients(self.graph)
        inner = self.graph.copy()
        _write_stages(graph, inner, stage_of)
        self.stage_of = [n.stage for _, n in zip(self.graph.nodes, inner.nodes, strict=True)]
        inner, self.checks = _with_checks(inner)
        self.masks = masked(inner)
        self.inputs = dict(zip(self.graph.inputs, inner.inputs, strict=False))
        self.loss = loss_of(inner)
        self._trainable = {p.name: p for p in trainable(inner)}
        self.state = _state(inner)
        inner.set_outputs([self.loss, *self.state.values(), *self.checks])
        parted = split(inner, {n: n.stage for n in inner.nodes if n.stage is not None})
        stages = [_of_tensors(s) for s in parted]
        weights = list(self._trainable)
        _check_state(self.state, stages)
        self.parts = (
            parts(stages) if parts else differentiated(stages, weights, self.loss, self.state)
        )
        read = (p for s in stages for p in s.graph.parameters.values() if p.use_count)
        self.read = {p.name: p.tensor_type for p in read if p.name in self._trainable}
        self.edges = edges_of(self.parts, self.loss)
        self.readers = readers_of(self.parts)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, as the graph has them.

        Raises:  DfcError K021 for a model without numbers.
        """
        return {name: _data(p) for name, p in self._trainable.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that the model writes to, as the graph has them.

        Raises:  DfcError K021 for a model without numbers.
        """
        return {name: _data(self.graph.parameters[name]) for name in self.state}


def _of_tensors(stage: StageGraph) -> StageGraph:
    """The stage without the numbers that it gives: it reads them itself, as sizes."""
    gives = [v for v in stage.gives if isinstance(v.type, TensorType)]
    if len(gives) == len(stage.gives):
        return stage
    outputs = [v for v in stage.graph.outputs if isinstance(v.type, TensorType)]
    stage.graph.set_outputs(outputs, Seq("tuple", (LEAF,) * len(outputs)))
    return replace(stage, gives=tuple(gives))


def _with_checks(graph: Graph) -> tuple[Graph, dict[Value, str]]:
    """The graph without assertions, and what they asserted, with their messages.

    Why:  the parts of a stage are what makes its results and gradients, and assertions make none.
    """
    lifted, messages = lift_checks(graph, tensors=True)
    n = len(graph.outputs)
    checks = dict(zip(lifted.outputs[n:], messages, strict=True))
    if checks:
        mutations = [(m.target, m.value) for m in lifted.mutations]
        lifted.set_outputs(lifted.outputs[:n], graph.output_tree, mutations)
    return lifted, checks


def _data(p: Parameter) -> torch.Tensor:
    if p.data is None:
        raise DfcError(
            "K021", f"the parameter !{p.name} has no data: the model was traced on the meta "
            "device", help="load weights before training",
        )  # fmt: skip
    return p.data.tensor()


def _state(graph: Graph) -> dict[str, Value]:
    """What the model writes to its buffers.

    Raises:  DfcError N050 for a model that writes to what it is given, or to a weight.
    """
    found = {}
    for m in graph.mutations:
        if not isinstance(m.target, Parameter) or m.value.node is None:
            raise DfcError("N050", f"the model writes to %{m.target.name}: it cannot be trained in "
                           "stages", help="let it return the new value", status=2)  # fmt: skip
        if m.target.kind == "parameter":
            raise DfcError("N050", f"the model writes to its own weight !{m.target.name}, as "
                           "embeddings with max_norm do: it cannot be trained in stages",
                           help="let the training loop do so between steps", status=2)  # fmt: skip
        found[m.target.name] = m.value
    return found


def _check_state(state: Mapping[str, Value], stages: Sequence[StageGraph]) -> None:
    """Raises:  DfcError N050 for a buffer that a stage reads and another one writes."""
    for name, value in state.items():
        home = next(s for s, stage in enumerate(stages) if value in stage.gives)
        for s, stage in enumerate(stages):
            p = stage.graph.parameters.get(name)
            if s != home and p is not None and p.use_count:
                raise DfcError("N050", f"stage {s} reads the buffer !{name}, which stage {home} "
                               "writes", help="keep both in one stage", status=2)  # fmt: skip


def _write_stages(original: Graph, graph: Graph, stage_of: Mapping[Node, int]) -> None:
    """Write the stages of a graph's nodes on those of a copy, and the last on what follows them."""
    last = max(stage_of.values(), default=0)
    nodes = list(graph.nodes)
    for node, copy in zip(original.nodes, nodes, strict=False):
        graph.set_stage(copy, stage_of.get(node))
    for copy in nodes[len(original) :]:
        graph.set_stage(copy, last)
