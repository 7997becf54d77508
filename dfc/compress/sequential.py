"""Layer by layer: each linear layer is compressed on what the compressed layers before it give.

Every batch is run through the graph once. It stops where the input of some layers is known, waits
until those are compressed, and goes on with their new weights. While it waits, it holds the values
that are still needed there: for a transformer the hidden states of its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dfc.compress.calibrate import is_by_token, padding_mask
from dfc.compress.hessian import Hessian
from dfc.compress.weighted import EXPERTS, weight_read
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import stepwise
from dfc.ir.weights import tensor_sha256
from dfc.rewrite.code_digest import code_of
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

State = tuple[dict[str, str], dict[str, "Tensor"]]  # words and tensors by name
LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class Group:
    """Linear layers that read one value: what they see in calibration is the same.

    Or one expert of them: its rows are those of `x` from the end of the expert before to its own,
    and besides, as many as it has inputs of the mean of all experts' rows.
    Why:  with fewer rows than four times its inputs, what an expert saw says too little: GPTQ on it
          alone is up to twice as far off as the nearest values, with the others' never by a tenth.
    """

    x: Value
    layers: tuple[Node, ...]
    ends: Value | None = None
    expert: int = 0

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.x,) if self.ends is None else (self.x, self.ends)

    @property
    def weights(self) -> dict[str, Parameter]:
        """Their weights by name, of all experts; layers may share one."""
        return {w.name: w for w in map(weight_read, self.layers)}

    @property
    def is_last(self) -> bool:
        """Whether the weights are complete with this one."""
        first = next(iter(self.weights.values()))
        return self.ends is None or self.expert == first.tensor_type.shape[0] - 1

    def matrix(self, weight: Parameter) -> Tensor:
        """One of the weights, of this expert, as [outputs, inputs]."""
        assert weight.data is not None
        w = weight.data.tensor()
        if self.ends is None:
            return w
        return w[self.expert].T if lies_turned(weight, self.layers) else w[self.expert]

    def rows(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """What the layers see of the values that they read."""
        if ends is None:
            return x
        start = int(ends[self.expert - 1]) if self.expert else 0
        return x[start : int(ends[self.expert])]

    def rows_of_all(self, x: Tensor, ends: Tensor) -> Tensor:
        """What all experts see."""
        return x[: int(ends[-1])]

    @property
    def inputs(self) -> int:
        """How many numbers the layers read of each token."""
        weight = next(iter(self.weights.values()))
        at = 1 if self.ends is None or lies_turned(weight, self.layers) else 2
        size = weight.tensor_type.shape[at]
        assert isinstance(size, int), "a parameter's shape has no symbols"
        return size


def lies_turned(weight: Parameter, layers: Sequence[Node]) -> bool:
    """Whether experts' weights lie with their inputs first, [experts, inputs, outputs]."""
    return any(n.inputs[1] is weight for n in layers)


def weight_of(layer: Node) -> Parameter | None:
    """The constant weight of a linear layer, [outputs, inputs]."""
    if layer.op != LINEAR or not isinstance(layer.inputs[1], Parameter):
        return None
    return layer.inputs[1]


def described(layer: Node) -> str:
    """A layer as an error names it: its result and its module path."""
    module = f" of `{layer.loc.module}`" if layer.loc and layer.loc.module else ""
    return f"layer %{layer.result.name}{module}"


def groups_of(graph: Graph, layers: Iterable[Node]) -> list[Group]:
    """The layers by what they read, in the order in which that is computed; each expert by itself.

    A weight that several layers share belongs to the first of them.
    Needs:  layers of the graph itself, not of one nested in it.
    """
    place = {n: i for i, n in enumerate(graph.nodes)}
    found: dict[tuple[Value, Value | None], list[Node]] = {}
    seen: set[Parameter] = set()
    for layer in sorted(layers, key=place.__getitem__):
        of_experts = layer.op in EXPERTS
        weight = weight_read(layer) if of_experts else weight_of(layer)
        if weight is None or weight in seen:
            continue
        x, ends = layer.inputs[0], layer.inputs[2] if of_experts else None
        assert isinstance(x, Value) and (ends is None or isinstance(ends, Value))
        seen.add(weight)
        found.setdefault((x, ends), []).append(layer)
    inputs = list(graph.inputs)

    def order(group: Group) -> int:
        """When all that it reads is known."""
        return max(
            place[v.node] if v.node is not None else inputs.index(v) - len(inputs)
            for v in group.reads
        )

    groups = []
    for (x, ends), some in found.items():
        experts = 1 if ends is None else weight_read(some[0]).tensor_type.shape[0]
        assert isinstance(experts, int)
        groups += [Group(x, tuple(some), ends, e) for e in range(experts)]
    return sorted(groups, key=order)


class Prefix:
    """Batches on their way through a graph whose weights change behind them.

    `weights` stand for the graph's own from the moment when they are put there.
    Memory:  for each batch, the values that are needed where it waits.
    """

    def __init__(self, graph: Graph, batches: Iterable[Sequence[Any]]) -> None:
        self.weights: dict[str, Tensor] = {}
        self._runs = []
        digest = hashlib.sha256()
        for batch in batches:
            self._runs.append(_Run(graph, batch, self.weights))
            digest.update("".join(map(_digest, batch)).encode())
        self.digest = digest.hexdigest()  # of the data

    @property
    def batches(self) -> int:
        return len(self._runs)

    def reach(self, x: Value) -> Iterator[Tensor]:
        """The value in each batch; values are asked for in the order of their computation."""
        return (run.reach(x) for run in self._runs)

    def seen(self, group: Group, of_all: bool = False) -> Iterator[Tensor]:
        """What a group's layers read in each batch, or what all experts do."""
        rows = group.rows_of_all if of_all else group.rows
        return (rows(*map(run.reach, group.reads)) for run in self._runs)


def _digest(x: Any) -> str:
    import torch

    return tensor_sha256(x) if isinstance(x, torch.Tensor) else repr(x)


class _Run:
    """One batch, at the place that was reached."""

    def __init__(self, graph: Graph, batch: Sequence[Any], weights: Mapping[str, Tensor]) -> None:
        self._mask = padding_mask(graph)
        self._tokens: Tensor | None = None  # which are no padding
        if self._mask is not None:
            self._tokens = batch[graph.inputs.index(self._mask)] != 0
        self._steps = stepwise(graph, batch, weights)
        self._values: Mapping[Value, Any] = next(self._steps)[1]

    def reach(self, x: Value) -> Tensor:
        """The value; of tokens that are padding, nothing."""
        import torch

        while x not in self._values:
            with torch.no_grad():
                _, self._values = next(self._steps)
        found: Tensor = self._values[x]
        if self._tokens is not None and is_by_token(x, self._mask):
            found = found[self._tokens]
        return found


class Method(Protocol):
    """Finds the weights of one group after the other, and keeps what it found."""

    key: str  # all that decides the result, beside the graph and the data

    def solve(self, group: Group, hessian: Hessian) -> None:
        """Find the weights of a group."""

    def weights(self, group: Group) -> Mapping[str, Tensor]:
        """The weights by name that take the place of the group's."""

    def state(self, group: Group) -> State:
        """What was found for a group, to go on from after a kill."""

    def load(self, group: Group, state: State) -> None:
        """Take what was found before for what `solve` would find."""


def layer_by_layer(
    graph: Graph,
    groups: Sequence[Group],
    batches: Iterable[Sequence[Any]],
    ctx: Context,
    method: Method,
) -> None:
    """Let a method solve each group in turn; its weights take effect for those that follow.

    With a journal, what was solved before a kill is not solved again.
    Needs:   groups as `groups_of` gives them.
    Raises:  DfcError D090..D092 of a group, with its layers' names.
    Cost:    one run of the batches; one Hessian at a time, of experts that of all too.
    """
    prefix = Prefix(graph, batches)
    done = _Done(ctx.journal, graph, prefix, method) if ctx.journal else None
    total = len(groups) * prefix.batches
    common: tuple[tuple[Value, ...], Hessian] | None = None  # what is read, by all experts
    for number, group in enumerate(groups):
        if done is None or not done.load(number, group):
            hessian = Hessian(group.inputs)
            try:
                for seen, x in enumerate(prefix.seen(group), 1):
                    hessian.update(x)
                    ctx.progress(number * prefix.batches + seen, total)
                if group.ends is not None:
                    if common is None or common[0] != group.reads:
                        common = group.reads, _of_all(group, prefix)
                    hessian.lean_on(common[1])
                method.solve(group, hessian)
            except DfcError as e:
                raise _named(e, group) from None
            if done is not None:
                done.save(number, group)
        prefix.weights.update(method.weights(group))


def _of_all(group: Group, prefix: Prefix) -> Hessian:
    """The Hessian of all experts' rows."""
    found = Hessian(group.inputs)
    for x in prefix.seen(group, of_all=True):
        found.update(x)
    return found


class _Done:
    """The groups that were solved, in the journal: an entry for each."""

    def __init__(self, journal: Journal, graph: Graph, prefix: Prefix, method: Method) -> None:
        self.journal, self.method = journal, method
        words = [graph.fingerprint(), prefix.digest, type(method).__name__, method.key]
        self.words = [*words, *code_of(graph)]

    def _key(self, number: int, group: Group) -> str:
        names = sorted(group.weights)
        return hashlib.sha256("\n".join([*self.words, str(number), *names]).encode()).hexdigest()

    def load(self, number: int, group: Group) -> bool:
        found = self.journal.read(self._key(number, group))
        if found is not None:
            self.method.load(group, found)
        return found is not None

    def save(self, number: int, group: Group) -> None:
        self.journal.write(self._key(number, group), *self.method.state(group))


def _named(error: DfcError, group: Group) -> DfcError:
    """An error of a group's Hessian, with the layers that it belongs to; others as they are."""
    if not error.code.startswith("D09"):
        return error
    first, *others = map(described, group.layers)
    more = f" (and {', '.join(others)}, which read the same)" if others else ""
    one = error.diagnostics[0]
    return DfcError(one.code, f"{first}{more}: {one.message}", help=one.help, notes=one.notes)
