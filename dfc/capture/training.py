"""A graph with its gradients: one joint graph of forward and backward nodes.

AOTAutograd differentiates the graph as PyTorch would, below the dispatcher, so that what comes out
is ATen again. Backward nodes keep the Python line and the module path of the forward node whose
gradient they compute.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dfc.capture.convert import Converter, Names
from dfc.emit.fx import to_fx
from dfc.emit.places import place_of
from dfc.errors import DfcError
from dfc.ir.graph import Argument, Graph, Loc, Parameter, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import ScalarType, TensorType
from dfc.ops.symbolic import SymbolTable, identifier


@dataclass(frozen=True)
class Joint:
    """Forward and backward of one graph; all values are those of `graph`.

    Inputs are the forward graph's inputs, the weights and the buffers that change (`state`), then a
    tangent for each output that has one: the derivative of the loss by it. Outputs are the forward
    graph's, then the gradients that are not None.
    """

    graph: Graph
    inputs: tuple[Value, ...]
    weights: Mapping[str, Value]
    outputs: tuple[Value, ...]
    tangents: tuple[Value | None, ...]  # of each output
    input_gradients: tuple[Value | None, ...]  # of each input
    weight_gradients: Mapping[str, Value]
    state: Mapping[str, Value] = field(default_factory=dict)

    def copy(self) -> Joint:
        """One whose graph may be changed."""
        graph, twin = self.graph.copy_with_map()

        def some(values: Iterable[Value | None]) -> tuple[Value | None, ...]:
            return tuple(v and twin[v] for v in values)

        return Joint(
            graph, graph.inputs[: len(self.inputs)], {n: twin[v] for n, v in self.weights.items()},
            tuple(twin[v] for v in self.outputs), some(self.tangents), some(self.input_gradients),
            {n: twin[v] for n, v in self.weight_gradients.items()},
            {n: twin[v] for n, v in self.state.items()},
        )  # fmt: skip


def joint_graph(
    graph: Graph, weights: Sequence[str], inputs: Sequence[bool], outputs: Sequence[bool],
    state: Collection[str] = (),
) -> Joint:  # fmt: skip
    """Differentiate a graph by the inputs that are wanted and by the weights.

    `outputs` says which outputs the loss depends on; the others are not differentiated.
    Needs:   no data of weights and `state`; the other parameters keep theirs.
    Raises:  DfcError N070 for an operator that PyTorch cannot differentiate, or an output whose
             derivative has a size that only the graph's own data tell; N071 for an operator that
             draws random numbers.
    """
    refuse_random(graph)
    _refuse_unknown_sizes(graph, outputs)
    lifted, parameters = _lifted(graph)
    table = SymbolTable(lifted.ranges)
    wanted = [w and _has_derivative(v) for v, w in zip(graph.inputs, inputs, strict=True)]
    wanted += [p.name in set(weights) for p in parameters]
    _, fakes = _fakes(lifted, table, wanted)
    traced = _traced(lifted, fakes, list(outputs), table)
    return _converted(traced, graph, parameters, table, set(weights), state)


class Derivatives:
    """What depends on what by derivatives: the graph, run on tensors without numbers.

    `inputs` are those that derivatives are wanted by; `outputs` says of each output whether it
    depends on one of them or on a weight.
    Raises:  DfcError N071 for an operator that draws random numbers.
    Cost:    a fourth of `joint_graph`.
    """

    def __init__(self, graph: Graph, weights: Sequence[str], inputs: Sequence[bool]) -> None:
        refuse_random(graph)
        lifted, parameters = _lifted(graph)
        self._names = [p.name for p in parameters]
        wanted = [w and _has_derivative(v) for v, w in zip(graph.inputs, inputs, strict=True)]
        wanted += [name in set(weights) for name in self._names]
        self._graph, self._table = graph, SymbolTable(lifted.ranges)
        self._mode, self._leaves = _fakes(lifted, self._table, wanted)
        # in the mode what the graph makes itself (aten.arange) is without numbers as well
        with self._mode, torch.enable_grad(), _refused(self._graph, self._table), _differentiable():
            self._results = to_fx(lifted)(*self._leaves)
        self.outputs = [isinstance(x, torch.Tensor) and x.requires_grad for x in self._results]

    def by(self, outputs: Sequence[bool]) -> tuple[list[bool], list[str]]:
        """The inputs and the weights that the marked outputs have derivatives by.

        Needs:   outputs that depend on something.
        Raises:  DfcError N070 for an operator that PyTorch cannot differentiate.
        """
        chosen = [x for x, o in zip(self._results, outputs, strict=True) if o]
        leaves = [x for x in self._leaves if x.requires_grad]
        found: dict[int, Any] = {}
        if chosen and leaves:
            with self._mode, _refused(self._graph, self._table), _differentiable():
                ones = [torch.ones_like(x) for x in chosen]
                gradients = torch.autograd.grad(
                    chosen, leaves, ones, retain_graph=True, allow_unused=True
                )
            found = {id(x): g for x, g in zip(leaves, gradients, strict=True)}
        has = [found.get(id(x)) is not None for x in self._leaves]
        count = len(has) - len(self._names)
        return has[:count], [n for n, h in zip(self._names, has[count:], strict=True) if h]


@contextmanager
def _refused(graph: Graph, table: SymbolTable) -> Iterator[None]:
    """
    Raises:  DfcError N070 for what PyTorch refuses, in the graph's own words.
    """
    try:
        yield
    except GuardOnDataDependentSymNode as e:
        why = f"it depends on `{_in_our_names(str(e.cond), table)}`, which data decide"
        help = "let the number be a fixed one, or keep the computation in tensors"
        read = [n for n in graph.walk() if n.binds and isinstance(n.result.type, ScalarType)]
        notes = [f"the model reads a number from data at {n.loc}" for n in read if n.loc]
        raise _cannot(e, why, help, notes[:3]) from e
    except (RuntimeError, NotImplementedError) as e:
        text = str(e).partition("\n")[0]  # PyTorch's own stack may follow
        why = _in_our_names(text, table)
        varies = "capture the model with fixed sizes, without `dynamic_shapes`"
        raise _cannot(e, why, varies if why != text else None) from e


def _cannot(e: Exception, why: str, help: str | None, notes: Sequence[str] = ()) -> DfcError:
    place = place_of(e)
    at = f" at {place}" if place else ""
    message = f"PyTorch cannot differentiate the graph{at}: {why}"
    return DfcError("N070", message, help=help, notes=tuple(notes))


def _in_our_names(text: str, table: SymbolTable) -> str:
    """PyTorch's words, with the sizes called as in the graph."""
    for theirs, ours in table.known.items():
        text = re.sub(rf"\b{theirs}\b", str(ours), text)
    return text


@contextmanager
def _differentiable() -> Iterator[None]:
    """Recurrent layers, and padding that cuts, by PyTorch's own decompositions in Python, which
    know sizes that vary; recurrent layers have derivatives only where oneDNN's kernel does not
    stand for them."""
    from torch._dispatch.python import enable_python_dispatcher

    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of TF32
    try:
        with enable_python_dispatcher():
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def refuse_random(graph: Graph) -> None:
    """Refuse operators that draw from PyTorch's stream: cutting the graph would change it.

    Raises:  DfcError N071.
    """
    for node in graph.walk():
        if getattr(node.info, "_random", False) and not node.pure:
            raise DfcError(
                "N071", f"`{node.op}` ({node.loc or 'unknown place'}) draws random numbers, which "
                "a partitioned model would draw in another order",
                help="dropout is the one such operator that can be trained in stages",
            )  # fmt: skip


def _refuse_unknown_sizes(graph: Graph, outputs: Sequence[bool]) -> None:
    """
    Raises:  DfcError N070.
    """
    known = {s for v in graph.inputs for s in v.type.symbols}
    for v in (v for v, o in zip(graph.outputs, outputs, strict=True) if o):
        if unknown := sorted(v.type.symbols - known):
            raise DfcError(
                "N070", f"the derivative of %{v.name}, {v.type}, cannot come back from another "
                f"stage: data decide `{unknown[0]}`",
                help="let the stage end before or after what has such a size",
            )  # fmt: skip


def _lifted(graph: Graph) -> tuple[Graph, list[Parameter]]:
    """A copy whose parameters are inputs, after its own."""
    copy, twin = graph.copy_with_map()
    read = [p for p in graph.parameters.values() if p.use_count]
    for p in read:
        held = twin[p]
        made = copy.add_input(copy.fresh_name(identifier(f"w_{p.name}")), p.type)
        copy.replace_uses(held, made)
    for p in list(copy.parameters.values()):
        copy.drop_parameter(p.name)
    _spell_copies(copy)
    return copy, read


def _spell_copies(graph: Graph) -> None:
    """What is written over a tensor is a cast and an expansion: PyTorch derives those alone."""
    for node in [n for n in graph.nodes if n.op == "aten.copy.default"]:
        written, type = node.inputs[1], node.result.type
        assert isinstance(written, Value) and isinstance(written.type, TensorType)
        assert isinstance(type, TensorType)
        at: dict[str, Any] = {"before": node, "stage": node.stage, "loc": node.loc}
        if written.type.dtype != type.dtype:
            cast = {"dtype": type.dtype, "layout": None, "device": None, "pin_memory": None,
                    "non_blocking": False, "memory_format": None}  # fmt: skip
            written = graph.add("aten._to_copy.default", [written], cast, **at).result
        size = {"size": list(type.shape), "implicit": False}
        made = graph.add("aten.expand.default", [written], size, **at).result
        graph.replace_uses(node.result, made)
        graph.erase(node)


def _has_derivative(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.has_derivative


def _fakes(
    graph: Graph, table: SymbolTable, wanted: Sequence[bool]
) -> tuple[FakeTensorMode, list[Any]]:
    found = []
    mode = FakeTensorMode(shape_env=table.env, allow_non_fake_inputs=True)
    with mode:
        for v, grad in zip(graph.inputs, wanted, strict=True):
            if not isinstance(v.type, TensorType):
                raise DfcError("N070", f"the input %{v.name} is a number: a partitioned model is "
                               "trained on tensors alone")  # fmt: skip
            shape = [table.concrete(s) for s in v.type.shape]
            found.append(torch.empty(shape, dtype=v.type.dtype.to_torch(), requires_grad=grad))
    return mode, found


@torch.library.custom_op("dfc::boundary", mutates_args=())
def _boundary(x: torch.Tensor) -> torch.Tensor:
    """The identity, opaque while tracing: what a stage returns may be a view of what it took."""
    return x.clone()


@_boundary.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_boundary.register_autograd(lambda ctx, gradient: torch.ops.dfc.boundary(gradient))


def _traced(
    graph: Graph, fakes: list[Any], outputs: list[bool], table: SymbolTable
) -> fx.GraphModule:
    from torch._functorch.aot_autograd import aot_export_joint_simple

    module = to_fx(graph)

    def forward(*leaves: Any) -> list[Any]:
        results = fx.Interpreter(module).run(*leaves)
        kept = [x if o else x.detach() for x, o in zip(results, outputs, strict=True)]
        return [torch.ops.dfc.boundary(x) for x in kept]

    meta = fx.traceback.preserve_node_meta()
    with _refused(graph, table), torch.enable_grad(), _differentiable(), meta:
        traced = aot_export_joint_simple(forward, tuple(fakes), trace_joint=True)
    assert isinstance(traced, fx.GraphModule)
    return traced


def _converted(
    traced: fx.GraphModule, forward: Graph, parameters: Sequence[Parameter], table: SymbolTable,
    weights: set[str], state: Collection[str],
) -> Joint:  # fmt: skip
    _drop_copies(traced.graph)
    graph, names = Graph(f"{forward.name}_joint"), Names()
    graph.ranges, graph.requires = dict(forward.ranges), forward.requires
    names.known.update(table.known)
    converter = _Joining(graph, traced, names)
    nodes = list(traced.graph.nodes)
    holders = [n for n in nodes if n.op == "placeholder"]
    count = len(forward.inputs)
    for holder, v in zip(holders, forward.inputs, strict=False):
        converter.env[holder] = graph.add_input(v.name, v.type)
    named: dict[str, Value] = {}
    held: dict[str, Value] = {}
    for holder, p in zip(holders[count:], parameters, strict=False):
        if p.name in weights or p.name in state:
            name = graph.fresh_name(identifier(f"w_{p.name}"))
            kind = named if p.name in weights else held
            kind[p.name] = converter.env[holder] = graph.add_input(name, p.type)
        else:
            converter.env[holder] = graph.add_parameter(
                p.name, p.tensor_type, p.kind, p.data, p.aliases)  # fmt: skip
    tangents: list[Value | None] = [None] * len(forward.outputs)
    for holder in holders[count + len(parameters) :]:
        type = names.type_of(holder.meta["val"])
        made = graph.add_input(graph.fresh_name("tangent"), type)
        tangents[holder.meta["desc"].output.idx] = converter.env[holder] = made
    converter.convert(nodes)
    graph.arguments = tuple(Argument(v.name, LEAF) for v in graph.inputs)
    leaves: Any = nodes[-1].args[0]
    found = [None if x is None else converter.single(x) for x in leaves]
    results = [v for v in found if v is not None]
    graph.set_outputs(results, Seq("tuple", (LEAF,) * len(results)))
    n = len(forward.outputs)
    gradients = found[n:] or [None] * (count + len(parameters))  # nothing was differentiated
    by_weight = zip((p.name for p in parameters), gradients[count:], strict=True)
    return Joint(
        graph, graph.inputs[:count], named, tuple(v for v in found[:n] if v is not None),
        tuple(tangents), tuple(gradients[:count]),
        {name: g for name, g in by_weight if g is not None}, held,
    )  # fmt: skip


def _drop_copies(graph: fx.Graph) -> None:
    """Let users of a copy read what was copied, since values know no memory; likewise of `t(t(x))`.

    Why:  a transposed weight would be kept from the forward pass on, to be transposed again.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target in (aten.clone.default, torch.ops.dfc.boundary.default):
            node.replace_all_uses_with(source)
        elif node.target is aten.t.default and source.target is aten.t.default:
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()


class _Joining(Converter):
    """Reads the joint graph: backward nodes have the place of their forward node."""

    def location(self, node: fx.Node) -> Loc | None:
        loc = super().location(node)
        stack = node.meta.get("fwd_nn_module_stack")
        if not stack:
            return loc
        path = list(stack.values())[-1][0]
        return Loc(loc.file, loc.line, path) if loc else Loc(module=path)
