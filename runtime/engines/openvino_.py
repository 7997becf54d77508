"""OpenVINO on the CPU: the emitted ONNX, compiled for the machine, tensors in and out in place.

It is asked for float32 arithmetic, but for graphs that multiply in bfloat16: left to itself it
computes in bfloat16 wherever the machine has it, quantizes activations beside compressed weights,
and keeps attention's cache in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import TensorType, Type
from dfc.planning.engine import Engine, Runner

if find_spec("openvino") is None:  # importing it takes half a second
    raise ImportError("No module named 'openvino'")

_WIDE = ("f64", "c128")
_INT32 = 2**31


class OpenVino(Engine):
    """Runs the graph in OpenVINO's CPU plugin, with as many threads as torch has.

    Why:  from the ONNX that dfc emits and proves, not by OpenVINO's own importer of PyTorch: one
          meaning for every engine, and what an op costs there is known from `supports`.
    """

    name = "openvino"
    devices = ("cpu",)

    def supports(self, node: Node) -> str | None:
        from dfc.emit.onnx import why_not

        for r in node.results:
            reason = _why_not(r.type)
            if reason and r.use_count:
                return reason
        return why_not(node)

    @property
    def variants(self) -> Mapping[str, Engine]:
        """The other form of the graph, where it computes in 16 bits: `openvino:hint`."""
        return {"hint": Hint()}

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        return self.build_in(graph, device, threads, precision(graph))

    def build_in(
        self, graph: Graph, device: str, threads: int | None, precision: str
    ) -> CheckedRunner:
        """The graph compiled with OpenVINO's hint of a precision: it decides where that pays."""
        import torch

        from dfc.emit.checks import checked, lift_checks
        from dfc.emit.onnx import build_onnx
        from dfc.runtime.openvino_run import Session

        if device != "cpu":
            raise DfcError("K003", f"engine `openvino` cannot run on {device}: it is for the cpu")
        _refuse(self, graph)
        lifted, messages = lift_checks(_apart(graph))
        count = threads or torch.get_num_threads()
        session = Session(build_onnx(lifted), lifted, count, precision)
        run = checked(session.run, len(graph.outputs), messages)
        return CheckedRunner(run, session.precision)


@dataclass(frozen=True)
class CheckedRunner:
    """A compiled graph, and what OpenVINO says that it computes in."""

    run: Runner
    precision: str
    note: str = ""

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return self.run(inputs)


class Hint(OpenVino):
    """Runs a graph of 16 bits without its casts; OpenVINO, told of the type, casts by itself.

    Why:   casts of the graph's are converts to OpenVINO and keep its fusions apart.
    Keeps: of a graph that multiplies in f32, all: it is built as by `openvino`.
    """

    name = "openvino:hint"

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        from dfc.compress.widening import half_of_products, widened

        half = half_of_products(graph)
        if half is None:
            return super().build(graph, device, threads)
        made = self.build_in(widened(graph), device, threads, half)
        note = f"without the graph's casts, asked for {half}"
        if made.precision != half:
            note += f"; it computes in {made.precision} on this processor"
        return replace(made, note=note)


def precision(graph: Graph) -> str:
    """What its CPU plugin computes in: "bf16" where the graph multiplies so and the machine can.

    Why:  asked for f32 it turns values of bf16 into floats, and has lost what they were cast for;
          asked for bf16 it rounds more than the graph says, and the proof tells whether too much.
    """
    from dfc.compress.widening import half_of_products
    from dfc.planning.host import cpu_features

    if not any(f in cpu_features() for f in ("avx512_bf16", "amx_bf16")):
        return "f32"
    return "bf16" if half_of_products(graph) == "bf16" else "f32"


def _why_not(type: Type) -> str | None:
    """Why a value cannot be OpenVINO's."""
    if not isinstance(type, TensorType):
        return None
    if type.dtype.name in _WIDE:
        return f"its CPU plugin computes {type.dtype} in 32 bits"
    # 2026.4 divides by the number of elements, and takes the process with it
    return "its CPU plugin fails on tensors without elements" if 0 in type.shape else None


def _refuse(engine: Engine, graph: Graph) -> None:
    """What the CPU plugin would do wrong, and say nothing, is refused: 64-bit numbers above all.

    Raises:  DfcError K003 that names the node, the input or the parameter.
    """
    for node in graph.walk():
        reason = engine.supports(node)
        if reason:
            place = f" (traced from {node.loc})" if node.loc else ""
            raise DfcError(
                "K003", f"engine `{engine.name}` cannot run `{node.op}`: {reason}{place}"
            )
    for v in [*graph.inputs, *graph.parameters.values()]:
        reason = _why_not(v.type)
        if isinstance(v, Parameter) and _is_wide(v):
            reason = "it has numbers beyond 32 bits"
        if reason:
            raise DfcError("K003", f"engine `openvino` cannot take `{v.name}`: {reason}")


def _apart(graph: Graph) -> Graph:
    """The graph with a weight of its own for each way that a square one is read in.

    Why:  of a weight with as many rows as columns that is read in two ways, as in `x @ w` and
          `y @ w.T`, OpenVINO 2026.4 takes what it packed for the first for the second, too.
    """
    wanted = [p for p in graph.parameters.values() if len(_ways(p)) > 1]
    if not wanted:
        return graph
    copy = graph.copy()
    for p in (copy.parameters[p.name] for p in wanted):
        for n, nodes in enumerate([*_ways(p).values()][1:]):
            name = f"{p.name}.way{n}"
            assert isinstance(p.type, TensorType)
            one = copy.add_parameter(name, p.type, "constant", p.data)
            copy.replace_uses(p, one, set(nodes).__contains__)
    return copy


def _ways(p: Parameter) -> dict[str, list[Node]]:
    """Who reads a weight that is square, by the op that reads it; a table's rows are not packed."""
    found: dict[str, list[Node]] = {}
    shape = p.type.shape if isinstance(p.type, TensorType) else ()
    if len(shape) > 1 and shape[0] == shape[1] and p.kind != "buffer":
        for node in p.users:
            if "embedding" not in node.op:
                found.setdefault(node.op, []).append(node)
    return found


def _is_wide(p: Parameter) -> bool:
    if not isinstance(p.type, TensorType) or p.type.dtype.name != "i64" or p.data is None:
        return False
    tensor = p.data.tensor()
    if not tensor.numel():
        return False
    low, high = tensor.aminmax()
    return int(low) < -_INT32 or int(high) >= _INT32


ENGINE = OpenVino()
