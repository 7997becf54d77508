"""Writing ONNX nodes: typed values, shared constants, and one `Call` per op to translate.

A `Call` is what a translation sees of a graph node: operands as ONNX values, attributes, and the
result types that must come out. The same record serves nodes of the graph, nodes of a traced
decomposition, and a node whose half-precision operands were widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from onnxscript import ir

from dfc.emit.onnx_types import ONNX_DTYPES, np_array, onnx_dtype, onnx_shape, propagate_dtype
from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Loc
from dfc.ir.types import DTYPES, DType, TensorType, Type

if TYPE_CHECKING:
    from dfc.emit.onnx_sizes import Sizes

Val = ir.Value
Operand = Val | None | tuple[Val | None, ...]


class NoTranslation(Exception):
    """This translation does not cover the call: the next way is tried. The reason is kept."""


@dataclass(frozen=True)
class Call:
    """One op to translate."""

    op: str
    operands: tuple[Operand, ...]
    attributes: Mapping[str, Any]
    results: tuple[Type, ...]
    loc: Loc | None = None
    graph_node: Any = None  # the graph's node, for control flow and declared ops

    @property
    def values(self) -> Iterable[Val]:
        for x in self.operands:
            if isinstance(x, tuple):
                yield from (v for v in x if v is not None)
            elif x is not None:
                yield x

    @property
    def result(self) -> TensorType:
        """The only result's type, or the first's."""
        type = self.results[0]
        assert isinstance(type, TensorType)
        return type

    def widened(self, operands: tuple[Operand, ...], table: Mapping[str, str]) -> Call:
        """The call with other operands and its half-precision types replaced."""

        def wide(x: Any) -> Any:
            if isinstance(x, DType):
                return DTYPES[table.get(x.name, x.name)]
            if isinstance(x, TensorType):
                return x.with_dtype(wide(x.dtype))
            return table.get(x, x) if isinstance(x, str) else x  # ours name their dtype

        return replace(
            self,
            operands=operands,
            attributes={k: wide(v) for k, v in self.attributes.items()},
            results=tuple(wide(t) for t in self.results),
        )


class Root:
    """What all scopes of one model share: constants, names, the opset.

    `contrib` says whether ONNX Runtime's own operators may be used, `saturates` whether sums of two
    8-bit products must fit 16 bits.
    """

    def __init__(self, opset: int, contrib: bool = False, saturates: bool = True) -> None:
        self.opset = opset
        self.contrib = contrib
        self.saturates = saturates
        self.domains: dict[str, int] = {"": opset}
        self.ranges: Mapping[str, tuple[int, int | None]] = {}
        self.constants: dict[tuple[Any, ...], Val] = {}
        # Constants made of parameters when the model is written, and the parameters: those that
        # nothing else reads are left out.
        self.derived: dict[tuple[Val, str], Val] = {}
        self.constant_nodes: list[ir.Node] = []
        self.names: set[str] = set()
        self.functions: dict[Any, Any] = {}
        self.random = False
        self._counts: dict[str, int] = {}

    def claim(self, wish: str) -> str:
        """The wish, or the wish with a number, never given out before."""
        if wish not in self.names:
            self.names.add(wish)
            return wish
        n = self._counts.get(wish, 0) + 1
        while f"{wish}_{n}" in self.names:
            n += 1
        self._counts[wish] = n
        self.names.add(f"{wish}_{n}")
        return f"{wish}_{n}"


class Builder:
    """Writes the nodes of one ONNX graph: the model's, or a branch's or a loop body's."""

    def __init__(self, root: Root, sizes: Sizes, parent: Builder | None = None) -> None:
        self.root = root
        self.sizes = sizes
        self.parent = parent
        self.nodes: list[ir.Node] = []
        self.shared: dict[Any, Any] = {}
        self.call: Call | None = None

    # types

    def type(self, x: Val) -> TensorType:
        """The type of an operand: a complex one without its trailing 2."""
        found = x.meta.get("type")
        assert isinstance(found, TensorType), f"{x.name} has no tensor type"
        return found

    def rank(self, x: Val) -> int:
        return self.type(x).rank

    def is_complex(self, x: Val) -> bool:
        found = x.meta.get("type")
        return isinstance(found, TensorType) and found.dtype.is_complex

    def retype(self, x: Val, type: Type) -> Val:
        """Say what a new value is; an old one stays as it is."""
        if "type" not in x.meta:
            x.meta["type"] = type
            x.shape = onnx_shape(type)
            if x.dtype is None:
                x.dtype = onnx_dtype(type)
        return x

    # nodes

    def value(self) -> Val:
        from dfc.emit.onnx_torchlib import symbolic_value

        return symbolic_value(self.root.opset)

    @overload
    def op(self, kind: str, *inputs: Any, out: int, **attrs: Any) -> list[Val]: ...

    @overload
    def op(
        self, kind: str, *inputs: Any, dtype: ir.DataType | None = None, **attrs: Any
    ) -> Val: ...

    def op(
        self, kind: str, *inputs: Any, dtype: ir.DataType | None = None, out: int = 1, **attrs: Any
    ) -> Any:
        """Append a node. Python integers and lists of them become int64 constants.

        Numbers next to a float tensor must be made by `like` or `const`.
        """
        return self._node("", kind, inputs, dtype, out, attrs)

    def contrib(
        self, kind: str, *inputs: Any, out: int = 1, unused: Sequence[int] = (), **attrs: Any
    ) -> Any:
        """Append a node of ONNX Runtime's own; outputs have the first input's element type.

        `unused` outputs stay without a name: the kernel does not compute them.
        """
        assert self.root.contrib, f"{kind} in a model of standard operators"
        self.root.domains["com.microsoft"] = 1
        found = self._node("com.microsoft", kind, inputs, inputs[0].dtype, out, attrs)
        for i in unused:
            found[i].name = ""
        return found

    def _node(
        self, domain: str, kind: str, inputs: Sequence[Any], dtype: ir.DataType | None, out: int,
        attrs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        given = [self.lift(x) for x in inputs]
        while given and given[-1] is None:
            given.pop()
        outputs = [self.value() for _ in range(out)]
        attributes = [
            ir.convenience.convert_attribute(k, v) for k, v in attrs.items() if v is not None
        ]
        node = ir.Node(domain, kind, given, attributes, outputs=outputs)
        self.append(node)
        if dtype is not None:
            for o in outputs if domain else outputs[:1]:
                o.dtype = dtype
        return outputs[0] if out == 1 else outputs

    def append(self, node: ir.Node) -> None:
        """Take in a node, and tell the element types of its outputs where they are known."""
        propagate_dtype(node)
        self.nodes.append(node)

    def lift(self, x: Any) -> Val | None:
        if x is None or isinstance(x, ir.Value):
            return x
        if isinstance(x, np.ndarray):
            return self.array(x)
        if isinstance(x, Expr):
            return self.sizes.scalar(self, x)
        if isinstance(x, bool):
            return self.array(np.array(x))
        if isinstance(x, int):
            return self.array(np.array(x, np.int64))
        if isinstance(x, (list, tuple)) and all(type(i) is int for i in x):
            return self.array(np.array(x, np.int64))
        if isinstance(x, (list, tuple)):
            return self.sizes.vector(self, x)
        raise TypeError(f"a {type(x).__name__} needs an element type: use `const`")

    def array(self, x: np.ndarray[Any, Any], dtype: ir.DataType | None = None) -> Val:
        """A constant, shared by dtype, shape and bits."""
        x = np.ascontiguousarray(x).reshape(x.shape)
        dtype = dtype or ir.DataType.from_numpy(x.dtype)
        key = (dtype, x.shape, x.tobytes())
        found = self.root.constants.get(key)
        if found is None:
            tensor = ir.Tensor(x, dtype=dtype)
            found = self.value()
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[found])
            found.dtype = dtype
            found.shape = ir.Shape(x.shape)
            found.name = self.root.claim(_constant_name(x))
            found.const_value = tensor
            node.name = found.name
            self.root.constants[key] = found
            self.root.constant_nodes.append(node)
        return found

    def const(self, x: Any, dtype: ir.DataType) -> Val:
        """A constant number or nested list of an element type; a size expression is cast to it."""
        if isinstance(x, Expr):
            value = self.sizes.scalar(self, x)
            return value if value.dtype == dtype else self.op("Cast", value, to=dtype)
        if isinstance(x, ir.Value):
            return x
        return self.array(np_array(x, dtype), dtype)

    def like(self, x: Any, other: Val) -> Val:
        """A constant of another value's element type."""
        assert other.dtype is not None, f"{other.name} has no dtype"
        return self.const(x, other.dtype)

    def cast(self, x: Val, dtype: ir.DataType) -> Val:
        """The value in an element type; nothing where it has it already."""
        if x.dtype == dtype:
            return x
        return self.op("Cast", x, to=dtype)

    def cast_to(self, x: Val, dtype: DType) -> Val:
        return self.cast(x, ONNX_DTYPES[dtype.name])

    def derived(self, x: Val, name: str, make: Callable[[Any], Any]) -> Val | None:
        """What a function makes of a parameter's tensor, as a constant; None of what is computed.

        A parameter in half precision is seen through the cast that widened it.
        Why:  kernels that pack their weights want constants even where no optimizer folds them.
        """
        from dfc.emit.onnx_values import torch_tensor

        x = _before_cast(x)
        raw = getattr(x.const_value, "raw", None)
        if type(raw).__module__.partition(".")[0] != "torch":
            return None
        found = self.root.derived.get((x, name))
        if found is None:
            tensor = make(raw)
            found = self.root.derived[x, name] = self.value()
            found.name = self.root.claim(f"{x.name}.{name}")
            found.const_value = torch_tensor(tensor, found.name)
            found.dtype = found.const_value.dtype
            self.retype(found, TensorType.of(tensor))
        return found

    # small pictures that many translations are made of

    def reshape(self, x: Val, shape: Sequence[Any]) -> Val:
        """Reshape to sizes, -1 for what is left."""
        zero = 1 if any(type(s) is int and s == 0 for s in shape) else None
        return self.op("Reshape", x, self.sizes.vector(self, shape), allowzero=zero)

    def squeeze(self, x: Val, *axes: int) -> Val:
        return self.op("Squeeze", x, list(axes))

    def unsqueeze(self, x: Val, *axes: int) -> Val:
        return self.op("Unsqueeze", x, list(axes))

    def transpose(self, x: Val, perm: Sequence[int]) -> Val:
        if list(perm) == list(range(len(perm))):
            return x
        return self.op("Transpose", x, perm=list(perm))

    def slice(self, x: Val, axis: int, start: Any, end: Any, step: int = 1) -> Val:
        return self.op("Slice", x, self.vec(start), self.vec(end), [axis], [step])

    def vec(self, x: Any) -> Val:
        """A size as a tensor of one element."""
        if isinstance(x, ir.Value):
            return self.reshape(x, [1])
        return self.sizes.vector(self, [x])

    def dim(self, x: Val, axis: int) -> Any:
        """A size of an operand: a number or an expression."""
        return self.type(x).shape[axis]

    def shape(self, x: Val) -> Val:
        return self.op("Shape", x)

    def expand(self, x: Val, shape: Sequence[Any]) -> Val:
        return self.op("Expand", x, self.sizes.vector(self, shape))

    def arange(self, n: Any) -> Val:
        """0, 1, .. n - 1 as int64."""
        if isinstance(n, int):
            return self.array(np.arange(n, dtype=np.int64))
        key = ("arange", n)
        found = self.lookup(key)
        if found is None:
            found = self.shared[key] = self.op("Range", 0, self.sizes.scalar(self, n), 1)
        assert isinstance(found, ir.Value)
        return found

    def lookup(self, key: Any) -> Any:
        """What this scope or one around it has already computed."""
        scope: Builder | None = self
        while scope is not None:
            if key in scope.shared:
                return scope.shared[key]
            scope = scope.parent
        return None

    def is_inf(self, x: Val) -> Val:
        """Whether elements are minus infinity."""
        return self.op("Equal", x, self.like(float("-inf"), x))

    def attention(
        self, query: Val, key: Val, value: Val, mask: Val | None, scale: float | None,
        is_causal: bool, heads: tuple[int, int],
    ) -> Val | None:  # fmt: skip
        """ONNX's Attention over heads that lie in the last dimension; None where it cannot be."""
        from dfc.emit.onnx_ops.attention import fused_attention

        return fused_attention(self, query, key, value, mask, scale, is_causal, heads)

    def refuse(self, reason: str) -> DfcError:
        """The error for a call that no ONNX model can express."""
        call = self.call
        assert call is not None
        notes = (f"traced from {call.loc}",) if call.loc else ()
        return DfcError("X001", f"`{call.op}` has no ONNX translation: {reason}", notes=notes)

    def scope(self) -> Builder:
        """A builder for a nested graph."""
        return Builder(self.root, self.sizes.nested(), self)


def _before_cast(x: Val) -> Val:
    """The parameter that a cast widened; any other value as it is."""
    node = x.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return x if source is None or source.const_value is None else source


def _constant_name(x: np.ndarray[Any, Any]) -> str:
    if x.size == 1 and x.dtype.kind in "iub":
        return f"c_{x.reshape(-1)[0].item()}".replace("-", "m")
    return "c"
