"""The linear layers that a step is about: those its selectors name, or all of them."""

from __future__ import annotations

from collections.abc import Iterable

from dfc.compress.sequential import LINEAR, weight_of
from dfc.compress.weighted import reads_codes
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import Context


def linear_layers(
    name: str, graph: Graph, only: Selector | None, exclude: Selector | None, ctx: Context
) -> tuple[list[Node], dict[Node, str]]:
    """Linear layers with constant weights, in order; and those that a step of this name leaves out,
    each with the reason.

    Raises:  DfcError D093 when none is left; D002 when the weights have no numbers.
    """
    chosen = set(only.nodes_left(graph)) if only else None
    unwanted = set(exclude.nodes_left(graph)) if exclude else set()
    written = {m.target for m in graph.mutations}
    own, found, left = set(graph.nodes), [], {}
    for node in graph.walk():
        if node.op != LINEAR or (chosen is not None and node not in chosen):
            continue
        weight = weight_of(node)
        if node in unwanted:
            left[node] = "excluded by the step"
        elif node not in own:
            left[node] = "it lies in a nested graph, which calibration does not reach"
        elif weight is None and any(v.node and reads_codes(v.node) for v in node.operands):
            left[node] = "it reads codes already: this step goes before `quantize`"
        elif weight is None:
            left[node] = "its weight is computed, not a constant"
        elif weight in written:
            left[node] = f"the model writes to !{weight.name}"
        elif not weight.tensor_type.dtype.is_float:
            left[node] = f"its weight is {weight.tensor_type.dtype}"
        else:
            found.append(node)
    if not found:
        raise _none(graph, only, exclude, left)
    _check_numbers(found)
    if not unwanted & left.keys():
        tell_nothing_left_out(name, graph, exclude, ctx)
    return found, left


def tell_nothing_left_out(name: str, graph: Graph, exclude: Selector | None, ctx: Context) -> None:
    """Tell of an `except` that names no layer where layers may lie inside of what it names."""
    if exclude and (deeper := exclude.deeper(graph)):
        ctx.note(f"{name}: `except {exclude}` leaves out no layer: {deeper}")


def _none(
    graph: Graph, only: Selector | None, exclude: Selector | None, left: dict[Node, str]
) -> DfcError:
    where = f" in `{only}`" if only else ""
    why = f": {next(iter(left.values()))}" if left else ""
    but = f" but those in `{exclude}`" if exclude and left else ""
    help = "`dfc select MODEL 'op(linear)'` lists the linear layers and their module paths"
    help = (only and only.deeper(graph)) or help
    return DfcError("D093", f"there is no linear layer{where} to work on{but}{why}", help=help)


def _check_numbers(layers: Iterable[Node]) -> None:
    for layer in layers:
        weight = weight_of(layer)
        if weight is not None and weight.data is None:
            raise DfcError("D002", f"the parameter !{weight.name} has no data")
