"""PyTorch's own op translations (torchlib): everything here leans on internals of torch.onnx.

They are written for onnxscript's evaluator; our recorder takes the nodes that they make. The rest
of dfc sees `translate` and `symbolic_value`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import onnxscript
from onnxscript import evaluator, ir
from torch.onnx._internal.exporter import _building, _registration, _tensors

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_types import ONNX_DTYPES, propagate_dtype
from dfc.ir.expr import Expr
from dfc.ir.types import DType

if TYPE_CHECKING:
    import onnx

# Wrong or crashing in some call that ours leave to others; a decomposition is right.
_DISTRUSTED = frozenset(
    [
        "aten.lstm.input",
        "aten.gru.input",
        "aten.rnn_tanh.input",
        "aten.rnn_relu.input",
        "aten.cross_entropy_loss.default",
        "aten._native_batch_norm_legit_functional.default",
        "aten._native_batch_norm_legit.default",
        "aten.native_batch_norm.default",
        "aten.batch_norm.default",
        "aten.embedding_bag.padding_idx",
        "aten.logaddexp.default",
    ]
)
_IGNORED = frozenset({"device", "layout", "pin_memory", "memory_format", "implicit"})


@cache
def opset_object(version: int) -> Any:
    return onnxscript.values.Opset("", version)


def symbolic_value(version: int) -> Val:
    """A value that torchlib's translations can do arithmetic on."""
    return _tensors.SymbolicTensor(opset_object(version))


@cache
def _registry(version: int) -> Any:
    import logging

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it warns about torchvision and old overloads
    try:
        return _registration.ONNXRegistry.from_torchlib(version)
    finally:
        logger.setLevel(level)


@cache
def _signature(name: str, domain: str, version: int) -> Any:
    import onnx

    schema = onnx.defs.get_schema(name, version, domain)
    return ir.schemas.OpSignature.from_op_schema(schema)


class _Recorder(_building.OpRecorder):
    """torch.onnx's recorder, with signatures kept and element types passed on."""

    def __init__(self, version: int, constants: dict[Any, Any]) -> None:
        super().__init__(opset_object(version), constants)
        self.version = version

    def eval(self, schema: onnx.defs.OpSchema, args: Any, kwargs: Any) -> Any:
        # torchlib names opset 18: an op that changed since must fit the schema of our opset
        signature = _signature(schema.name, schema.domain, self.version)
        inputs, attrs = _building._construct_named_inputs_and_attrs(signature, args, kwargs)
        count = _building._determine_output_number(signature, attrs)
        outputs = self._call_op(signature, inputs, attrs, count)
        propagate_dtype(self.nodes[-1])
        return outputs[0] if len(outputs) == 1 else outputs


def has_translation(op: str, opset: int) -> bool:
    return _function(op, False, opset) is not None


@cache
def _function(op: str, is_complex: bool, opset: int) -> Any:
    namespace, base, overload = op.split(".")
    name = f"{namespace}::{base}" + ("" if overload == "default" else f".{overload}")
    found = _registry(opset).functions.get(name, [])
    found = [f for f in found if f.is_complex == is_complex]
    return found[0].onnx_function if found else None


def translate(b: Builder, call: Call) -> Any:
    """The call by torchlib's translation.

    Raises:  NoTranslation when it has none, or fails at this call.
    """
    from dfc.ir.op import lookup
    from dfc.ops.aten import AtenOp

    if call.op.count(".") != 2 or call.op in _DISTRUSTED:
        raise NoTranslation("")
    is_complex = any(b.is_complex(v) for v in call.values)
    function = _function(call.op, is_complex, b.root.opset)
    if function is None:
        raise NoTranslation("torchlib has no translation")
    info = lookup(call.op)
    assert isinstance(info, AtenOp)
    given: dict[str, Any] = {}
    for o, x in zip(info.operands, call.operands, strict=True):
        given[o.name] = list(x) if isinstance(x, tuple) else x
    for name, x in call.attributes.items():
        if given.get(name) is None:
            given[name] = _argument(b, x)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in info.overload._schema.arguments:
        if a.name in _IGNORED or a.name not in given:
            if not a.kwarg_only and a.name in given:
                args.append(None)
            continue
        x = given[a.name]
        if a.kwarg_only:
            kwargs[a.name] = -1 if a.name == "dtype" and x is None else x
        else:
            args.append(x)
    recorder = _Recorder(b.root.opset, {})  # type: ignore[abstract]
    before = len(b.nodes)
    try:
        with evaluator.default_as(recorder):
            results = function(*args, **kwargs)
    except Exception as e:  # its translations raise whatever their authors met
        del b.nodes[before:]
        raise NoTranslation(f"torchlib fails: {_innermost(e)}") from e
    b.nodes.extend(recorder.nodes)
    if not isinstance(results, (list, tuple)):
        # a number, a tensor that was passed through, or one value
        results = [
            results if isinstance(results, ir.Value) else b.const(results, ONNX_DTYPES["f32"])
        ]
    b.root.functions.update(recorder.functions)
    return results


def _argument(b: Builder, x: Any) -> Any:
    if isinstance(x, DType):
        return int(ONNX_DTYPES[x.name])
    if isinstance(x, Expr):
        return b.sizes.scalar(b, x)
    if isinstance(x, tuple):
        return [_argument(b, v) for v in x]
    return x


def _innermost(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0] if text else ''}"


def model_functions(functions: Any, opset: int) -> list[ir.Function]:
    """The functions that translations called by name, for inlining, and the ones they call."""
    found: dict[Any, ir.Function] = {}
    pending = list(functions.values())
    while pending:
        f = pending.pop()
        if isinstance(f, ir.Function):
            made = f
        else:
            made = ir.serde.deserialize_function(f.to_function_proto())
            pending.extend(g for g in f.function_ir.get_called_functions().values()) if hasattr(
                f.function_ir, "get_called_functions"
            ) else None
        made.opset_imports[""] = opset
        found[made.identifier()] = made
    return list(found.values())


__all__ = ["has_translation", "model_functions", "symbolic_value", "translate"]
