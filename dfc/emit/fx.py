"""Graph to `fx.GraphModule`: what PyTorch runs, compiles and differentiates.

The module takes the graph's flat inputs and returns a tuple: the outputs' leaves, then the final
value of each mutation. Parameters are attributes of the module and share the graph's data.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from dfc.emit.kernels import KernelCall, Kernels
from dfc.emit.supply import Supply, Visit
from dfc.errors import DfcError
from dfc.ir.expr import FUNCTIONS, Call, Expr, Scalar, affine
from dfc.ir.graph import Graph, Input, Loc, Node, Parameter, Value
from dfc.ir.op import DeclaredOp
from dfc.ir.types import DType, ScalarType, TensorType
from dfc.ops.aten import AtenOp

# Functions that torch.compile traces through symbolic sizes; the rest are plain Python.
_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": torch.sym_min,
    "max": torch.sym_max,
    "where": torch.sym_ite,
    "not": torch.sym_not,
    "float": torch.sym_float,
    "truediv": operator.truediv,
    "sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
}

_SIZE_OF = torch.ops.aten.sym_size.int


def to_fx(
    graph: Graph,
    device: str = "cpu",
    kernels: Kernels | None = None,
    mark: Callable[[], None] | None = None,
    donated: Collection[Value] = (),
    supply: Supply | None = None,
) -> fx.GraphModule:
    """The graph as a module on one device; `kernels` run the nodes that they take.

    `mark` is called before the first node and after each one: a clock for whoever measures. What
    comes in for `donated` inputs may be written over: an operator that is the only reader of one,
    and makes a tensor of its type, has an in-place variant do so. `supply` says which weights are
    not the module's own, and when those come that are not always there.
    Raises:  DfcError K021 for a parameter without data.
    """
    return _Emitter(graph, device, {}, kernels or {}, mark, donated, supply).module()


def _python_name(name: str) -> str:
    """A value's name as a parameter's: a stage may take what `__and__` made, `%and`."""
    usable = name.isidentifier() and not keyword.iskeyword(name) and name != "self"
    return name if usable else f"v{name}"


class _Emitter:
    def __init__(
        self,
        graph: Graph,
        device: str,
        outer: dict[str, fx.Proxy],
        kernels: Kernels,
        mark: Callable[[], None] | None = None,
        donated: Collection[Value] = (),
        supply: Supply | None = None,
    ) -> None:
        self.donated = donated
        self.supply = supply or Supply()
        self.visits = {v.first: v for v in self.supply.visits}
        self.leaving = {v.last: v for v in self.supply.visits}
        self.visiting = {p for v in self.supply.visits for p in v.weights}
        self.graph = graph
        self.device = device
        self.kernels = kernels
        self.mark = mark
        self.root = torch.nn.Module()
        self.fx = fx.Graph()
        self.env: dict[Value, Any] = {}
        self.sizes: dict[Scalar, Any] = {}
        self.held: dict[int, tuple[str, torch.Tensor]] = {}  # what kernels brought along
        self.passed_by: set[fx.Node] = set()  # what kernels read the operands of
        self.outer = outer

    def _argument(self, name: str) -> fx.Node:
        """An argument that is called what its node is: `input` becomes `input_1` in fx, and the
        code would read another argument of that name."""
        made = self.fx.placeholder(name)
        made.target = made.name
        return made

    def module(self) -> fx.GraphModule:
        for name in self.outer:
            self.sizes[_symbol(name)] = self._argument(name)
        for v in self.graph.inputs:
            self.env[v] = self._argument(_python_name(v.name))
        self.bind_inputs()
        for i, p in enumerate(self.graph.parameters.values()):
            if p.use_count and p not in self.visiting:
                self.parameter(i, p)
        self.env |= {p: self.constant(x) for p, x in self.supply.held.items() if p not in self.env}
        if self.mark:
            self.fx.call_function(self.mark)
        for node in self.graph.nodes:
            last = next(iter(reversed(self.fx.nodes)), None)
            if node in self.visits:
                self.visit(self.visits[node])
            self.node(node)
            if node in self.leaving:
                self.fx.call_function(self.leaving[node].leave)
            if self.mark:
                self.fx.call_function(self.mark)
            if node.loc is not None:
                self.locate(node.loc, last)
        self.fx.output(tuple(self.env[v] for v in self.graph.result.operands))
        self.drop_unread()
        module = fx.GraphModule(self.root, self.fx, class_name="DfcGraph")
        module.eval()
        return module

    def locate(self, loc: Loc, last: fx.Node | None) -> None:
        """Note on all nodes after `last` where they come from, in the words of torch.export."""
        for node in reversed(self.fx.nodes):
            if node is last:
                return
            if loc.file:
                node.meta["stack_trace"] = f'  File "{loc.file}", line {loc.line}, in forward'
            if loc.module:
                node.meta["nn_module_stack"] = {loc.module: (loc.module, "")}

    def visit(self, visit: Visit) -> None:
        tensors = self.fx.call_function(visit.take)
        for i, p in enumerate(visit.weights):
            self.env[p] = self.fx.call_function(operator.getitem, (tensors, i))

    def parameter(self, i: int, p: Parameter) -> None:
        if p in self.supply.held:
            self.env[p] = self.constant(self.supply.held[p])
            return
        if p.data is None:
            raise DfcError(
                "K021",
                f"the parameter !{p.name} has no data: the model was traced on the meta device",
                help="load weights before running; planning and text do not need them",
            )
        name = f"p{i}"
        self.root.register_buffer(name, p.data.tensor().to(self.device), persistent=False)
        self.env[p] = self.fx.get_attr(name)

    def drop_unread(self) -> None:
        """Let go of parameters that kernels have in a form of their own, of what they pass by, and
        of unread sizes.
        """
        for node in reversed(self.fx.nodes):
            if not node.users and (node.target is _SIZE_OF or node in self.passed_by):
                self.fx.erase_node(node)
        for node in [n for n in self.fx.nodes if n.op == "get_attr" and not n.users]:
            self.fx.erase_node(node)
            delattr(self.root, node.target)

    # sizes

    def bind_inputs(self) -> None:
        derived: list[tuple[Expr, Value, int]] = []
        for v in self.graph.inputs:
            if isinstance(v.type, ScalarType):
                self.sizes.setdefault(_symbol(v.name), self.env[v])
            elif isinstance(v.type, TensorType):
                for dim, size in enumerate(v.type.shape):
                    if not isinstance(size, Expr):
                        continue
                    if size.symbol is not None and size not in self.sizes:
                        self.sizes[size] = self.size_of(v, dim)
                    elif size.symbol is None:
                        derived.append((size, v, dim))
        for size, v, dim in derived:
            self.solve(size, v, dim)

    def size_of(self, v: Value, dim: int) -> fx.Node:
        return self.fx.call_function(_SIZE_OF, (self.env[v], dim))

    def solve(self, size: Expr, v: Value, dim: int) -> None:
        """Bind the symbol of `a*x + b` from an actual size."""
        known = affine(size)
        if known is None or _symbol(known[0]) in self.sizes:
            return
        name, factor, rest = known
        actual: Any = self.size_of(v, dim)
        if rest:
            actual = self.fx.call_function(operator.sub, (actual, rest))
        self.sizes[_symbol(name)] = self.fx.call_function(operator.floordiv, (actual, factor))

    def scalar(self, x: Any) -> Any:
        """The fx node or number that holds a size expression's value."""
        if not isinstance(x, Expr):
            return x
        known = self.sizes.get(x)
        if known is not None:
            return known
        if x.symbol is not None:
            raise DfcError("V005", f"the size `{x}` is used before it is bound")
        inner = x.call
        if inner is not None:
            made = self.call(inner)
        else:
            made = self.polynomial(x)
        self.sizes[x] = made
        return made

    def call(self, inner: Call) -> Any:
        args = [self.scalar(a) for a in inner.args]
        function = _SYMBOLIC.get(inner.name, FUNCTIONS[inner.name])
        if inner.name in ("min", "max"):
            total = args[0]
            for a in args[1:]:
                total = self.fx.call_function(function, (total, a))
            return total
        return self.fx.call_function(function, tuple(args))

    def polynomial(self, x: Expr) -> Any:
        total: Any = None
        for monomial, c in x.terms:
            term: Any = None
            for atom, power in monomial:
                factor = self.scalar(_symbol(atom) if isinstance(atom, str) else _of_call(atom))
                for _ in range(power):
                    term = (
                        factor
                        if term is None
                        else self.fx.call_function(operator.mul, (term, factor))
                    )
            if term is None:
                term = c
            elif c != 1:
                term = self.fx.call_function(operator.mul, (term, c))
            total = term if total is None else self.fx.call_function(operator.add, (total, term))
        return total

    def deep(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return [self.deep(v) for v in value]
        if isinstance(value, DType):
            return value.to_torch()
        return self.scalar(value)

    # nodes

    def operand(self, x: Input) -> Any:
        if isinstance(x, tuple):
            return [None if v is None else self.env[v] for v in x]
        return None if x is None else self.env[x]

    def node(self, node: Node) -> None:
        if node.results and all(r in self.env for r in node.results):  # a kernel gave it already
            return
        operands = [self.operand(x) for x in node.inputs]
        if node.graphs:
            result = self.control_flow(node, operands[0])
        else:
            result = self.operator(node, operands)
        if result is None:
            return
        self.results(node, result)

    def operator(self, node: Node, operands: Sequence[Any]) -> Any:
        attributes = {k: self.deep(v) for k, v in node.attributes.items()}
        info = node.info
        if node.op == "torch.scalar":
            self.env[node.result] = attributes["value"]
            return None
        kernel = self.kernels.get(node.op)
        call = self.supply.calls.get(node) or (kernel(node) if kernel else None)
        if call is not None:
            return self.kernel(node, call)
        if isinstance(info, AtenOp):
            args, kwargs = info.bind(operands, attributes, self.device)
            own = info.in_place if self.may_write(node) else None
            return self.fx.call_function(own or info.kernel, tuple(args), kwargs)
        assert isinstance(info, DeclaredOp)
        instance = info.instance(node.attributes)
        return self.fx.call_function(instance.reference, tuple(operands))

    def may_write(self, node: Node) -> bool:
        """Whether the first operand's memory is there for the result."""
        first = node.inputs[0] if node.inputs else None
        return (
            isinstance(first, Value) and first in self.donated and first.use_count == 1
            and [r.type for r in node.results] == [first.type]
        )  # fmt: skip

    def kernel(self, node: Node, call: KernelCall) -> fx.Node:
        operands = tuple(
            self.env[x] if isinstance(x, Value) else self.constant(x) for x in call.operands
        )
        read = {x for x in call.operands if isinstance(x, Value)}
        self.passed_by |= {
            self.env[v] for v in node.operands if v not in read and v.node and v.node.pure
        }
        made = self.fx.call_function(call.function, operands)
        self.env |= dict.fromkeys(call.also, made)
        return made

    def constant(self, x: Any) -> Any:
        """A tensor as a buffer of the module; one for all nodes that share it."""
        if not isinstance(x, torch.Tensor):
            return x
        name, _ = self.held.setdefault(id(x), (f"k{len(self.held)}", x))
        if not hasattr(self.root, name):
            self.root.register_buffer(name, x.to(self.device), persistent=False)
        return self.fx.get_attr(name)

    def results(self, node: Node, result: fx.Node) -> None:
        info = node.info
        flat = isinstance(info, AtenOp) and len(info.result_lists) == 1 and not info.result_lists[0]
        if isinstance(info, DeclaredOp):
            flat = len(node.results) == 1
        for i, r in enumerate(node.results):
            if flat:
                self.env[r] = result
            elif r.use_count or node.binds:
                self.env[r] = self.fx.call_function(operator.getitem, (result, i))
        for b in node.binds:
            self.bind(node, b.symbol)

    def bind(self, node: Node, name: str) -> None:
        key = _symbol(name)
        for r in node.results:
            if isinstance(r.type, ScalarType):
                held = self.env[r]
                if r.type.name == "bool":  # a symbol is a number, and torch's SymBool equals none
                    held = self.fx.call_function(torch.sym_ite, (held, 1, 0))
                self.sizes[key] = held
                return
            if isinstance(r.type, TensorType):
                for dim, size in enumerate(r.type.shape):
                    if isinstance(size, Expr) and name in size.symbols:
                        if size == key:
                            self.sizes[key] = self.size_of(r, dim)
                        else:
                            self.solve(size, r, dim)
                        return

    def control_flow(self, node: Node, flat: list[Any]) -> fx.Node:
        """A call of a Python function on sub-modules: exact in eager mode."""
        names = sorted(
            {s for g in node.graphs for s in _free_symbols(g)} & {str(k) for k in self.sizes}
        )
        bodies = []
        for g in node.graphs:
            inner = _Emitter(g, self.device, dict.fromkeys(names), self.kernels)  # type: ignore[arg-type]
            target = f"{node.op.replace('.', '_')}_{len(list(self.root.children()))}_{g.name}"
            self.root.add_module(target, inner.module())
            bodies.append(self.fx.get_attr(target))
        sizes = [self.scalar(_symbol(n)) for n in names]
        attributes = {k: self.deep(v) for k, v in node.attributes.items()}
        return self.fx.call_function(_CONTROL[node.op], (bodies, sizes, flat), attributes)


def _symbol(name: str) -> Expr:
    from dfc.ir.expr import symbol

    return symbol(name)


def _of_call(inner: Call) -> Expr:
    return Expr((((((inner, 1),)), 1),))


def _free_symbols(graph: Graph) -> set[str]:
    found: set[str] = set()
    for node in graph.walk():
        found |= node.symbols
        for r in node.results:
            found |= r.type.symbols
    for v in graph.inputs:
        found |= v.type.symbols
    return found


def _cond(bodies: list[Any], sizes: list[Any], flat: list[Any]) -> Any:
    return bodies[0 if bool(flat[0]) else 1](*sizes, *flat[1:])


def _while_loop(bodies: list[Any], sizes: list[Any], flat: list[Any], carried: int) -> Any:
    state, more = tuple(flat[:carried]), flat[carried:]
    while bool(bodies[0](*sizes, *state, *more)[0]):
        state = tuple(bodies[1](*sizes, *state, *more))
    return state


def _scan(
    bodies: list[Any], sizes: list[Any], flat: list[Any], init: int, xs: int, reverse: bool
) -> Any:
    state, columns, more = list(flat[:init]), flat[init : init + xs], flat[init + xs :]
    outputs: list[list[Any]] = []
    steps = range(columns[0].shape[0])
    for i in reversed(steps) if reverse else steps:
        out = bodies[0](*sizes, *state, *(x[i] for x in columns), *more)
        state = list(out[:init])
        outputs.append(list(out[init:]))
    if reverse:
        outputs.reverse()
    return (*state, *(torch.stack(c) for c in zip(*outputs, strict=True)))


def _map(bodies: list[Any], sizes: list[Any], flat: list[Any], xs: int) -> Any:
    rows = [
        bodies[0](*sizes, *(x[i] for x in flat[:xs]), *flat[xs:]) for i in range(flat[0].shape[0])
    ]
    return tuple(torch.stack(c) for c in zip(*rows, strict=True))


_CONTROL: dict[str, Callable[..., Any]] = {
    "torch.cond": _cond,
    "torch.while_loop": _while_loop,
    "torch.scan": _scan,
    "torch.map": _map,
}
