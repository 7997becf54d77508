"""A joint graph cut into what a schedule's actions run: F, I, W, and B for I and W at once.

F makes the outputs, and what the backward pass reads of it. I makes the gradients by the inputs: an
earlier stage waits for them. W makes the weights' gradients, for which nobody waits; what it reads
of I is kept until then. W and B add to the sums over earlier microbatches, which they take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.slice import slice_graph
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import ScalarType
from dfc.planning.accumulate import accumulate
from dfc.planning.actions import FULL
from dfc.planning.rematerialize import fewest_kept, typical_sizes


class Differentiated(Protocol):
    """What is needed of a joint graph: its gradients, and its values by their roles."""

    @property
    def graph(self) -> Graph: ...
    @property
    def inputs(self) -> tuple[Value, ...]: ...
    @property
    def weights(self) -> Mapping[str, Value]: ...
    @property
    def state(self) -> Mapping[str, Value]: ...
    @property
    def outputs(self) -> tuple[Value, ...]: ...
    @property
    def input_gradients(self) -> tuple[Value | None, ...]: ...
    @property
    def weight_gradients(self) -> Mapping[str, Value]: ...


@dataclass(frozen=True)
class Part:
    """A part of the joint graph: its inputs and outputs stand for those values of the whole."""

    graph: Graph
    takes: tuple[Value, ...]
    gives: tuple[Value, ...]


@dataclass(frozen=True)
class Cut:
    """The parts of one stage, by the letters of the schedules' actions, and the gradients.

    `sums` are the weights' gradients over earlier microbatches, which W and B take;
    `weight_gradients` are those with this one's. All values are those of the joint graph.
    """

    forward: Part
    inputs: Part
    weights: Part
    both: Part
    input_gradients: tuple[Value | None, ...]
    sums: Mapping[str, Value]
    weight_gradients: Mapping[str, Value]

    @cached_property
    def saved(self) -> frozenset[Value]:
        """What is kept from F on."""
        every = frozenset((*self.inputs.takes, *self.weights.takes, *self.both.takes))
        return every - frozenset(self.sums.values())

    @cached_property
    def kept_for_weights(self) -> frozenset[Value]:
        """What is kept from I on."""
        return frozenset(self.weights.takes) - frozenset(self.sums.values())


def cut(joint: Differentiated) -> Cut:
    """Cut a joint graph, which then gives sums of gradients.

    Raises:  DfcError N070 for a backward pass that reads a number.
    Ensures: F reads no tangent; each backward node is in I or in W, and B does what both do, with
             operators that make several gradients left whole.
    """
    graph = joint.graph
    sums, by_weight = accumulate(graph, joint.weight_gradients)
    forward = _needed(joint.graph, joint.outputs, ())
    every = [*(v for v in joint.input_gradients if v), *by_weight.values()]
    results = [*joint.outputs, *every]
    graph.set_outputs(results, Seq("tuple", (LEAF,) * len(results)))
    both = _part(graph, _needed(graph, every, forward), "B")
    moved = split_masked(graph)
    by_input = tuple(v and moved.get(v, v) for v in joint.input_gradients)
    inputs = _needed(graph, (v for v in by_input if v), forward)
    weights = _needed(graph, by_weight.values(), forward | inputs)
    return Cut(
        _part(graph, forward, "F"), _part(graph, inputs, "I"), _part(graph, weights, "W"),
        replace(both, gives=tuple(moved.get(v, v) for v in both.gives)), by_input, sums, by_weight,
    )  # fmt: skip


@dataclass(frozen=True)
class Replay:
    """Of a stage that recomputes: F, which gives what other stages read and what is kept, and R,
    which makes what the backward pass reads of it, and nothing that only other stages read."""

    forward: Part
    again: Part
    kept: frozenset[Value]


def replay(joint: Differentiated, found: Cut, taken: Collection[Value], way: str) -> Replay:
    """The parts with which a stage recomputes.

    Of its inputs it keeps those that are `taken` from other stages; the others are given again. By
    the way "selective" it keeps instead what makes R cheap, in the fewest bytes. Buffers that are
    written to are kept as they were.
    """
    forward = _needed(joint.graph, joint.outputs, ())
    held = frozenset((*taken, *joint.state.values()))
    if way == FULL:
        kept = held
    else:
        mine = {*joint.inputs, *held, *(r for n in forward for r in n.results)}
        free = {*joint.weights.values(), *joint.inputs} - held
        kept = fewest_kept(found.saved & mine, free, typical_sizes(joint.graph))
    made = _needed(joint.graph, found.saved, (), kept) & forward
    again = _part(joint.graph, made, "R", found.saved - kept)
    kept |= {v for v in again.takes if v in held}  # also those that only tell it a size
    return Replay(_part(joint.graph, forward, "F", kept.union(joint.outputs)), again, kept)


def _needed(
    graph: Graph, values: Iterable[Value], known: Iterable[Node], given: Collection[Value] = ()
) -> frozenset[Node]:
    """The nodes that make these values, without those that are known, and from what is given.

    A number that data tell is read by its symbol, and is no operand.
    """
    numbers = {
        b.symbol: n.results[0]
        for n in graph.nodes
        for b in n.binds
        if isinstance(n.results[0].type, ScalarType)
    }
    found, done = set(), set(known)
    todo = [v for v in values if v not in given]
    while todo:
        node = todo.pop().node
        if node is None or node in done:
            continue
        done.add(node)
        found.add(node)
        read = [*node.operands, *(numbers[s] for s in node.symbols if s in numbers)]
        todo += [v for v in read if v not in given]
    return frozenset(found)


def _part(
    graph: Graph, nodes: frozenset[Node], letter: str, wanted: frozenset[Value] | None = None
) -> Part:
    """These nodes, giving what others read, or what is wanted."""
    part, takes = slice_graph(graph, nodes)
    part.name = f"{graph.name.removesuffix('_joint')}_{letter}"
    inner = [r for n in part.nodes for r in n.results]
    outer = [r for n in graph.nodes if n in nodes for r in n.results]
    twin = dict(zip(outer, inner, strict=True))
    read = {r for r in outer if any(u not in nodes for u in r.users)}
    _check_numbers(part)
    gives = [r for r in outer if r in (read if wanted is None else wanted)]
    part.set_outputs([twin[r] for r in gives], Seq("tuple", (LEAF,) * len(gives)))
    return Part(part, tuple(takes), tuple(gives))


def _check_numbers(part: Graph) -> None:
    """Refuse a part that reads a number which another part took from data: tensors alone are kept.

    Raises:  DfcError N070.
    """
    known = {s for v in part.inputs for s in v.type.symbols}
    known |= {b.symbol for n in part.walk() for b in n.binds}
    for node in part.nodes:
        for name in sorted(node.symbols - known):
            raise DfcError(
                "N070", f"the backward pass of `{node.op}` ({node.loc or 'unknown place'}) reads "
                f"`{name}`, a number that data tell: it is given tensors alone",
                help="let the model read the tensor itself, without `.item()`",
            )  # fmt: skip


def split_masked(graph: Graph) -> dict[Value, Value]:
    """A backward operator that makes several gradients at once becomes one operator for each group.

    `convolution_backward` and the norms take a mask of what is wanted. The gradient of the input
    and those of the weights are wanted at different times. Returns what stands for what.
    """
    moved: dict[Value, Value] = {}
    for node in list(graph.nodes):
        mask = node.attributes.get("output_mask")
        if mask is None or len(mask) < 2 or not mask[0] or not any(mask[1:]):
            continue
        types = [r.type for r in node.results]
        for wanted in ((True, *[False] * (len(mask) - 1)), (False, *mask[1:])):
            made = graph.add(
                node.op, node.inputs, {**node.attributes, "output_mask": wanted}, types=types,
                names=[r.name for r in node.results], before=node, loc=node.loc,
            )  # fmt: skip
            for old, new, ours in zip(node.results, made.results, wanted, strict=True):
                if ours:
                    moved[old] = new
                    graph.replace_uses(old, new)
        graph.erase(node)
    return moved
