"""Which part of a graph runs in 8-bit integers: layers with constant weights and what joins them.

Every value inside gets one quantize and dequantize pair, which all of its readers share. An
activation behind a layer becomes the end of its range. A layer's result is rounded behind the
activation, where ONNX Runtime needs it to run the layer in integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dfc.compress.ranges import UNIT, Range
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType

# Their result has the range of what they read: one scale for both.
SHARING = frozenset(
    {
        "aten.max_pool2d.default", "aten.view.default", "aten.reshape.default",
        "aten.flatten.using_ints", "aten.permute.default", "aten.transpose.int",
        "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.slice.Tensor",
        "aten.cat.default", "aten.upsample_nearest2d.vec", "aten.clone.default",
    }
)  # fmt: skip
# Their result is rounded anew.
ROUNDED = frozenset(
    {
        "aten.add.Tensor", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
        "aten.mean.dim",
    }
)  # fmt: skip
_PADS = frozenset({"aten.pad.default", "aten.constant_pad_nd.default"})
_UNIT = frozenset(
    {"aten.softmax.int", "aten._softmax.default", "aten.sigmoid.default"}
)  # always between 0 and 1


@dataclass(eq=False)
class Point:
    """A value that is rounded.

    `made` is what the layer gives, `value` what is read: behind the activation, if one is folded.
    """

    value: Value
    made: Value
    group: Point | None = None  # whose scale it shares
    fixed: Range | None = None  # what is known of its range beforehand

    @property
    def leader(self) -> Point:
        return self if self.group is None else self.group.leader

    def unite(self, other: Point) -> None:
        mine, theirs = self.leader, other.leader
        if mine is not theirs:
            theirs.group = mine


@dataclass
class Region:
    """Layers and the values that are rounded, in the order in which they are made."""

    layers: list[Node]
    points: dict[Value, Point] = field(default_factory=dict)  # by `value`
    members: set[Node] = field(default_factory=set)  # nodes that read rounded values

    def leaders(self) -> list[Point]:
        return list(dict.fromkeys(p.leader for p in self.points.values()))


def source_of(x: Value) -> Value:
    """The value behind paddings with zeros that nobody else reads: 0 is a code of every range."""
    while x.node is not None and _is_zero_pad(x.node) and x.use_count == 1:
        inside = x.node.inputs[0]
        assert isinstance(inside, Value)
        x = inside
    return x


def _is_zero_pad(node: Node) -> bool:
    a = node.attributes
    constant = node.op == "aten.constant_pad_nd.default" or a.get("mode") == "constant"
    return node.op in _PADS and constant and not a.get("value")


def find_region(graph: Graph, layers: Iterable[Node]) -> Region:
    """The region around some layers: what joins them in integers belongs to it."""
    region = Region(list(layers))
    entries = {source_of(input_of(n)) for n in region.layers}
    inside = _candidates(graph, region.layers, entries)
    region.members = _needed(graph, region.layers, inside)
    for value in _in_order(graph, entries):
        _add_points(region, value)
    return region


def input_of(layer: Node) -> Value:
    x = layer.inputs[0]
    assert isinstance(x, Value)
    return x


def _candidates(graph: Graph, layers: list[Node], entries: set[Value]) -> set[Node]:
    """Layers, and nodes all of whose operands are rounded."""
    known = set(entries)
    found = set(layers)
    for node in graph.nodes:
        if node not in found:
            operands = [source_of(v) for v in node.operands]
            joins = _joins(node) and all(v in known for v in operands)
            if not joins:
                continue
            found.add(node)
        known.update(settled(r) for r in node.results[:1])
    return found


def _joins(node: Node) -> bool:
    """Whether a node can run on codes."""
    operands = tuple(node.operands)
    if node.op not in SHARING | ROUNDED or any(isinstance(v, Parameter) for v in operands):
        return False
    result = node.results[0].type
    if not isinstance(result, TensorType) or not result.dtype.is_float or not operands:
        return False
    a = node.attributes
    if node.op == "aten.add.Tensor":
        return len(operands) == 2 and a.get("alpha", 1) == 1
    if node.op == "aten.avg_pool2d.default":
        return bool(a.get("count_include_pad", True)) and a.get("divisor_override") is None
    if node.op == "aten.adaptive_avg_pool2d.default":
        return all(s == 1 for s in _each(a["output_size"]))
    if node.op == "aten.mean.dim":  # over pictures: what is a global average pool
        source = operands[0].tensor_type
        return source.rank == 4 and sorted(d % 4 for d in _each(a["dim"])) == [2, 3]
    return True


def _each(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _needed(graph: Graph, layers: list[Node], inside: set[Node]) -> set[Node]:
    """Of the candidates those that something inside reads: at its end, a region stays in floats."""
    needed = set(layers)
    for node in graph.reversed_nodes:
        if node in inside and node not in needed and _feeds(node.results[0], needed):
            needed.add(node)
    return needed


def _feeds(made: Value, needed: set[Node]) -> bool:
    return any(
        user in needed
        or (_is_zero_pad(user) and user.results[0].use_count == 1
            and _feeds(user.results[0], needed))
        for user in settled(made).users
    )  # fmt: skip


def _in_order(graph: Graph, entries: set[Value]) -> Iterator[Value]:
    """Inputs that are rounded, then what every node makes, all parts of what is cut among it."""
    yield from (v for v in graph.inputs if v in entries)
    for node in graph.nodes:
        yield from node.results


def _add_points(region: Region, made: Value) -> None:
    """Round what a member makes or reads."""
    node = made.node
    value = settled(made) if node in region.members else made
    if value in region.points or not _is_rounded(region, node, value):
        return
    point = Point(value, made, fixed=_fixed(node))
    region.points[value] = point
    if node is not None and node in region.members and node.op in SHARING and value is made:
        for v in node.operands:
            region.points[source_of(v)].unite(point)


def _is_rounded(region: Region, node: Node | None, value: Value) -> bool:
    if node is not None and reads_rounded(region, node) and node not in region.members:
        return False  # a padding: what it reads is rounded
    read = any(reads_rounded(region, u) for u in value.users)
    if node is None or node not in region.members:
        return read
    return read or node.op.startswith("aten.conv")  # float convolutions are all that it would be


def reads_rounded(region: Region, node: Node) -> bool:
    """Whether a node is a member, or a padding that only members read."""
    if node in region.members:
        return True
    return (
        _is_zero_pad(node)
        and node.results[0].use_count == 1
        and reads_rounded(region, node.results[0].users[0])
    )


def _fixed(node: Node | None) -> Range | None:
    return UNIT if node is not None and node.op in _UNIT else None


def settled(made: Value) -> Value:
    """The value behind an activation that the end of a range stands for; else the value itself."""
    users = made.users
    if len(users) == 1 and made.use_count == 1 and _is_clip(users[0]):
        return users[0].results[0]
    return made


def _is_clip(node: Node) -> bool:
    """Whether an activation does nothing but clip at 0 and perhaps at a higher number.

    Both ends of a range are hit exactly where one of them is 0: a zero point is a whole number.
    """
    a = node.attributes
    if node.op in ("aten.relu.default", "aten.relu6.default"):
        return True
    if node.op == "aten.hardtanh.default":
        return bool(a["min_val"] == 0 and a["max_val"] > 0)
    high = a.get("max")
    return node.op == "aten.clamp.default" and a.get("min") == 0 and (high is None or high > 0)
