"""The stages of a graph with their gradients, and what goes from stage to stage in a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from dfc.capture.training import Derivatives, Joint, joint_graph
from dfc.errors import DfcError
from dfc.ir.graph import Value
from dfc.planning.backward import Cut, cut
from dfc.planning.stages import HOST, StageGraph
from dfc.runtime.pipeline.routes import Edge


@dataclass(frozen=True)
class Gradient:
    """The name under which the derivative of the loss by a value travels.

    A value that several stages read has one for each: whoever made the value adds them up. `reader`
    is HOST for the loss itself, whose derivative is what a microbatch counts for.
    """

    value: Value
    reader: int


@dataclass(frozen=True)
class Flow:
    """What others have to know of a stage's gradients: of what it takes, and of its weights."""

    takes: tuple[bool, ...]
    weights: tuple[str, ...]


class Differentiated:
    """One stage: its graph, its joint graph, and the parts of that which actions run.

    The joint graph is made when it is first asked for: who runs some of the stages pays for those.
    """

    def __init__(
        self, number: int, stage: StageGraph, flow: Flow, make: Callable[[], Joint]
    ) -> None:
        self.number, self.stage, self.flow, self._make = number, stage, flow, make

    @cached_property
    def whole(self) -> Joint:
        """The joint graph before it was cut."""
        made = self._make()
        assert tuple(g is not None for g in made.input_gradients) == self.flow.takes
        assert tuple(made.weight_gradients) == self.flow.weights
        return made

    @cached_property
    def joint(self) -> Joint:
        """The joint graph, with sums of gradients: its values are those of the parts."""
        return self.whole.copy()

    @cached_property
    def cut(self) -> Cut:
        return cut(self.joint)

    def gradients(self) -> list[Gradient]:
        """What goes back to earlier stages, in the order of what the stage takes."""
        pairs = zip(self.stage.takes, self.flow.takes, strict=True)
        return [Gradient(v, self.number) for v, has in pairs if has]


def differentiated(
    stages: Sequence[StageGraph], weights: Sequence[str], loss: Value, state: Collection[str] = ()
) -> list[Differentiated]:
    """Find what gradients go from stage to stage, from the last to the first.

    Needs:   `loss` is what a stage gives; `state` are the buffers that change.
    Raises:  DfcError N072 for a loss that no weight changes, N070 and N071 as `joint_graph`.
    """
    depends: set[Value] = set()  # on a weight, by derivatives
    traced = []
    for stage in stages:
        traced.append(Derivatives(stage.graph, weights, [v in depends for v in stage.takes]))
        depends |= {v for v, d in zip(stage.gives, traced[-1].outputs, strict=True) if d}
    if loss not in depends:
        raise _nothing_to_train(stages, weights, loss)
    wanted, made = {loss}, []
    for number in reversed(range(len(stages))):
        stage = stages[number]
        outputs = [v in wanted and v in depends for v in stage.gives]
        takes, names = traced[number].by(outputs)
        inputs = [v in depends for v in stage.takes]
        make = partial(joint_graph, stage.graph, weights, inputs, outputs, [*state])
        made.append(Differentiated(number, stage, Flow(tuple(takes), tuple(names)), make))
        wanted |= {g.value for g in made[-1].gradients()}
    return made[::-1]


def _nothing_to_train(
    stages: Sequence[StageGraph], weights: Sequence[str], loss: Value
) -> DfcError:
    message, help = f"the loss %{loss.name} does not depend on any weight", None
    kinds = {p.kind for s in stages for p in s.graph.parameters.values()}
    if not weights and "frozen" in kinds:
        message = "the model cannot be trained: all its weights are frozen"
        help = "call requires_grad_() on those to be trained, and trace it again"
    return DfcError("N072", message, help=help, status=2)


def edges_of(stages: Sequence[Differentiated], loss: Value) -> list[Edge]:
    """What goes between stages, and between them and the caller."""
    last = next(s.number for s in stages if loss in s.stage.gives)
    found = [
        Edge(HOST, last, (Gradient(loss, HOST),), backward=True),
        Edge(last, HOST, (loss,)),
    ]
    for s in stages:
        forward: dict[int, list[Any]] = {}
        backward: dict[int, list[Any]] = {}
        for v, source in zip(s.stage.takes, s.stage.sources, strict=True):
            forward.setdefault(source, []).append(v)
        home = dict(zip(s.stage.takes, s.stage.sources, strict=True))
        for g in s.gradients():
            backward.setdefault(home[g.value], []).append(g)
        found += [Edge(source, s.number, tuple(v)) for source, v in sorted(forward.items())]
        found += [
            Edge(s.number, source, tuple(v), backward=True)
            for source, v in sorted(backward.items())
        ]
    return found


def readers_of(stages: Sequence[Differentiated]) -> Mapping[Value, tuple[Gradient, ...]]:
    """The gradients of each value that is handed on, the last reader's first, as autograd adds."""
    found: dict[Value, list[Gradient]] = {}
    for s in reversed(stages):
        for g in s.gradients():
            found.setdefault(g.value, []).append(g)
    return {v: tuple(g) for v, g in found.items()}
