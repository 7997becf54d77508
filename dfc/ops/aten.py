"""How every ATen op is known without declaring it: PyTorch's schema, its type rules, its kernels.

The same holds for any other operator library that is loaded in the process (`torch.library`).
Arguments that say where or how a tensor lies in memory are not part of the graph: placement
belongs to the stage, layout to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Node
from dfc.ir.op import ANY, REQUIRED, Attribute, Operand, OpInfo, register_namespace
from dfc.ir.types import DType, Type, dtype_of

if TYPE_CHECKING:
    import torch

PLACEMENT = frozenset(
    {"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator"}
)
ASSERTIONS = frozenset(
    {
        "_assert_scalar",
        "_assert_async",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_assert_scalar",
        "_functional_assert_async",
    }
)
# Strides are not part of a value, so what needs them is run by its stride-free twin.
_STRIDE_FREE = {"aten.view.default": "reshape", "aten._unsafe_view.default": "reshape"}
_NO_TRAINING = {"train": False}
_NO_DROPOUT_BETWEEN = {"train": False, "dropout": 0.0, "num_layers": 1}
# The schema says random, but where one of these is so nothing is drawn.
_DRAWS_NOTHING_WITH: Mapping[str, Mapping[str, Any]] = {
    "scaled_dot_product_attention": {"dropout_p": 0.0},
    "dropout": _NO_TRAINING,
    "alpha_dropout": _NO_TRAINING,
    "feature_dropout": _NO_TRAINING,
    "feature_alpha_dropout": _NO_TRAINING,
    "native_dropout": _NO_TRAINING,
    "rrelu": {"training": False},
    "lstm": _NO_DROPOUT_BETWEEN,
    "gru": _NO_DROPOUT_BETWEEN,
    "rnn_tanh": _NO_DROPOUT_BETWEEN,
    "rnn_relu": _NO_DROPOUT_BETWEEN,
}
# Memory that nobody has written: two runs differ, so it is never folded or compared.
_UNDEFINED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class _Argument:
    """One schema argument: which list it lies in, and how it is passed."""

    name: str
    is_operand: bool
    keyword_only: bool


class AtenOp:
    """An operator of PyTorch's registry."""

    def __init__(self, name: str, overload: torch._ops.OpOverload) -> None:
        import torch

        self.name = name
        self.overload = overload
        schema = overload._schema
        self.operands: tuple[Operand, ...] = ()
        self.attributes: tuple[Attribute, ...] = ()
        self._arguments: list[_Argument] = []
        self.takes_device = False
        for a in schema.arguments:
            if a.name in PLACEMENT:
                self.takes_device |= a.name == "device"
                continue
            kind = str(a.real_type)
            if "Tensor" in kind:
                optional = kind.startswith("Optional") or "Optional[Tensor]" in kind
                self.operands += (Operand(a.name, optional, "List" in kind),)
            else:
                default = a.default_value if a.has_default_value() else REQUIRED
                self.attributes += (Attribute(a.name, default),)
            self._arguments.append(_Argument(a.name, "Tensor" in kind, a.kwarg_only))
        base = overload._schema.name.partition("::")[2]
        self._base = base
        self._assertion = base in ASSERTIONS
        self._random = torch.Tag.nondeterministic_seeded in overload.tags
        self.mutable = schema.is_mutable
        # Whether results may lie in an operand's memory: `reshape` copies only where it must.
        self.may_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        twin = _STRIDE_FREE.get(name)
        self._kernel = getattr(torch.ops.aten, twin).default if twin else overload
        self.result_lists = tuple("List" in str(r.real_type) for r in schema.returns)

    def _draws(self, attributes: Mapping[str, Any]) -> bool:
        if not self._random:
            return False
        switches = _DRAWS_NOTHING_WITH.get(self._base, {})
        return all(attributes.get(name) != off for name, off in switches.items())

    def is_pure(self, attributes: Mapping[str, Any]) -> bool:
        return not (
            self._assertion or self.mutable or self._base in _UNDEFINED or self._draws(attributes)
        )

    def has_effect(self, attributes: Mapping[str, Any]) -> bool:
        return self._assertion or self.mutable or self._draws(attributes)

    def bind(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for the kernel; a dtype may be ours or torch's."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        pending = iter(operands)
        for a in self._arguments:
            if a.is_operand:
                value = next(pending)
                if value is None and a.name in attributes:  # a Python number in a tensor's place
                    value = attributes[a.name]
            else:
                value = attributes[a.name]
            if isinstance(value, DType):
                value = value.to_torch()
            if a.keyword_only:
                kwargs[a.name] = value
            else:
                args.append(value)
        if self.takes_device and device is not None and not self.operands:
            kwargs["device"] = device
        return args, kwargs

    def run(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str = "cpu"
    ) -> tuple[Any, ...]:
        args, kwargs = self.bind(operands, attributes, device)
        return flat_results(self._kernel(*args, **kwargs))

    @property
    def kernel(self) -> torch._ops.OpOverload:
        """What engines call: the overload, or its stride-free twin."""
        return self._kernel

    @cached_property
    def in_place(self) -> torch._ops.OpOverload | None:
        """The variant that writes its result over its first operand."""
        import torch

        packet = getattr(torch.ops.aten, f"{self._base}_", None)
        return getattr(packet, self.overload._overloadname, None)

    def infer(self, node: Node) -> tuple[Type, ...]:
        if self._assertion:
            return ()
        from dfc.ops.aten_types import infer

        return infer(self, node)


def flat_results(result: Any) -> tuple[Any, ...]:
    """What a kernel returned as a flat tuple; lists among several results are flattened too."""
    if result is None:
        return ()
    if not isinstance(result, (tuple, list)):
        return (result,)
    flat: list[Any] = []
    for r in result:
        flat.extend(r if isinstance(r, (tuple, list)) else (r,))
    return tuple(flat)


def _import_home(namespace: str) -> bool:
    """Import what declares the ops of a library that models come from, if it is installed.

    A package of such a model is read where nothing else imports it; the text that names the op
    chooses among these alone.
    """
    try:
        if namespace == "transformers":
            import transformers.integrations.moe  # noqa: F401
        elif namespace == "torchvision":
            import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        else:
            return False
    except ImportError:
        return False
    return True


@cache
def _resolve(name: str) -> OpInfo | None:
    parts = name.split(".")
    if len(parts) != 3 or not all(map(_IDENTIFIER.match, parts)):
        return None
    import torch

    namespace, base, overload = parts

    def known() -> bool:
        try:
            torch._C._dispatch_find_schema_or_throw(
                f"{namespace}::{base}", "" if overload == "default" else overload
            )
        except RuntimeError:
            return False
        return True

    if not known() and not (_import_home(namespace) and known()):
        return None
    return AtenOp(name, getattr(getattr(getattr(torch.ops, namespace), base), overload))


@cache
def _names() -> tuple[str, ...]:
    import torch

    found = []
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, base = schema.name.partition("::")
        found.append(f"{namespace}.{base}.{schema.overload_name or 'default'}")
    return tuple(sorted(found))


def complete(op: AtenOp, given: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with the schema's defaults filled in, in the schema's order.

    Raises:  DfcError V011 for a name that the op does not have or one that is missing.
    """
    known = {a.name for a in op.attributes} | {o.name for o in op.operands}
    for name in given:
        if name not in known:
            raise DfcError("V011", f"`{op.name}` has no attribute `{name}`", status=2)
    full: dict[str, Any] = {}
    for a in op.attributes:
        if a.name in given:
            full[a.name] = given[a.name]
        elif a.default is not REQUIRED:
            full[a.name] = plain(a.default)
        else:
            raise DfcError("V011", f"`{op.name}` needs the attribute `{a.name}`", status=2)
    for o in op.operands:
        if o.name in given:
            full[o.name] = given[o.name]
    return full


def plain(value: Any) -> Any:
    """A schema default or traced constant as an attribute: torch's dtypes become ours."""
    import torch

    if isinstance(value, torch.dtype):
        return dtype_of(value)
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value


for _prefix in ("aten", "prims"):
    register_namespace(_prefix, _resolve, _names)
# Libraries that the process has loaded, or will: what is not there yet may come.
register_namespace(ANY, _resolve.__wrapped__, _names)
