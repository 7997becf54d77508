"""What an op is: names, operands, attributes, type rule and meaning; and where ops are looked up.

`OpInfo` is what the graph, the verifier and the interpreter ask of every op. Declared `dfc.*` ops
give it by subclassing `Op`; `aten.*` ops give it wholesale (dfc/ops/aten.py).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dfc.errors import DfcError, did_you_mean
from dfc.ir.expr import Size
from dfc.ir.types import NONE, TensorType, Type

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Node, Value


@dataclass(frozen=True)
class Operand:
    """One operand of an op: `Tensor`, `Tensor?`, `Tensor[]` or `Tensor?[]`."""

    name: str
    optional: bool = False
    variadic: bool = False


REQUIRED = object()  # the default of an attribute that has none


@dataclass(frozen=True)
class Attribute:
    """One attribute: its name, and its default where it has one."""

    name: str
    default: object = REQUIRED


class OpInfo(Protocol):
    """What every op tells about itself."""

    @property
    def name(self) -> str: ...
    @property
    def operands(self) -> Sequence[Operand]: ...
    @property
    def attributes(self) -> Sequence[Attribute]: ...
    def is_pure(self, attributes: Mapping[str, Any]) -> bool:
        """Equal inputs give equal outputs and nothing else happens."""
        ...

    def has_effect(self, attributes: Mapping[str, Any]) -> bool:
        """The node must stay even when nobody uses its results."""
        ...

    def infer(self, node: Node) -> tuple[Type, ...]:
        """The result types that the node's operands and attributes imply."""
        ...

    def run(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str = "cpu"
    ) -> tuple[Any, ...]:
        """The results on concrete tensors, sizes already numbers.

        `device` is where ops without a tensor operand create their result.
        """
        ...


_NAMESPACES: dict[str, Callable[[str], OpInfo | None]] = {}
_NAMES: dict[str, Callable[[], Sequence[str]]] = {}


def register_namespace(
    prefix: str,
    resolve: Callable[[str], OpInfo | None],
    names: Callable[[], Sequence[str]],
) -> None:
    """Say who knows the ops whose name starts with `prefix.`."""
    _NAMESPACES[prefix] = resolve
    _NAMES[prefix] = names
    lookup.cache_clear()


@cache
def lookup(name: str) -> OpInfo:
    """The op of this name.

    Raises:  DfcError V010 when no op has it.
    """
    prefix = name.partition(".")[0]
    resolve = _NAMESPACES.get(prefix)
    found = resolve(name) if resolve else None
    if found is not None:
        return found
    known = list(_NAMES[prefix]()) if prefix in _NAMES else [f"{p}." for p in _NAMESPACES]
    raise DfcError("V010", f"unknown op `{name}`", help=did_you_mean(name, known), status=2)


class OpRefused(ValueError):
    """A constraint of an op does not hold: its label and why."""

    def __init__(self, op: str, label: str, reason: str) -> None:
        super().__init__(f"{op} {label}: {reason}")
        self.label = label


@dataclass(frozen=True)
class Cost:
    """What one application of an op takes at least; sizes may be symbolic.

    Units:  flops are additions, multiplications and calls of exp, erf and the like, each one;
            bytes are those of operands and results, moved once.
    """

    flops: Size
    bytes_read: Size
    bytes_written: Size


class Op:
    """A declared op: a frozen dataclass whose fields are the attributes.

    Every facet takes the operands in the same order; an operand with the default None is optional.
    `decompose` writes the op in terms of others; without it the op is primitive. An op may say how
    it is written in ONNX: `to_onnx(b, *values)` with the builder of dfc/emit/onnx_builder.py; where
    that gives None, and without it, ONNX gets the decomposition.
    """

    name: ClassVar[str]
    cases: ClassVar[tuple[str, ...]]
    rejects: ClassVar[tuple[str, ...]] = ()

    def require(self, label: str, holds: object, reason: str) -> None:
        """Refuse operands for which a numbered constraint does not hold."""
        if not holds:
            raise OpRefused(self.name, label, reason)

    # `infer`, `reference` and the others have a signature of their own in each op: its operands.
    infer: ClassVar[Callable[..., TensorType | tuple[TensorType, ...]]]
    reference: ClassVar[Callable[..., Tensor | tuple[Tensor, ...]]]
    decompose: ClassVar[Callable[..., Value | tuple[Value, ...]]]
    cost: ClassVar[Callable[..., Cost]]


@dataclass(frozen=True)
class DeclaredOp:
    """An `Op` class seen as an `OpInfo`."""

    cls: type[Op]

    @property
    def name(self) -> str:
        return f"dfc.{self.cls.name}"

    @property
    def operands(self) -> tuple[Operand, ...]:
        return _operands(self.cls)  # type: ignore[arg-type]  # mypy takes a class for its instances

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        return tuple(
            Attribute(f.name, REQUIRED if f.default is dataclasses.MISSING else f.default)
            for f in dataclasses.fields(self.cls)  # type: ignore[arg-type]
        )

    def is_pure(self, attributes: Mapping[str, Any]) -> bool:
        return True

    def has_effect(self, attributes: Mapping[str, Any]) -> bool:
        return False

    def instance(self, attributes: Mapping[str, Any]) -> Op:
        return self.cls(**attributes)

    def infer(self, node: Node) -> tuple[Type, ...]:
        types = [
            None
            if v is None
            else tuple(w and w.type for w in v)
            if isinstance(v, tuple)
            else v.type
            for v in node.inputs
        ]
        found = self.instance(node.attributes).infer(*types)
        results = found if isinstance(found, tuple) else (found,)
        return tuple(NONE if t is None else t for t in results)

    def run(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str = "cpu"
    ) -> tuple[Any, ...]:
        found = self.instance(attributes).reference(*operands)
        return found if isinstance(found, tuple) else (found,)


@cache
def _operands(cls: type[Op]) -> tuple[Operand, ...]:
    parameters = list(inspect.signature(cls.infer).parameters.values())[1:]
    return tuple(Operand(p.name, optional=p.default is None) for p in parameters)


_DECLARED: dict[str, DeclaredOp] = {}


def declare(cls: type[Op]) -> type[Op]:
    """Class decorator: make a declared op known under `dfc.<name>`.

    Raises:  TypeError when the declaration itself is malformed.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
        raise TypeError(f"op {cls.__name__} must be a frozen dataclass")
    for field in ("cases", "rejects"):
        if not isinstance(getattr(cls, field), tuple):
            raise TypeError(f"{cls.__name__}.{field} must be a tuple of strings")
    _DECLARED[f"dfc.{cls.name}"] = DeclaredOp(cls)
    lookup.cache_clear()
    return cls


def declared_ops() -> tuple[DeclaredOp, ...]:
    """Every declared op, by name."""
    return tuple(_DECLARED[name] for name in sorted(_DECLARED))


register_namespace("dfc", _DECLARED.get, lambda: sorted(_DECLARED))
