"""Layer by layer: each linear layer is compressed on what the compressed layers before it give.

Every batch is run through the graph once. It stops where the input of some layers is known, waits
until those are compressed, and goes on with their new weights. While it waits, it holds the values
that are still needed there: for a transformer the hidden states of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.calibrate import is_by_token, padding_mask
from dfc.compress.hessian import Hessian
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import stepwise
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class Group:
    """Linear layers that read one value: what they see in calibration is the same."""

    x: Value
    layers: tuple[Node, ...]

    @property
    def weights(self) -> dict[str, Parameter]:
        """Their weights by name; layers may share one."""
        return {w.name: w for w in map(weight_of, self.layers) if w is not None}

    @property
    def inputs(self) -> int:
        """How many numbers the layers read of each token."""
        size = next(iter(self.weights.values())).tensor_type.shape[1]
        assert isinstance(size, int), "a parameter's shape has no symbols"
        return size


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
    """The layers by what they read, in the order in which that is computed.

    A weight that several layers share belongs to the first of them.
    Needs:  layers of the graph itself, not of one nested in it.
    """
    place = {n: i for i, n in enumerate(graph.nodes)}
    found: dict[Value, list[Node]] = {}
    seen: set[Parameter] = set()
    for layer in sorted(layers, key=place.__getitem__):
        weight, x = weight_of(layer), layer.inputs[0]
        if weight is None or weight in seen:
            continue
        assert isinstance(x, Value)
        seen.add(weight)
        found.setdefault(x, []).append(layer)
    inputs = list(graph.inputs)

    def order(x: Value) -> int:
        return place[x.node] if x.node is not None else inputs.index(x) - len(inputs)

    return [Group(x, tuple(found[x])) for x in sorted(found, key=order)]


class Prefix:
    """Batches on their way through a graph whose weights change behind them.

    `weights` stand for the graph's own from the moment when they are put there.
    Memory:  for each batch, the values that are needed where it waits.
    """

    def __init__(self, graph: Graph, batches: Iterable[Sequence[Any]]) -> None:
        self.weights: dict[str, Tensor] = {}
        self._runs = [_Run(graph, batch, self.weights) for batch in batches]

    @property
    def batches(self) -> int:
        return len(self._runs)

    def reach(self, x: Value) -> Iterator[Tensor]:
        """The value in each batch; values are asked for in the order of their computation."""
        return (run.reach(x) for run in self._runs)


class _Run:
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


Compress = Callable[[Group, Hessian], Mapping[str, "Tensor"]]


def layer_by_layer(
    graph: Graph,
    groups: Sequence[Group],
    batches: Iterable[Sequence[Any]],
    ctx: Context,
    compress: Compress,
) -> None:
    """Call `compress` for each group in turn; the weights by name that it gives take effect.

    Needs:   groups as `groups_of` gives them.
    Raises:  DfcError D090, and D09x of what `compress` raises, with the layers' names.
    Cost:    one run of the batches; one Hessian at a time.
    """
    prefix = Prefix(graph, batches)
    total = len(groups) * prefix.batches
    for number, group in enumerate(groups):
        hessian = Hessian(group.inputs)
        try:
            for seen, x in enumerate(prefix.reach(group.x), 1):
                hessian.update(x)
                ctx.progress(number * prefix.batches + seen, total)
            prefix.weights.update(compress(group, hessian))
        except DfcError as e:
            raise _named(e, group) from None


def _named(error: DfcError, group: Group) -> DfcError:
    """An error of a group's Hessian, with the layers that it belongs to; others as they are."""
    if not error.code.startswith("D09"):
        return error
    first, *others = map(described, group.layers)
    more = f" (and {', '.join(others)}, which read the same)" if others else ""
    one = error.diagnostics[0]
    return DfcError(one.code, f"{first}{more}: {one.message}", help=one.help, notes=one.notes)
