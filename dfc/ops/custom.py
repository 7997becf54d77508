"""`@dfc.op`: a class of the user's becomes an op, in graph text, in rules and in every engine.

Q042  a definition that cannot be an op, with the line
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, TypeVar, dataclass_transform

from dfc.errors import DfcError, Diagnostic
from dfc.ir.op import Op, declare
from dfc.origin import Origin, origin_of

C = TypeVar("C", bound=type)
_NAME = re.compile(r"([a-z_][a-z0-9_]*\.)?[a-z_][a-z0-9_]*")
_TAKEN = ("aten", "torch", "prims")  # namespaces that belong to PyTorch


@dataclass_transform(frozen_default=True)
def op(cls: C) -> C:
    """Declare an op: `name`, `infer` and `reference`; its annotated fields are the attributes.

    `name` is `swiglu`, which is `dfc.swiglu` in text and in rules, or `mylib.swiglu`. Without
    `decompose` the op is primitive: ONNX cannot have it unless it says `to_onnx`.
    `dfc.testing.check_op` holds it to what it says.
    Raises:  DfcError Q042 with the line of what is wrong; Q003 when the name is taken.
    """
    if not isinstance(cls, type):
        raise DfcError("Q042", f"`@dfc.op` takes a class, not a {type(cls).__name__}")
    origin = origin_of(cls)
    problems = [*_problems(cls, origin)]
    if problems:
        raise DfcError.of(problems)
    made: Any = cls
    if "__dataclass_fields__" not in vars(cls):
        made = dataclasses.dataclass(frozen=True)(cls)
    if not issubclass(made, Op):
        space: dict[str, Any] = {
            "__module__": cls.__module__, "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__, "__annotations__": {},
        }  # fmt: skip
        made = dataclasses.dataclass(frozen=True)(type(cls.__name__, (cls, Op), space))
    for field in ("cases", "rejects"):
        if not hasattr(made, field):
            setattr(made, field, ())
    declare(made, origin)
    return made  # type: ignore[no-any-return]


def _problems(cls: Any, origin: Origin) -> list[Diagnostic]:
    found: list[Diagnostic] = []

    def say(message: str, at: str | None = None, help: str | None = None) -> None:
        found.append(Diagnostic("Q042", message, origin.span(at), help))

    name = vars(cls).get("name")
    if name is None:
        say("the op has no name", None, 'write `name = "swiglu"`, or `name = "mylib.swiglu"`')
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        say(f"{name!r} cannot be the name of an op", "name", "as in `swiglu` or `mylib.swiglu`")
    elif name.split(".")[0] in _TAKEN and "." in name:
        say(f"`{name.split('.')[0]}.` belongs to PyTorch", "name", "choose another namespace")
    for facet, what in (("infer", "the type of its result"), ("reference", "what it computes")):
        if not callable(getattr(cls, facet, None)):
            say(f"the op has no `{facet}`: {what}", None, f"def {facet}(self, x, ...): ...")
    for field in ("cases", "rejects"):
        value = getattr(cls, field, ())
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            say(f"`{field}` is no tuple of strings", field, f'{field} = ("x=f32[2,3]",)')
    if not found:
        operands = _names(cls.infer)
        for facet in ("reference", "decompose", "cost"):
            other = getattr(cls, facet, None)
            names = _names(other)[1 if facet == "decompose" else 0 :] if other else operands
            if names != operands:
                shown = ", ".join(operands)
                say(f"`{facet}` takes other operands than `infer`: ({shown})", facet)
    params = getattr(cls, "__dataclass_params__", None)
    if "__dataclass_fields__" in vars(cls) and params is not None and not params.frozen:
        say("the dataclass is not frozen", None, "write `@dataclass(frozen=True)`, or leave it out")
    return found


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]
