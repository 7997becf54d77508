"""Between the user's call and the graph's flat values: binding arguments, checking, rebuilding.

A compiled graph is called like the model: same arguments, same structure of results. What does not
fit is refused here, in the user's words, before any engine sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir import tree
from dfc.ir.caches import know_outputs, register_caches
from dfc.ir.expr import Expr, evaluate
from dfc.ir.graph import Argument, Graph, Value
from dfc.ir.interpret import bind_inputs
from dfc.ir.tree import Const, Leaf
from dfc.ir.types import ScalarType, TensorType, dtype_of

_MISSING = object()


def flat_inputs(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The graph's inputs, in order, from a call like the model's.

    Raises:  DfcError K010..K017 (exit status 2) for what does not fit.
    """
    register_caches()
    given = _bind(graph, args, kwargs)
    leaves: list[Any] = []
    labels: list[str] = []
    for a in graph.arguments:
        value = given[a.name]
        if value is _MISSING:
            value = _default(a)
        leaves += tree.flatten(a.tree, value, a.name)
        labels += tree.paths(a.tree, a.name)
    return check_inputs(graph, leaves, labels)


def sizes_of_call(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the graph's dynamic dimensions in a call like the model's.

    Raises:  DfcError K010..K017 (exit status 2) for what does not fit.
    """
    bindings = bind_inputs(graph, flat_inputs(graph, args, kwargs))
    return {name: size for name, size in bindings.items() if name in graph.ranges}


def flat_checked(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Inputs that are flat already, as one tensor for each of the graph's.

    Raises:  DfcError K012..K016 (exit status 2) for what does not fit.
    """
    labels = [label for a in graph.arguments for label in tree.paths(a.tree, a.name)]
    if not isinstance(inputs, (list, tuple)) or len(inputs) != len(labels):
        many = f"{len(inputs)}" if isinstance(inputs, (list, tuple)) else _brief(inputs)
        shown = ", ".join(labels)
        help = f"they are a list, one for each of: {shown}"
        raise DfcError("K012", f"`inputs` are {len(labels)}, got {many}", help=help, status=2)
    return check_inputs(graph, inputs, labels)


def _bind(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [a.name for a in graph.arguments if not a.keyword_only]
    given: dict[str, Any] = {a.name: _MISSING for a in graph.arguments}
    if len(args) > len(names):
        raise _refuse(
            "K012",
            f"the model takes {counted(len(names), 'positional argument')}, got {len(args)}",
            graph,
        )
    given.update(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in given:
            if value is None:
                continue  # an argument that was left out while tracing, left out again
            raise _refuse("K012", f"the model has no argument `{name}`", graph)
        if given[name] is not _MISSING:
            raise _refuse("K012", f"the argument `{name}` is given twice", graph)
        given[name] = value
    return given


def _refuse(code: str, message: str, graph: Graph) -> DfcError:
    shown = ", ".join(a.name for a in graph.arguments)
    return DfcError(code, message, help=f"it is called with ({shown})", status=2)


def _default(a: Argument) -> Any:
    """What stands for an argument that the call leaves out: the constant seen while tracing."""
    if isinstance(a.tree, Const):
        return a.tree.value
    raise DfcError("K012", f"the argument `{a.name}` is missing", status=2)


def allowed(graph: Graph, sizes: Mapping[str, Any]) -> bool:
    """Whether sizes satisfy what the model's own code needs."""
    return all(evaluate(condition, sizes) is not False for condition in graph.requires)


def check_inputs(graph: Graph, leaves: Sequence[Any], labels: Sequence[str]) -> list[Any]:
    """Check types, sizes and ranges.

    Raises:  DfcError K013 for a type, K014 for a size, K015 for a range, K016 for a condition.
    """
    import torch

    checked: list[Any] = []
    for v, x, label in zip(graph.inputs, leaves, labels, strict=True):
        if isinstance(v.type, ScalarType):
            if isinstance(x, torch.Tensor) or not isinstance(x, (int, float, bool)):
                raise DfcError("K013", f"`{label}` must be a number, got {_brief(x)}", status=2)
        elif not isinstance(x, torch.Tensor):
            help = "convert it by torch.as_tensor" if hasattr(x, "__array__") else None
            message = f"`{label}` must be a tensor {v.type}, got {_brief(x)}"
            raise DfcError("K013", message, help=help, status=2)
        else:
            _check_type(v, x, label)
        checked.append(x)
    bindings = bind_inputs(graph, checked)
    for v, x, label in zip(graph.inputs, checked, labels, strict=True):
        if isinstance(v.type, TensorType):
            _check_sizes(v.type, x, label, bindings)
    for name, size in bindings.items():
        low, high = graph.ranges.get(name, (0, None))
        if size < low or (high is not None and size > high):
            shown = f"{low}..{high}" if high is not None else f"at least {low}"
            raise DfcError(
                "K015",
                f"`{name}` is {size}, outside its range {shown}",
                help="trace the model again with a wider range in dynamic_shapes",
                status=2,
            )
    for condition in graph.requires:
        if evaluate(condition, bindings) is False:
            raise DfcError(
                "K016",
                f"the sizes do not satisfy `{condition}`, which the model's own code needs",
                status=2,
            )
    return checked


def _check_type(v: Value, x: Any, label: str) -> None:
    import torch

    assert isinstance(v.type, TensorType)
    if dtype_of(x.dtype) != v.type.dtype:
        raise DfcError(
            "K013", f"`{label}` must have dtype {v.type.dtype}, got {dtype_of(x.dtype)}",
            help=f"convert it by .to(torch.{v.type.dtype.torch_name})", status=2,
        )  # fmt: skip
    if x.layout != torch.strided:
        help = "convert it by .to_dense()"
        raise DfcError("K013", f"`{label}` is stored as {x.layout}", help=help, status=2)
    if x.dim() != v.type.rank:
        raise DfcError(
            "K014", f"`{label}` must have the shape {v.type}, got {list(x.shape)}", status=2
        )


def _check_sizes(t: TensorType, x: Any, label: str, bindings: Mapping[str, Any]) -> None:
    for dim, (size, actual) in enumerate(zip(t.shape, x.shape, strict=True)):
        expected = evaluate(size, bindings)
        if not isinstance(expected, Expr) and expected != actual:
            why = f"{size} = {expected}" if isinstance(size, Expr) else str(size)
            raise DfcError(
                "K014",
                f"`{label}` must have size {why} in dimension {dim} ({t}), got {list(x.shape)}",
                status=2,
            )


def _brief(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return f"a {type(x).__name__}" + (f" of shape {list(shape)}" if shape is not None else "")


def build_outputs(graph: Graph, inputs: Sequence[Any], leaves: Iterator[Any]) -> Any:
    """The results in the model's own structure."""
    bindings: dict[str, Any] = {}
    if not isinstance(graph.output_tree, Leaf):
        bindings = bind_inputs(graph, inputs)
        register_caches()
        know_outputs(graph.output_tree)
    return tree.build(graph.output_tree, leaves, bindings)


def own_outputs(results: Sequence[Any], inputs: Sequence[Any], owned: frozenset[int]) -> list[Any]:
    """Results that share no memory with the inputs or the weights: what would is copied."""
    import torch

    taken = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
    found: list[Any] = []
    for x in results:
        if isinstance(x, torch.Tensor) and x.numel():
            at = x.untyped_storage().data_ptr()
            if at in taken or at in owned:
                x = x.clone()
        found.append(x)
    return found
