"""int8 layers with ranges of activations from calibration data, as quantize and dequantize pairs.

The graph stays in float ops between pairs, which is what ONNX calls QDQ: ONNX Runtime makes one
integer kernel of each layer with the pairs around it. Weights and biases are stored as codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dfc.compress.bias import (
    LARGEST_BIAS,
    MEANS,
    bias_codes,
    channel_means,
    correct,
    first_samples,
)
from dfc.compress.calibrate import Batches, batches_of, observe
from dfc.compress.integers import Codes, encoded, is_depthwise, scales_of, weight_bits
from dfc.compress.processor import processor_of
from dfc.compress.ranges import RANGES, Histogram, Range
from dfc.compress.region import Point, Region, find_region, input_of, reads_rounded, source_of
from dfc.compress.weighted import LINEAR
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ops.builder import Builder

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.rewrite.pass_ import Context


class Options(Protocol):
    """What a step says of static quantization: fields of the pass `quantize`."""

    @property
    def data(self) -> str | None: ...
    @property
    def range(self) -> str: ...
    @property
    def per(self) -> str: ...  # one weight scale for each `channel`, or for the `tensor`
    @property
    def codes(self) -> str: ...  # of weights: auto, full, pairs, seven
    @property
    def correct(self) -> bool: ...


def apply(graph: Graph, layers: Sequence[Node], options: Options, ctx: Context) -> int:
    """Quantize layers and what lies between them; how many layers there were.

    Needs:   convolutions and linear layers with constant weights; batch norms folded.
    Raises:  what reading the data raises; DfcError D090 for values that are no numbers.
    """
    wanted = set(layers)
    if not wanted:
        return 0
    assert options.data is not None
    region = find_region(graph, [n for n in graph.nodes if n in wanted])
    batches = batches_of(ctx, options.data, graph)
    ranges = _ranges(graph, region, _calibrated(graph, region, batches, ctx), options)
    few = first_samples(batches)
    means = channel_means(graph, region.layers, few)
    _tell_constant(ranges, options.data, ctx)
    scales = _round_values(graph, region, ranges)
    made = _store_weights(graph, region.layers, scales, options, ctx)
    for node in region.layers:
        _store_bias(graph, node, scales[node], made[node].scale)
    ctx.products[MEANS] = {n.results[0].name: m for n, m in means.items()}
    if options.correct:
        correct(graph, means, few)
    _forget(graph)
    return len(region.layers)


# Ranges


def _told(value: Value) -> str:
    """A value as errors name it: with the module that makes it."""
    node = value.node
    return f"%{value.name} of `{node.loc.module}`" if node and node.loc else f"%{value.name}"


def _calibrated(
    graph: Graph, region: Region, batches: Batches, ctx: Context
) -> dict[Point, Histogram]:
    """One reading of the data: values that share a scale share a histogram."""
    histograms = {p: Histogram(_told(p.value)) for p in region.leaders()}
    observers = {p.value: histograms[p.leader] for p in region.points.values()}
    observe(graph, batches, observers, ctx, "static")
    return histograms


def _ranges(
    graph: Graph, region: Region, seen: Mapping[Point, Histogram], options: Options
) -> dict[Point, Range]:
    """The range of each scale.

    `auto` is the least square error for what convolutions read, and all that was seen for what
    linear layers alone do: the few channels of tokens that stand out are what a transformer says
    most with (MiniLM: cosine 0.993 to float32, 0.968 where they are clipped).
    """
    images = _images(graph, region)
    convolved = {p.leader for p in region.points.values() if {p.value, p.made} & images}
    shared = Counter(p.leader for p in region.points.values())
    found = {}
    for p, histogram in seen.items():
        name = options.range
        if name == "auto":
            name = "mse" if p in convolved else "minmax"
        known = p.fixed if shared[p] == 1 else None
        found[p] = known if known is not None else RANGES[name](histogram)
    return found


def _images(graph: Graph, region: Region) -> set[Value]:
    """What convolutions read and make, and what pools, sums and the like make of that."""
    found: set[Value] = set()
    for node in graph.nodes:
        if node in region.layers:
            if node.op != LINEAR:
                found.update((source_of(input_of(node)), *node.results))
        elif any(source_of(v) in found for v in node.operands) and reads_rounded(region, node):
            found.update(node.results)
    return found


def _tell_constant(ranges: Mapping[Point, Range], data: str, ctx: Context) -> None:
    """Say which values the data left at 0: what other inputs make of them is clipped to it."""
    constant = [f"%{p.value.name}" for p, r in ranges.items() if r.low == r.high]
    if constant:
        more = f" and {len(constant) - 1} more" if len(constant) > 1 else ""
        ctx.note(
            f"quantize: {constant[0]}{more} never differed from 0 in data `{data}`, so that the "
            "scale is a guess: calibrate with inputs that the model will see"
        )


# The graph


def _round_values(graph: Graph, region: Region, ranges: Mapping[Point, Range]) -> dict[Node, float]:
    """Put the pairs in; the scale of what each layer reads."""
    inputs = {n: region.points[source_of(_first(n))] for n in region.layers}
    clips = {p.value.node for p in region.points.values() if p.value is not p.made}
    following: dict[Node | None, Node | None] = {}  # of what stays, where the pairs are put
    after = None
    for node in graph.reversed_nodes:
        following[node] = after
        after = after if node in clips else node
    following[None] = after  # inputs
    constants: dict[tuple[Point, Range], tuple[float, Parameter, Parameter]] = {}
    scales: dict[Point, float] = {}
    for point in region.points.values():
        range = _clipped(point, ranges[point.leader])
        key = point.leader, range
        if key not in constants:
            constants[key] = _scale_of(graph, point, range)
        scales[point], scale, zero = constants[key]
        _round_one(graph, region, point, scale, zero, following[point.made.node])
    return {n: scales[p] for n, p in inputs.items()}


def _clipped(point: Point, range: Range) -> Range:
    """The range of a value, which ends where its activation clips even if others that share its
    scale go on: a concat of a ReLU's result and of numbers below 0.
    """
    if point.value is point.made:
        return range
    clip = point.value.node
    assert clip is not None
    a = clip.attributes
    high = 6.0 if clip.op == "aten.relu6.default" else a.get("max_val", a.get("max"))
    return range.within(0.0, range.high if high is None else float(high))


def _first(layer: Node) -> Value:
    x = layer.inputs[0]
    assert isinstance(x, Value)
    return x


def _scale_of(graph: Graph, point: Point, range: Range) -> tuple[float, Parameter, Parameter]:
    import torch

    scale, zero = range.affine()
    name = point.value.name
    return (
        scale,
        graph.add_constant(f"{name}.scale", torch.tensor(scale)),
        graph.add_constant(f"{name}.zero", torch.tensor(zero, dtype=torch.uint8)),
    )


def _round_one(
    graph: Graph, region: Region, point: Point, scale: Parameter, zero: Parameter,
    before: Node | None,
) -> None:  # fmt: skip
    b = Builder(graph, before)
    codes = b("dfc.quantize", point.made, scale, zero, dtype="u8")
    rounded = b("dfc.dequantize", codes, scale, zero)
    made = point.made.node
    if point.value is not point.made:  # the range ends where the activation clips
        clip = point.value.node
        assert clip is not None
        graph.replace(clip, [rounded])
    elif made is not None and made in region.members:
        graph.replace_uses(point.made, rounded, lambda user: user is not codes.node)
    else:
        graph.replace_uses(point.made, rounded, lambda user: reads_rounded(region, user))


def _store_weights(
    graph: Graph, layers: Sequence[Node], scales: Mapping[Node, float], options: Options,
    ctx: Context,
) -> dict[Node, Codes]:  # fmt: skip
    """Codes in the place of weights; a weight that several layers share is stored once."""
    made: dict[Node, Codes] = {}
    stored: dict[Parameter, tuple[Codes, Parameter, Parameter]] = {}
    for node in layers:
        weight = node.inputs[1]
        assert isinstance(weight, Parameter) and weight.data is not None
        bits, why = weight_bits(options.codes, is_depthwise(node), processor_of(ctx.target))
        if weight not in stored:
            w = weight.data.tensor()
            scale = _weight_scale(node, w, scales[node], bits, options.per == "channel")
            codes = encoded(w, scale)
            stored[weight] = (
                codes,
                graph.add_constant(f"{weight.name}.codes", codes.codes),
                graph.add_constant(f"{weight.name}.scale", codes.scale),
            )
        made[node], codes_of, scale_of = stored[weight]
        axis = {"axis": 0} if scale_of.tensor_type.rank else {}
        read = Builder(graph, node)("dfc.dequantize", codes_of, scale_of, **axis)
        graph.set_inputs_of(node, [node.inputs[0], read, *node.inputs[2:]])
        ctx.decided(node, "quantized", f"static int8, weights `{bits}`: {why}")
    return made


def _weight_scale(node: Node, w: Tensor, scale: float, bits: str, per_channel: bool) -> Tensor:
    """Fine enough for the weight, coarse enough for the bias, whose scale it decides."""
    import torch

    found = scales_of(w, bits, per_channel)
    bias = node.inputs[2]
    if isinstance(bias, Parameter) and bias.data is not None:
        least = bias.data.tensor().float().abs() / (scale * LARGEST_BIAS / 2)
        found = torch.maximum(found, least if per_channel else least.amax())
    return found


def _store_bias(graph: Graph, node: Node, scale: float, weight_scale: Tensor) -> None:
    """int32 codes in the place of the bias, at the scale of the products that it is added to.

    A bias that is computed, or that runtimes add behind a product of three and more dimensions,
    stays in floats.
    """
    import torch

    bias = node.inputs[2]
    if bias is not None and not isinstance(bias, Parameter):
        return
    if node.op == LINEAR and node.inputs[0].tensor_type.rank != 2:  # type: ignore[union-attr]
        return
    product = (weight_scale * torch.tensor(scale)).double()
    whole = torch.zeros(int(node.inputs[1].tensor_type.shape[0]))  # type: ignore[union-attr, arg-type]
    name = f"{node.results[0].name}.bias"
    if bias is not None:
        assert bias.data is not None
        whole, name = bias.data.tensor(), bias.name
    stored = graph.add_constant(f"{name}.codes", bias_codes(whole, product))
    step = graph.add_constant(f"{name}.scale", product.float())
    axis = {"axis": 0} if step.tensor_type.rank else {}
    read = Builder(graph, node)("dfc.dequantize", stored, step, **axis)
    graph.set_inputs_of(node, [*node.inputs[:2], read, *node.inputs[3:]])


def _forget(graph: Graph) -> None:
    """Drop what nothing reads any more: it must not be saved."""
    for p in list(graph.parameters.values()):
        if not p.use_count and p.kind != "buffer":
            graph.drop_parameter(p.name)
