"""What rounding moves a layer's results on average, and biases that move them back.

Layers are corrected in order, each behind those that were corrected before: so the shift that
rounded activations and clipped ranges bring is met as well as that of the layer's own weights.
Source:  data-free quantization (1906.04721) section 4.2, with measured means in place of assumed
         ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.compress.calibrate import is_by_token, padding_mask
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import bind_inputs, bind_results, stepper

if TYPE_CHECKING:
    from torch import Tensor

MEANS = "means of layers"  # the product in which `quantize` leaves what it saw, by value name
LARGEST_BIAS = 2**31 - 1
SAMPLES = 128  # of which means are taken, and which are in memory at once


class _Mean:
    """The mean of each channel, counted from the last dimension; padding is left out."""

    def __init__(self, axis: int) -> None:
        import torch

        self.axis = axis
        self.count = 0
        self.sum = torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor, padding: Tensor | None) -> None:
        rows = (x if padding is None else x[padding]).double().movedim(self.axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)


def channel_axis(layer: Node) -> int:
    """Which dimension of a layer's result counts its output channels, from the last."""
    return 1 - layer.inputs[1].tensor_type.rank  # type: ignore[union-attr]


def channel_means(
    graph: Graph, layers: Sequence[Node], batches: Sequence[Sequence[Any]]
) -> dict[Node, Tensor]:
    """The mean of each channel of the layers' results."""
    found: dict[Node, Tensor] = {}
    last = _last(graph, layers)
    if last is None:
        return found
    wanted, paddings = set(layers), _paddings(graph, batches)

    def look(node: Node, results: list[Any]) -> None:
        if node in wanted:
            found[node] = _observed(node, results, paddings(node))

    in_step(graph, batches, look, last)
    return found


def _last(graph: Graph, layers: Iterable[Node]) -> Node | None:
    wanted = set(layers)
    return next((n for n in reversed(list(graph.nodes)) if n in wanted), None)


def _paddings(
    graph: Graph, batches: Sequence[Sequence[Any]]
) -> Callable[[Node], list[Tensor | None]]:
    """Of each batch, where a layer's result is of tokens that count; None where all of it does."""
    mask = padding_mask(graph)
    none: list[Tensor | None] = [None] * len(batches)
    if mask is None:
        return lambda _: none
    at = graph.inputs.index(mask)
    given: list[Tensor | None] = [b[at] != 0 for b in batches]
    return lambda node: given if is_by_token(node.results[0], mask) else none


def _observed(node: Node, results: Sequence[Any], paddings: Sequence[Tensor | None]) -> Tensor:
    seen = _Mean(channel_axis(node))
    for x, padding in zip(results, paddings, strict=True):
        seen.update(x, padding)
    return seen.mean


def first_samples(batches: Iterable[Sequence[Any]], samples: int = SAMPLES) -> list[list[Any]]:
    """The first batches, until they hold so many samples; what is too much is cut off.

    An input without a dimension for samples is the same in every batch.
    """
    import torch

    found: list[list[Any]] = []
    left = samples
    for batch in batches:
        size = max((len(x) for x in batch if isinstance(x, torch.Tensor) and x.dim()), default=1)
        found.append(
            [x[:left] if isinstance(x, torch.Tensor) and x.dim() and len(x) == size else x
             for x in batch]
        )  # fmt: skip
        left -= size
        if left <= 0:
            break
    return found


def in_step(
    graph: Graph,
    batches: Sequence[Sequence[Any]],
    look: Callable[[Node, list[Any]], None],
    last: Node | None = None,
) -> None:
    """Run each node on all batches before the next; `look` may change what a result holds.

    Cost:  the values that are still needed, of all batches at once.
    """
    import torch

    step = stepper()
    values: list[dict[Value, Any]] = [dict(zip(graph.inputs, b, strict=True)) for b in batches]
    bindings = [bind_inputs(graph, b) for b in batches]
    remaining = {v: v.use_count for n in graph.nodes for v in n.operands}
    with torch.no_grad():
        for node in graph.nodes:
            found = [step(node, v, b) for v, b in zip(values, bindings, strict=True)]
            for results, b in zip(found, bindings, strict=True):
                bind_results(node, results, b)
            first = [results[0] for results in found] if node.results else []
            look(node, first)
            for held, results, x in zip(values, found, first, strict=False):
                held.update(zip(node.results, [x, *results[1:]], strict=True))
            for v in node.operands:
                remaining[v] -= 1
                if not remaining[v]:
                    for held in values:
                        held.pop(v, None)
            if node is last:
                return


def corrections(
    graph: Graph, layers: Mapping[Node, Tensor], batches: Sequence[Sequence[Any]]
) -> dict[Node, Tensor]:
    """What to add to each layer's bias, so that its channels' means are those given."""
    found: dict[Node, Tensor] = {}
    if not layers:
        return found
    paddings = _paddings(graph, batches)

    def look(node: Node, results: list[Any]) -> None:
        if node not in layers:
            return
        observed = _observed(node, results, paddings(node))
        shift = (layers[node].double() - observed).float()
        found[node] = shift
        sizes = [1] * results[0].dim()
        sizes[channel_axis(node)] = -1
        for i, x in enumerate(results):
            results[i] = x + shift.reshape(sizes)

    in_step(graph, batches, look, _last(graph, layers))
    return found


def correct(
    graph: Graph, means: Mapping[Node, Tensor], batches: Sequence[Sequence[Any]]
) -> dict[Node, Tensor]:
    """Change the layers' biases so that the channels of their results have these means; by how
    much. Layers whose bias is computed are left alone.
    """
    able = {n: m for n, m in means.items() if is_correctable(n)}
    found = corrections(graph, able, batches)
    for node, shift in found.items():
        _add_to_bias(graph, node, shift)
    return found


def is_correctable(layer: Node) -> bool:
    """Whether a layer's bias is absent or constant, as floats or as codes."""
    bias = layer.inputs[2]
    return bias is None or isinstance(bias, Parameter) or _codes_of(bias) is not None


def _codes_of(bias: object) -> tuple[Parameter, Parameter] | None:
    """The codes and the scale that a bias is made of."""
    if not isinstance(bias, Value) or bias.node is None or bias.node.op != "dfc.dequantize":
        return None
    codes, scale = bias.node.inputs[:2]
    both = isinstance(codes, Parameter) and isinstance(scale, Parameter)
    return (codes, scale) if both else None  # type: ignore[return-value]


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias as int32 at these scales."""
    import torch

    codes = torch.round(bias.double() / scale.double())
    return codes.clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)


def _add_to_bias(graph: Graph, layer: Node, shift: Tensor) -> None:
    bias = layer.inputs[2]
    stored = _codes_of(bias)
    if stored is not None:
        codes, scale = (_numbers(p) for p in stored)
        whole = codes.double() * scale.double() + shift.double()
        made = graph.add_constant(stored[0].name, bias_codes(whole, scale))
        assert isinstance(bias, Value) and bias.node is not None
        graph.set_inputs_of(bias.node, [made, *bias.node.inputs[1:]])
        _drop(graph, stored[0])
        return
    dtype = layer.results[0].tensor_type.dtype.to_torch()
    old = None if bias is None else _numbers(bias)
    whole = shift.double() if old is None else old.double() + shift.double()
    name = f"{layer.results[0].name}.bias" if bias is None else bias.name  # type: ignore[union-attr]
    made = graph.add_constant(f"{name}.corrected", whole.to(dtype))
    graph.set_inputs_of(layer, [*layer.inputs[:2], made, *layer.inputs[3:]])
    if isinstance(bias, Parameter):
        _drop(graph, bias)


def _numbers(p: object) -> Tensor:
    assert isinstance(p, Parameter) and p.data is not None
    return p.data.tensor()


def _drop(graph: Graph, p: Parameter) -> None:
    if not p.use_count:
        graph.drop_parameter(p.name)
