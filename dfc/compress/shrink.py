"""Take units out of a graph: weights are sliced, sizes in attributes and types rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dfc.compress.axes import Axis, kept_mask, leaves, new_size
from dfc.compress.dimensions import Analysis, Edit, Sizes
from dfc.compress.groups import Group, Groups
from dfc.ir.expr import Size
from dfc.ir.graph import Graph, Parameter
from dfc.ir.types import TensorType
from dfc.ir.weights import TensorData

if TYPE_CHECKING:
    import torch

Kept = Mapping[Group, "list[bool]"]  # for each group that shrinks: which units stay


def shrink(groups: Groups, kept: Kept) -> list[Parameter]:
    """Keep only the chosen units of each group; the parameters that were sliced.

    Needs:    groups of the graph as it is now; none of those in `kept` is frozen.
    Ensures:  a graph with smaller types, as predicted from the axes; weights keep their names.
    """
    analysis = groups.analysis
    masks = {g.axis: mask for g, mask in kept.items() if not all(mask)}

    def count(axis: Axis) -> Size:
        return sum(masks[axis]) if axis in masks else axis.size

    def stays(axis: Axis) -> list[bool]:
        assert isinstance(axis.size, int)
        return masks.get(axis) or [True] * axis.size

    def shrinks(axis: Axis) -> bool:
        return any(x in masks for x in leaves(axis))

    sliced = []
    for p in analysis.graph.parameters.values():
        dims = [d for d, axis in enumerate(analysis.dims[p]) if shrinks(axis)]
        if dims:
            _slice(analysis.graph, p, {d: kept_mask(analysis.dims[p][d], stays) for d in dims})
            sliced.append(p)
    for edit in analysis.edits:
        if any(map(shrinks, edit.axes)):
            _rewrite(analysis, edit, lambda axis: new_size(axis, count))
    _retype(analysis, count)
    return sliced


def _slice(graph: Graph, p: Parameter, masks: Mapping[int, list[bool]]) -> None:
    import torch

    if p.data is None:
        shape = list(p.tensor_type.shape)
        for dim, mask in masks.items():
            shape[dim] = sum(mask)
        graph.set_type(p, p.tensor_type.with_shape(shape))
        return
    tensor = p.data.tensor()
    for dim, mask in masks.items():
        tensor = tensor.index_select(dim, torch.tensor(mask).nonzero().flatten())
    replace_data(graph, p, tensor.contiguous())


def replace_data(graph: Graph, p: Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter other numbers, and their type."""
    p.data = TensorData(p.name, tensor)
    graph.set_type(p, TensorType.of(tensor))


def _rewrite(analysis: Analysis, edit: Edit, size: Sizes) -> None:
    changed = edit.attributes(size)
    node, graph = edit.node, analysis.graph
    if not edit.op or edit.op == node.op:
        graph.set_attributes(node, **changed)
        return
    made = graph.add(
        edit.op, node.inputs, changed, types=[r.type for r in node.results],
        names=[f"{r.name}_" for r in node.results], before=node, stage=node.stage, loc=node.loc,
    )  # fmt: skip
    for old, new in zip(node.results, made.results, strict=True):
        analysis.dims[new] = analysis.dims[old]
    names = [r.name for r in node.results]
    graph.replace(node, made)
    for value, name in zip(made.results, names, strict=True):
        graph.rename(value, name)


def _retype(analysis: Analysis, count: Callable[[Axis], Size]) -> None:
    """The types that the axes predict; verifying compares them with what each op gives."""
    for node in analysis.graph.nodes:
        for r in node.results:
            if isinstance(r.type, TensorType):
                shape = [new_size(axis, count) for axis in analysis.dims[r]]
                analysis.graph.set_type(r, r.type.with_shape(shape))
