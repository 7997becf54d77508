"""What an op is: names, operands, attributes, type rule and meaning; and where ops are looked up.

`OpInfo` is what the graph, the verifier and the interpreter ask of every op. Declared `dfc.*` ops
give it by subclassing `Op`; `aten.*` ops give it wholesale (dfc/ops/aten.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from dfc.errors import DfcError, did_you_mean
from dfc.ir.expr import Size
from dfc.ir.types import NONE, TensorType, Type
from dfc.origin import Origin, origin_of
from dfc.registry import plugins

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


# What an op may run in when a pass casts to 16 bits: "half" gains from it, "follow" takes the type
# of its inputs, "f32" stays.
Precision = Literal["half", "follow", "f32"]


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


ANY = "*"  # the prefix of who is asked for all others
_NAMESPACES: dict[str, Callable[[str], OpInfo | None]] = {}
_NAMES: dict[str, Callable[[], Sequence[str]]] = {}


def register_namespace(
    prefix: str,
    resolve: Callable[[str], OpInfo | None],
    names: Callable[[], Sequence[str]],
) -> None:
    """Say who knows the ops whose name starts with `prefix.`, or with what nobody else knows."""
    _NAMESPACES[prefix] = resolve
    _NAMES[prefix] = names
    lookup.cache_clear()


@cache
def lookup(name: str) -> OpInfo:
    """The op of this name.

    Raises:  DfcError V010 when no op has it.
    """
    prefix = name.partition(".")[0]
    found = _resolved(name, prefix)
    if found is None and _load_package(name, prefix):
        found = _resolved(name, prefix)
    if found is not None:
        return found
    others = [f"{p}." for p in _NAMESPACES if p != ANY]
    known = list(_NAMES[prefix]()) if prefix in _NAMES else others
    help = did_you_mean(name, known)
    if help is None and prefix not in ("aten", "torch", "prims"):
        help = "an op of yours is brought by `--use FILE.py`, or by importing its module"
    raise DfcError("V010", f"unknown op `{name}`", help=help, status=2)


def _resolved(name: str, prefix: str) -> OpInfo | None:
    resolve = _NAMESPACES.get(prefix, _NAMESPACES.get(ANY))
    return resolve(name) if resolve else None


def _load_package(name: str, prefix: str) -> bool:
    """Import the packages whose entry points of the group `dfc.ops` are this op, or its namespace.

    Raises:  DfcError Q041 when one does not load.
    """
    offers = [p for p in plugins("dfc.ops") if p.name in (name, prefix)]
    for plugin in offers:
        plugin.load()
    return bool(offers)


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
    # Whether the op unpacks constants: computing it at compile time would undo what packed them.
    unpacks: ClassVar[bool] = False
    precision: ClassVar[Precision] = "f32"

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
        return full_name(self.cls)

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


def full_name(cls: type[Op]) -> str:
    """`dfc.swiglu` of a class that calls itself `swiglu`; another namespace stays as it is."""
    return cls.name if "." in cls.name else f"dfc.{cls.name}"


_DECLARED: dict[str, DeclaredOp] = {}
_ORIGINS: dict[str, Origin] = {}


def declare(cls: type[Op], origin: Origin | None = None) -> type[Op]:
    """Class decorator: make a declared op known under `dfc.<name>`, or its name with a namespace.

    Raises:  TypeError when the declaration itself is malformed; DfcError Q003, which names both
             places, when the name is another op's.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
        raise TypeError(f"op {cls.__name__} must be a frozen dataclass")
    for field in ("cases", "rejects"):
        if not isinstance(getattr(cls, field), tuple):
            raise TypeError(f"{cls.__name__}.{field} must be a tuple of strings")
    name = full_name(cls)
    origin = origin or _origin(cls)
    if name in _DECLARED and not origin.is_rerun_of(_ORIGINS[name]):
        message = f"op `{name}` exists already: {_ORIGINS[name]} brings it"
        help = "choose another name, or a namespace of your own: `mylib.swiglu`"
        raise DfcError("Q003", message, span=origin.span("name"), help=help)
    prefix = name.partition(".")[0]
    if prefix not in _NAMESPACES:
        register_namespace(
            prefix, _DECLARED.get, lambda: sorted(n for n in _DECLARED if n.startswith(prefix))
        )
    _DECLARED[name], _ORIGINS[name] = DeclaredOp(cls), origin
    lookup.cache_clear()
    return cls


def _origin(cls: type[Op]) -> Origin:
    """Without reading the source of dfc's own ops, which would slow every start."""
    if not cls.__module__.startswith("dfc."):
        return origin_of(cls)
    return Origin(str(sys.modules[cls.__module__].__file__), 0, cls.__qualname__)


def declared_ops() -> tuple[DeclaredOp, ...]:
    """Every declared op, by name."""
    return tuple(_DECLARED[name] for name in sorted(_DECLARED))


@contextlib.contextmanager
def restored_ops() -> Iterator[None]:
    """Forget at the end the ops, other than dfc's, that were declared meanwhile: for tests."""
    kept = dict(_DECLARED)
    try:
        yield
    finally:
        for name, op in list(_DECLARED.items()):
            if name not in kept and not op.cls.__module__.startswith("dfc."):
                del _DECLARED[name], _ORIGINS[name]
        lookup.cache_clear()


register_namespace("dfc", _DECLARED.get, lambda: sorted(n for n in _DECLARED if n[:4] == "dfc."))
