"""A loss after a graph: one more node or a few, which belong to the last stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from dfc.capture.convert import Converter, Names
from dfc.capture.own_gradients import own_gradients
from dfc.capture.places import package_path
from dfc.errors import DfcError
from dfc.ir import tree
from dfc.ir.graph import Argument, Graph, Node, Value
from dfc.ir.tree import LEAF
from dfc.ir.types import TensorType
from dfc.lang.graph_types import GraphTypes
from dfc.ops.symbolic import SymbolTable


def with_loss(graph: Graph, loss: Callable[..., Any], targets: Sequence[TensorType | str]) -> Graph:
    """A copy that returns `loss(outputs, *targets)`: its nodes are the graph's, then the loss's.

    The targets become arguments `target`, `target_1`, ... after the model's own.
    Raises:  DfcError N074 for a loss that is not one float, that reads tensors of its own or
             branches on a size which data decide, and for targets that are no types.
    """
    copy = graph.copy()
    types = [_type(t) for t in targets]
    own = {name for v in graph.inputs for name in v.type.symbols}
    for t in types:
        if other := sorted(t.symbols - own):
            known = f"its inputs have {', '.join(sorted(own))}" if own else "its sizes are numbers"
            message = f"a target is {t}, and no input of the model has a size `{other[0]}`"
            raise DfcError("N074", message, help=known, status=2)
    extra = [copy.add_input(copy.fresh_name("target"), t) for t in types]
    copy.arguments = (*copy.arguments, *(Argument(v.name, LEAF) for v in extra))
    outputs = list(copy.outputs)
    table = SymbolTable(copy.ranges)
    for name in sorted({s for v in outputs for s in v.type.symbols} - set(copy.ranges)):
        table.add_unbacked(name)
    with own_gradients() as found:
        traced = _traced(loss, graph.output_tree, len(outputs), [*outputs, *extra], table)
    copy.own_gradients += tuple(dict.fromkeys(found))
    names = Names()
    names.known.update(table.known)
    converter = Converter(copy, traced, names)
    holders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    converter.env.update(zip(holders, (*outputs, *extra), strict=True))
    nodes = list(traced.graph.nodes)
    converter.convert(nodes)
    made = converter.single(nodes[-1].args[0])
    assert made is not None
    copy.set_outputs([made], mutations=[(m.target, m.value) for m in copy.mutations])
    return copy


def _type(target: object) -> TensorType:
    """A type, or one that is read from its text: `i64[B]`."""
    found = GraphTypes(target, "targets").type() if isinstance(target, str) else target
    if not isinstance(found, TensorType):
        raise DfcError("N074", f"a target is given by its type, not by `{type(target).__name__}`",
                       help='write targets=["i64[B]"], with the names of the model\'s own sizes',
                       status=2)  # fmt: skip
    return found


def _traced(
    loss: Callable[..., Any], structure: tree.Tree, count: int, values: Sequence[Value],
    table: SymbolTable,
) -> fx.GraphModule:  # fmt: skip
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    def run(*leaves: Any) -> Any:
        built = tree.build(structure, iter(leaves[:count]), {})
        found = loss(built, *leaves[count:])
        if not isinstance(found, torch.Tensor) or found.dim() or not found.is_floating_point():
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise DfcError("N074", f"the loss must be one float tensor without dimensions, got "
                           f"{what}", help="take its mean")  # fmt: skip
        return found

    mode = FakeTensorMode(shape_env=table.env, allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fakes = [
            torch.empty([table.concrete(s) for s in v.tensor_type.shape],
                        dtype=v.tensor_type.dtype.to_torch())
            for v in values
        ]  # fmt: skip
        try:
            with fx.traceback.preserve_node_meta(), _Lines():
                # Without a table torch 2.14 makes `detach` an alias, through which gradients flow.
                return make_fx(run, decomposition_table={})(*fakes)
        except GuardOnDataDependentSymNode as e:
            raise DfcError(
                "N074", f"the loss takes another way by `{e.cond}`, which data decide",
                help="use `y.shape[0]` instead of `len(y)`, and torch.where instead of `if`",
                status=2,
            ) from e  # fmt: skip
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
                NotImplementedError) as e:  # fmt: skip
            given = ", ".join(str(v.type) for v in values)
            message = f"the loss fails, called with {given}: {type(e).__name__}: {e}"
            raise DfcError("N074", message, status=2) from e


class _Lines(TorchFunctionMode):
    """Lets nodes have the line that calls PyTorch; make_fx itself looks at `forward` alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        frame = sys._getframe(1)
        while frame.f_back and package_path(frame.f_code.co_filename).startswith("torch/"):
            frame = frame.f_back
        code = frame.f_code
        line = f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        fx.traceback.set_stack_trace([line])
        return func(*args, **(kwargs or {}))


def loss_of(graph: Graph) -> Value:
    """The output that is the loss: the only one that is a float without dimensions.

    Raises:  DfcError N074 when there is none, or more than one.
    """
    found = [
        v for v in graph.outputs
        if isinstance(v.type, TensorType) and not v.type.shape and v.type.dtype.is_float
        and isinstance(v.node, Node)
    ]  # fmt: skip
    if len(found) != 1:
        said = "no output" if not found else f"{len(found)} outputs"
        raise DfcError(
            "N074", f"{said} of the model could be the loss: one float without dimensions",
            help="give `loss=` a function of the model's outputs and the targets", status=2,
        )  # fmt: skip
    return found[0]
