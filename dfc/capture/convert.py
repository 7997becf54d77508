"""torch.export's fx graph to a dfc graph: operators become nodes, size arithmetic vanishes.

Every int, float or bool that torch computes from shapes becomes an expression inside types and
attributes. Only what depends on data (`item`, `nonzero`) stays a node, and binds a symbol.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from dfc.capture.names import Names
from dfc.capture.places import user_frame
from dfc.errors import DfcError
from dfc.ir.expr import Expr, Scalar, call, symbol, symbols
from dfc.ir.gradients import carries_gradient
from dfc.ir.graph import Bind, Graph, Input, Loc, Parameter, ParameterData, Value
from dfc.ir.op import lookup
from dfc.ir.types import DTYPES, FLOAT, INT, TensorType, Type, dtype_of
from dfc.ops.aten import ASSERTIONS, AtenOp, complete
from dfc.ops.symbolic import identifier

__all__ = ["Converter", "Names", "refuse_leaked"]

# Another spelling of the same value, once sizes and layouts are out of the picture.
_SAME_AS_INPUT = frozenset(
    [
        "alias",
        "alias_copy",
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "detach",
        "detach_",
        "contiguous",
        "resolve_conj",
        "resolve_neg",
    ]
)
_SKIPPED = frozenset(
    {
        "is_same_size",
        "_has_same_storage_numel",
        "_assert_tensor_metadata",
        "sym_constrain_range_for_size",
        "sym_constrain_range",
    }
)
_RENAMED = {
    "aten._unsafe_view.default": "aten.view.default",
    "aten.reshape.default": "aten.view.default",
}


class Converter:
    """Converts one fx graph; nested graphs get a converter of their own that shares the names."""

    def __init__(self, graph: Graph, module: fx.GraphModule, names: Names) -> None:
        self.graph = graph
        self.module = module
        self.names = names
        self.env: dict[fx.Node, Any] = {}
        self._counts: dict[str, int] = {}
        self._locations: dict[str, tuple[str, int]] = {}

    # names and places

    def name(self, wish: str) -> str:
        base = re.sub(r"(_\d+)+\Z", "", identifier(wish)) or "v"
        while True:
            n = self._counts.get(base, 0)
            self._counts[base] = n + 1
            name = f"{base}_{n}" if n else base
            if name not in self.graph._names:
                return name

    def location(self, node: fx.Node) -> Loc | None:
        trace = node.meta.get("stack_trace") or ""
        place = self._locations.get(trace)
        if place is None:
            place = self._locations[trace] = user_frame(trace)
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        path = path.split("@")[0]
        path = "" if path.startswith("_empty_nn") else path.removeprefix("L['self']").lstrip(".")
        return Loc(place[0], place[1], path) if place[0] or path else None

    # reading fx arguments

    def scalar_or_none(self, x: Any) -> Any:
        """The constant or expression behind an fx argument; NotImplemented for tensors."""
        if isinstance(x, fx.Node):
            found = self.env[x]
            if isinstance(found, (Value, tuple)):
                return NotImplemented
            return found
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.names.scalar(x)
        return x

    def operand(self, x: Any) -> Input:
        if x is None:
            return None
        if isinstance(x, (list, tuple)):
            return tuple(self.single(v) for v in x)
        return self.single(x)

    def single(self, x: Any) -> Value | None:
        if x is None:
            return None
        found = self.env[x] if isinstance(x, fx.Node) else x
        if isinstance(found, Value):
            return found
        if isinstance(found, (int, float, bool, Expr)):
            return self.scalar_value(found)
        raise DfcError("T021", f"`{x}` cannot be an operand")

    def scalar_value(self, x: Scalar) -> Value:
        """A number as a value, where an op wants one: control flow, lists of tensors."""
        return self.graph.add("torch.scalar", [], {"value": x}, names=[self.name("scalar")]).result

    def constant(self, x: Any) -> Any:
        """An attribute."""
        if isinstance(x, (list, tuple)):
            return tuple(self.constant(v) for v in x)
        if isinstance(x, torch.dtype):
            return dtype_of(x)
        x = self.scalar_or_none(x)
        if x is NotImplemented:
            raise DfcError("T021", "a tensor stands where a number is needed")
        if isinstance(x, (torch.device, torch.layout, torch.memory_format)):
            return None
        return x

    # converting

    def convert(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            if node.op in ("placeholder", "output") or node in self.env:
                continue
            try:
                self.env[node] = self.node(node)
            except DfcError as e:
                place = self.location(node)
                if place and not any("traced from" in n for d in e.diagnostics for n in d.notes):
                    raise DfcError(
                        e.code,
                        e.message,
                        help=e.diagnostics[0].help,
                        notes=(*e.diagnostics[0].notes, f"traced from {place}"),
                    ) from e
                raise

    def node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.attribute_tensor(node)
        target = node.target
        if target is operator.getitem:
            of, index = cast(Any, node.args)
            source = self.env[of]
            return source[index] if isinstance(source, tuple) else source
        if isinstance(target, torch._ops.HigherOrderOperator):
            from dfc.capture.control_flow import higher_order

            return higher_order(self, node, target)
        value = node.meta.get("val")
        bound = node.meta.get("unbacked_bindings")
        is_number = isinstance(
            value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
        )
        if is_number and not bound:
            known = self.names.scalar(value)
            if reads_tensor(node) and not (self.read_before(node) or self.is_constant(node)):
                return self.specialised(node, known)
            return known
        if not isinstance(target, torch._ops.OpOverload):
            raise DfcError("T022", f"`{target}` has no place in a graph")
        return self.operator(node, target)

    def read_before(self, node: fx.Node) -> bool:
        """Whether the same `x.item()` stands earlier."""
        users = cast(fx.Node, node.args[0]).users
        return any(u in self.env and reads_tensor(u) for u in users)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether what is read is made of the model's own numbers alone."""
        todo, seen = [self.env[cast(fx.Node, node.args[0])]], set()
        while todo:
            v = todo.pop()
            if v.node is None:
                if not (isinstance(v, Parameter) and v.kind == "constant"):
                    return False
            elif not v.node.pure:
                return False
            elif v.node not in seen:
                seen.add(v.node)
                todo += v.node.operands
        return True

    def specialised(self, node: fx.Node, value: Scalar) -> Scalar:
        """Keep the number as it was traced, or as `torch._check` says that it is, and check at run
        time that it is so.

        Why:  torch puts what a check says in place of the number, and its own assertions then hold
              whatever the data are.
        """
        traced = node.meta["val"]
        source = self.env[node.args[0]]  # type: ignore[index]
        loc = self.location(node)
        is_bool = source.tensor_type.dtype == DTYPES["bool"] and value in (0, 1)
        expected = bool(value) if is_bool else int(value) if isinstance(value, bool) else value
        message = (
            f"the model was traced for {expected} here, and decides by it"
            if isinstance(traced, (int, float))
            else f"the model takes it that this is {expected}"
        )
        if is_bool:
            self.assert_tensor(source, bool(expected), message, loc)
            return value
        is_float = isinstance(traced, (float, torch.SymFloat))
        name = self.names.fresh("uf" if is_float else "u")
        self.graph.add(
            "aten._local_scalar_dense.default",
            [source],
            {},
            types=(FLOAT if is_float else INT,),
            names=[self.name("item")],
            binds=(Bind(name),),
            loc=loc,
        )
        self.graph.add(
            "aten._assert_scalar.default",
            [],
            {"self": call("eq", symbol(name), expected), "assert_msg": message},
            types=(),
            loc=loc,
        )
        return value

    def assert_tensor(self, tensor: Value, holds: bool, message: str, loc: Loc | None) -> None:
        """Check at run time that a tensor of one bool holds, or that it does not."""
        if not holds:
            tensor = self.graph.add(
                "aten.logical_not.default", [tensor], names=[self.name("logical_not")], loc=loc
            ).result
        self.graph.add(
            "aten._assert_async.msg", [tensor], {"assert_msg": message}, types=(), loc=loc
        )

    def attribute_tensor(self, node: fx.Node) -> Any:
        owner: Any = self.module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        if isinstance(owner, fx.GraphModule):
            return owner
        if isinstance(owner, torch.Tensor):
            return self.lifted(str(node.target), owner)
        raise DfcError("T021", f"`{node.target}` is a {type(owner).__name__}")

    def lifted(self, name: str, tensor: torch.Tensor) -> Value:
        from dfc.ir.weights import TensorData

        known = self.graph.parameters.get(name)
        if known is not None:
            return known
        refuse_leaked(name, tensor)
        data: ParameterData = TensorData(name, tensor)
        type = self.names.type_of(tensor)
        assert isinstance(type, TensorType)
        return self.graph.add_parameter(name, type, "constant", data)

    def operator(self, node: fx.Node, target: torch._ops.OpOverload) -> Any:
        namespace, _, base = target._schema.name.partition("::")
        if namespace == "aten" and base in _SKIPPED:
            return None
        if base == "_assert_scalar" and node.args:
            holds = self.scalar_or_none(node.args[0])
            if holds is True or symbols(holds) & self.names.places:
                return None
        if base in _SAME_AS_INPUT and namespace == "aten":
            source = self.env[node.args[0]]  # type: ignore[index]
            return self.stopped(source, node) if base == "detach" else source
        overload = target._overloadname
        name = f"{namespace}.{base}.{overload}"
        arguments = list(target._schema.arguments)
        given: dict[str, Any] = dict(zip((a.name for a in arguments), node.args, strict=False))
        given.update(node.kwargs)
        if base in ("to", "_to_copy", "type_as"):
            return self.change_dtype(node, given)
        name = _RENAMED.get(name, name)
        if name == "aten.view.default" and "shape" in given:
            given["size"] = given.pop("shape")
        info = self.lookup(name)
        if info.mutable:
            raise DfcError("T022", f"`{name}` writes to its argument and was not functionalised")
        if given.get("generator") is not None:
            raise DfcError("T022", f"`{name}` draws from a generator object of its own")
        return self.emit(node, info, given)

    def stopped(self, value: Value, node: fx.Node) -> Value:
        """The value without its gradient: a node of its own only where there would be one."""
        if not carries_gradient(value):
            return value
        return self.graph.add(
            "aten.detach.default", [value], types=[value.type], names=[self.name("detach")],
            loc=self.location(node),
        ).result  # fmt: skip

    def change_dtype(self, node: fx.Node, given: Mapping[str, Any]) -> Any:
        """Every change of dtype is `_to_copy`; a change of device or layout is none."""
        source = self.env[given["self"]]
        wanted = given.get("dtype")
        if wanted is None and isinstance(given.get("other"), fx.Node):
            wanted = self.env[given["other"]].tensor_type.dtype.to_torch()
        if wanted is None or dtype_of(wanted) == source.tensor_type.dtype:
            return source
        info = self.lookup("aten._to_copy.default")
        return self.emit(node, info, {"self": given["self"], "dtype": wanted})

    def lookup(self, name: str) -> AtenOp:
        from dfc.ir.op import register_namespace
        from dfc.ops import aten

        namespace = name.partition(".")[0]
        if namespace not in ("aten", "prims"):  # a custom library that the process has loaded
            register_namespace(namespace, aten._resolve, aten._names)
        info = lookup(name)
        assert isinstance(info, AtenOp)
        return info

    def emit(self, node: fx.Node, info: AtenOp, given: Mapping[str, Any]) -> Any:
        number = self.number_operand(info, given)
        name = info.name
        if number and number in given:
            info, given = self.scalar_overload(info, given, number)
            name = info.name
        inputs: list[Input] = []
        attributes: dict[str, Any] = {}
        for o in info.operands:
            x = given.get(o.name)
            scalar = NotImplemented if isinstance(x, (list, tuple)) else self.scalar_or_none(x)
            if x is None or scalar is NotImplemented or o.variadic:
                inputs.append(self.operand(x) if x is not None else None)
            else:
                inputs.append(None)
                attributes[o.name] = scalar
        for a in info.attributes:
            if a.name in given:
                attributes[a.name] = self.constant(given[a.name])
        full = complete(info, attributes)
        values = node.meta.get("val")
        assertion = info.name.split(".")[1] in ASSERTIONS
        types, as_list = self.result_types(values, node)
        binds = self.binds(node)
        made = self.graph.add(
            name,
            inputs,
            full,
            types=() if assertion else types,
            names=[self.name(node.name) for _ in types],
            binds=binds,
            loc=self.location(node),
        )
        if assertion:
            return None
        if isinstance(values, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.names.scalar(values)
        return made.results if as_list else made.result

    def number_operand(self, info: AtenOp, given: Mapping[str, Any]) -> str | None:
        """The last tensor operand when a Python number stands in its place."""
        for o in info.operands[1:]:
            if o.variadic:
                return None
            x = given.get(o.name)
            if x is not None and self.scalar_or_none(x) is not NotImplemented:
                return o.name
        return None

    def scalar_overload(
        self, info: AtenOp, given: Mapping[str, Any], operand: str
    ) -> tuple[AtenOp, Mapping[str, Any]]:
        """`add.Tensor(x, 2)` is `add.Scalar(x, other=2)` where that overload exists."""
        namespace, base, overload = info.name.split(".")
        wish = {"Tensor": "Scalar", "Tensor_mode": "Scalar_mode", "Tensor_Tensor": "Tensor_Scalar"}
        found = wish.get(overload)
        if found and operand == "other":
            from dfc.ops.aten import _resolve

            other = _resolve(f"{namespace}.{base}.{found}")
            if isinstance(other, AtenOp) and any(a.name == operand for a in other.attributes):
                return other, given
        return info, given

    def result_types(self, values: Any, node: fx.Node) -> tuple[tuple[Type, ...], bool]:
        if isinstance(values, (tuple, list)):
            flat: list[Any] = []
            for v in values:
                flat.extend(v if isinstance(v, (tuple, list)) else (v,))
            self.new_symbols(node)
            return tuple(self.names.type_of(v) for v in flat), True
        self.new_symbols(node)
        return (self.names.type_of(values),), False

    def new_symbols(self, node: fx.Node) -> None:
        """Name the symbols that this node binds, before types mention them."""
        for s, path in (node.meta.get("unbacked_bindings") or {}).items():
            if s in self.names.known:
                continue
            if _is_place(path):
                place = f"place_{s}"
                self.names.places.add(place)
                self.names.add(s, place)
                continue
            prefix = "uf" if str(s).startswith("zuf") else "u"
            self.names.add(s, self.names.fresh(prefix))

    def binds(self, node: fx.Node) -> tuple[Bind, ...]:
        found = []
        for s in node.meta.get("unbacked_bindings") or {}:
            known = self.names.known[s]
            name = known.symbol if isinstance(known, Expr) else None
            if name is None or name in self.names.places:
                continue
            low, high = self.names.ranges.get(str(s), (-(2**63), None))
            found.append(Bind(name, low, high))
        return tuple(found)


def reads_tensor(node: fx.Node) -> bool:
    """Whether this is `x.item()`."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in (
        "aten::item",
        "aten::_local_scalar_dense",
    )


def _is_place(path: Sequence[Any]) -> bool:
    """Whether an unbacked symbol is the result's place in memory, not one of its sizes."""
    return getattr(path[-1], "name", None) == "storage_offset" if path else False


def refuse_leaked(name: str, tensor: torch.Tensor) -> None:
    """Refuse a constant that is a value of the tracing itself.

    Raises:  DfcError T023 for fake tensors and functorch's wrappers.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if wrapped or not plain:
        raise DfcError(
            "T023",
            f"`{name}` became a constant of type {type(tensor).__name__} while tracing",
            help="a value computed inside an autograd or vmap transform leaked out of it",
        )
