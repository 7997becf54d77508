"""The reference meaning of a graph: node by node on PyTorch, values freed after their last use.

In witness mode every float is promoted to float64, one node's parameters at a time, so the
witness of a model needs no second copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.expr import Expr, affine, evaluate
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import DTYPES, DType, ScalarType, TensorType

if TYPE_CHECKING:
    import torch

Observer = Callable[[Node, Sequence[Any]], None]
_PROMOTED = {"f16": "f64", "bf16": "f64", "f32": "f64", "c32": "c128", "c64": "c128"}
# Ops whose meaning is tied to the bits of the element type: never promoted.
_KEEP_DTYPE = frozenset({"aten.view.dtype", "aten.nextafter.default", "aten.frexp.Tensor"})


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    parameters: Mapping[str, torch.Tensor] | None = None,
    double: bool = False,
    observe: Observer | None = None,
    device: str = "cpu",
    grad: bool = False,
) -> list[Any]:
    """The outputs' leaves, then the final value of each mutation, in order.

    With `grad`, results can be differentiated by those `parameters` that require it.
    Needs:   one input for each of `graph.inputs`; sizes within range are not checked here.
    Raises:  DfcError K020 that names the node when an op fails.
    """
    import torch

    with torch.set_grad_enabled(grad):
        return _Interpreter(parameters or {}, double, observe, device).run(graph, inputs, {})


def stepwise(
    graph: Graph, inputs: Sequence[Any], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Node | None, Mapping[Value, Any]]]:
    """Run a graph so that it can be left after any node, and gone on with later.

    Gives each node after it ran, None before the first, and the values that are still needed.
    `parameters` stand for the graph's own; they are looked up when a node reads them.
    Raises:  DfcError K020 that names the node when an op fails.
    """
    return _Interpreter(parameters, False, None, "cpu").steps(graph, inputs, {})


def resume(
    graph: Graph, known: Mapping[Value, Any], bindings: dict[str, Any], *, device: str = "cpu"
) -> dict[Value, Any]:
    """Every value of a graph of which some are known: nodes whose results all are do not run.

    Needs:   the inputs among what is known; `bindings` of their sizes, to which others are added.
    Raises:  DfcError K020 that names the node when an op fails.
    """
    import torch

    interpreter, values = _Interpreter({}, False, None, device), dict(known)
    with torch.no_grad():
        for node in graph.nodes:
            if not node.results or not all(r in values for r in node.results):
                results = interpreter.step(node, values, bindings)
                values.update(zip(node.results, results, strict=True))
                bind_results(node, results, bindings)
        read = {v: interpreter.read(v, values) for v in graph.result.operands}
    return {**values, **read}


def run_constant(node: Node) -> Sequence[Any]:
    """The results of a node that reads parameters alone.

    Raises:  DfcError K020 when the op fails.
    """
    import torch

    with torch.no_grad():
        return _Interpreter({}, False, None, "cpu").step(node, {}, {})


def stepper() -> Callable[[Node, Mapping[Value, Any], Mapping[str, Any]], Sequence[Any]]:
    """Run one node on values and sizes that the caller keeps.

    Raises:  DfcError K020 when the op fails.
    """
    return _Interpreter({}, False, None, "cpu").step


class _Interpreter:
    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        double: bool,
        observe: Observer | None,
        device: str,
    ) -> None:
        self.parameters = parameters
        self.double = double
        self.observe = observe
        self.device = device

    def run(self, graph: Graph, inputs: Sequence[Any], outer: Mapping[str, Any]) -> list[Any]:
        values: Mapping[Value, Any] = {}
        for _, left in self.steps(graph, inputs, outer):
            values = left
        return [self.read(v, values) for v in graph.result.operands]

    def steps(
        self, graph: Graph, inputs: Sequence[Any], outer: Mapping[str, Any]
    ) -> Iterator[tuple[Node | None, Mapping[Value, Any]]]:
        """Each node after it ran, and the values that are still needed."""
        values: dict[Value, Any] = {}
        bindings: dict[str, Any] = dict(outer)
        for v, x in zip(graph.inputs, inputs, strict=True):
            values[v] = self.promote(x)
        bindings.update(bind_inputs(graph, inputs))
        remaining = {v: v.use_count for n in graph.nodes for v in n.operands}
        kept = set(graph.result.operands)
        yield None, values
        for node in graph.nodes:
            results = self.step(node, values, bindings)
            for r, x in zip(node.results, results, strict=True):
                values[r] = x
            bind_results(node, results, bindings)
            if self.observe:
                self.observe(node, results)
            for v in node.operands:
                remaining[v] -= 1
                if not remaining[v] and v not in kept:
                    values.pop(v, None)
            for r in node.results:
                if not r._users:
                    values.pop(r, None)
            yield node, values

    def read(self, v: Value, values: Mapping[Value, Any]) -> Any:
        if not isinstance(v, Parameter):
            return values[v]
        given = self.parameters.get(v.name)
        if given is None:
            if v.data is None:
                raise DfcError("D002", f"the parameter !{v.name} has no data")
            given = v.data.tensor()
        return self.promote(given)

    def promote(self, x: Any) -> Any:
        import torch

        if not self.double or not isinstance(x, torch.Tensor):
            return x
        if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return x.double()
        return x.to(torch.complex128) if x.dtype == torch.complex64 else x

    def step(
        self, node: Node, values: Mapping[Value, Any], bindings: Mapping[str, Any]
    ) -> Sequence[Any]:
        operands = [
            [None if v is None else self.read(v, values) for v in x]
            if isinstance(x, tuple)
            else None
            if x is None
            else self.read(x, values)
            for x in node.inputs
        ]
        try:
            if node.graphs:
                return self.control_flow(node, operands, bindings)
            attributes = dict(node.attributes)
            if node.symbols:
                attributes = {k: bound(v, bindings) for k, v in attributes.items()}
            if self.double:
                return self.in_double(node, operands, attributes)
            return node.info.run(operands, attributes, self.device)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as e:
            place = f"traced from {node.loc}" if node.loc else "no source line is known"
            name = node.results[0].name if node.results else node.op
            raise DfcError(
                "K020",
                f"node %{name} `{node.op}` failed: {str(e).splitlines()[0] if str(e) else e!r}",
                notes=(place,),
            ) from e

    def in_double(
        self, node: Node, operands: list[Any], attributes: dict[str, Any]
    ) -> Sequence[Any]:
        """Run in float64; ops that cannot be promoted get the dtype they were traced with."""
        import torch

        if node.op not in _KEEP_DTYPE:
            promoted = {k: _promoted(v) for k, v in attributes.items()}
            try:
                results = node.info.run(operands, promoted, self.device)
                return [self.promote(r) for r in results]
            except (RuntimeError, NotImplementedError):
                pass

        def demote(x: Any, v: Value | None) -> Any:
            if v is None or not isinstance(v.type, TensorType) or not isinstance(x, torch.Tensor):
                return x
            return x.to(v.type.dtype.to_torch())

        traced = [
            [demote(a, w) for a, w in zip(x, v, strict=True)]
            if isinstance(v, tuple)
            else demote(x, v)
            for x, v in zip(operands, node.inputs, strict=True)
        ]
        return [self.promote(r) for r in node.info.run(traced, attributes, self.device)]

    def control_flow(
        self, node: Node, operands: list[Any], bindings: Mapping[str, Any]
    ) -> Sequence[Any]:
        flat = operands[0] if len(operands) == 1 and isinstance(operands[0], list) else operands
        run = self.run
        if node.op == "torch.cond":
            chosen = node.graphs[0] if bool(flat[0]) else node.graphs[1]
            return run(chosen, flat[1:], bindings)
        if node.op == "torch.while_loop":
            n = node.attributes["carried"]
            carried, more = list(flat[:n]), flat[n:]
            condition, body = node.graphs
            while bool(run(condition, [*carried, *more], bindings)[0]):
                carried = run(body, [*carried, *more], bindings)
            return carried
        import torch

        body = node.graphs[0]
        if node.op == "torch.map":
            n = node.attributes["xs"]
            rows = [
                run(body, [*(x[i] for x in flat[:n]), *flat[n:]], bindings)
                for i in range(flat[0].shape[0])
            ]
            return [torch.stack(column) for column in zip(*rows, strict=True)]
        init, n = node.attributes["init"], node.attributes["xs"]
        carried, xs, more = list(flat[:init]), flat[init : init + n], flat[init + n :]
        steps = range(xs[0].shape[0])
        outputs: list[list[Any]] = []
        for i in reversed(steps) if node.attributes["reverse"] else steps:
            out = run(body, [*carried, *(x[i] for x in xs), *more], bindings)
            carried = out[:init]
            outputs.append(out[init:])
        if node.attributes["reverse"]:
            outputs.reverse()
        return [*carried, *(torch.stack(column) for column in zip(*outputs, strict=True))]


def _promoted(value: Any) -> Any:
    return DTYPES[_PROMOTED.get(value.name, value.name)] if isinstance(value, DType) else value


def bound(value: Any, bindings: Mapping[str, Any]) -> Any:
    """An attribute with its sizes replaced by numbers."""
    if isinstance(value, tuple):
        return [bound(v, bindings) for v in value]
    return evaluate(value, bindings) if isinstance(value, Expr) else value


def solve(size: Any, actual: int) -> tuple[str, int] | None:
    """The symbol that a size fixes when it is `a*x + b`, and its value; else None."""
    known = affine(size)
    if known is None:
        return None
    name, factor, constant = known
    x, rest = divmod(actual - constant, factor)
    return None if rest else (name, x)


def bind_inputs(graph: Graph, inputs: Iterable[Any]) -> dict[str, Any]:
    """The value of each symbol that the inputs' shapes fix; plain symbols before expressions."""
    bindings: dict[str, Any] = {}
    derived: list[tuple[Any, int]] = []
    for v, x in zip(graph.inputs, inputs, strict=True):
        if isinstance(v.type, TensorType):
            for size, actual in zip(v.type.shape, x.shape, strict=False):
                if isinstance(size, Expr):
                    name = size.symbol
                    if name is not None:
                        bindings.setdefault(name, int(actual))
                    else:
                        derived.append((size, int(actual)))
        elif isinstance(v.type, ScalarType):
            bindings.setdefault(v.name, x)
    for size, actual in derived:
        found = solve(size, actual)
        if found:
            bindings.setdefault(*found)
    return bindings


def bind_results(node: Node, results: Sequence[Any], bindings: dict[str, Any]) -> None:
    """Record the sizes and numbers that a node has just decided."""
    wanted = {b.symbol for b in node.binds}
    if not wanted:
        return
    for r, x in zip(node.results, results, strict=True):
        if isinstance(r.type, TensorType):
            for size, actual in zip(r.type.shape, x.shape, strict=True):
                found = solve(size, int(actual))
                if found and found[0] in wanted:
                    bindings[found[0]] = found[1]
        elif isinstance(r.type, ScalarType):
            (name,) = wanted
            bindings[name] = x
