"""Capture below autograd, for models that differentiate or vmap inside forward.

torch.export traces above autograd and functorch, where gradients are not yet operators. `make_fx`
traces below them: what it sees is ATen alone, with composites already taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from dfc.errors import DfcError


@dataclass
class _Signature:
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]
    buffers_to_mutate: dict[str, str] = field(default_factory=dict)
    parameters_to_mutate: dict[str, str] = field(default_factory=dict)


@dataclass
class _CallSpec:
    in_spec: Any
    out_spec: Any


@dataclass
class Program:
    """What the conversion reads of an ExportedProgram."""

    graph_module: torch.fx.GraphModule
    graph_signature: _Signature
    call_spec: _CallSpec
    range_constraints: dict[Any, Any]
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.graph_module.graph


def trace_below_autograd(
    model: torch.nn.Module,
    leaves: list[Any],
    spec: Any,
    dynamic: list[set[int]],
    functionalize: bool,
) -> Program:
    """Trace flat inputs through the model; `dynamic` names the symbolic dimensions of each.

    Raises:  whatever torch raises; DfcError T024 when the model writes to its state.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fakes = [mode.from_tensor(x, static_shapes=True) for x in state.values()]
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    inputs = [_fake(mode, leaves[i], i, dynamic[i]) for i in tensors]
    structure: list[Any] = []

    def run(*flat: torch.Tensor) -> list[Any]:
        made = list(leaves)
        for i, x in zip(tensors, flat[len(fakes) :], strict=True):
            made[i] = x
        args, kwargs = pytree.tree_unflatten(made, spec)
        given = dict(zip(state, flat, strict=False))
        with torch.nn.utils.stateless._reparametrize_module(model, given):
            out = model(*args, **kwargs)
        flat_out, out_spec = pytree.tree_flatten(out)
        structure[:] = [out_spec]
        return flat_out

    with mode:
        traced = make_fx(
            torch.func.functionalize(run, remove="mutations") if functionalize else run,
            decomposition_table={},  # with none torch 2.14 makes each `detach` an alias
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes, *inputs)
    return _program(model, traced, state, leaves, spec, structure[0], mode)


def _fake(mode: FakeTensorMode, x: torch.Tensor, i: int, dynamic: set[int]) -> torch.Tensor:
    sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(x.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    source = ConstantSource(f"__dfc_input_{i}")
    return mode.from_tensor(x, symbolic_context=context, source=source)


def _program(
    model: torch.nn.Module,
    traced: torch.fx.GraphModule,
    state: dict[str, torch.Tensor],
    leaves: list[Any],
    spec: Any,
    out_spec: Any,
    mode: FakeTensorMode,
) -> Program:
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for n in traced.graph.nodes:
        if n.target is torch.ops.aten.copy_.default:
            raise DfcError("T024", "the model writes to its state and differentiates in forward")
    buffers = dict(model.named_buffers())
    specs: list[InputSpec] = []
    pending = iter(placeholders)
    for name in state:
        kind = InputKind.BUFFER if name in buffers else InputKind.PARAMETER
        persistent = True if name in buffers else None
        specs.append(InputSpec(kind, TensorArgument(next(pending).name), name, persistent))
    for i, x in enumerate(leaves):
        if isinstance(x, torch.Tensor):
            argument: Any = TensorArgument(next(pending).name)
        else:
            argument = ConstantArgument(f"constant_{i}", x)
        specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    (output,) = [n for n in traced.graph.nodes if n.op == "output"]
    outputs = []
    for x in output.args[0]:
        argument = (
            TensorArgument(x.name) if isinstance(x, torch.fx.Node) else ConstantArgument("", x)
        )
        outputs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))
    _drop_constants(traced, specs)
    ranges = dict(mode.shape_env.var_to_range) if mode.shape_env else {}
    call = _CallSpec(spec, out_spec)
    return Program(traced, _Signature(specs, outputs), call, ranges, dict(state))


def _drop_constants(traced: torch.fx.GraphModule, specs: list[InputSpec]) -> None:
    """torch.export has a placeholder for each constant argument too: add them, unused."""
    users = [s for s in specs if s.kind == InputKind.USER_INPUT]
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    at = len(specs) - len(users)
    for i, s in enumerate(users):
        if isinstance(s.arg, ConstantArgument):
            anchor = placeholders[at + i - 1] if at + i else None
            with (
                traced.graph.inserting_after(anchor)
                if anchor is not None
                else traced.graph.inserting_before(next(iter(traced.graph.nodes)))
            ):
                made = traced.graph.placeholder(s.arg.name)
            made.meta["val"] = s.arg.value
            placeholders.insert(at + i, made)
