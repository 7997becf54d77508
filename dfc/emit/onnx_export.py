"""A graph as an .onnx file: written, checked, run in ONNX Runtime, and only then published."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.emit.onnx_ties import ties
from dfc.errors import DfcError
from dfc.ir.expr import symbols
from dfc.ir.graph import Graph, Value
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType

if TYPE_CHECKING:
    from onnxscript import ir

# (flat inputs, expected flat outputs), or any object with `inputs`, `original` and `witness`
Probe = Any
_LIMIT_BYTES = (2 << 30) - (32 << 20)  # protobuf's 2 GiB, with room for the graph itself
_INLINE_BYTES = 1024  # a weight this small stays in the model when the others move out
_ALIGN = 4096


@dataclass(frozen=True)
class Written:
    """What an export left on disk, and how far its outputs are from the expected ones."""

    path: Path
    data: Path | None
    nodes: int
    worst: float  # the largest error of any float output, relative to its largest value
    proved: bool  # probes were run and agreed


def export_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    probes: Sequence[Probe] = (),
    force: bool = False,
    opset: int | None = None,
    contrib: bool = False,
    name: str | None = None,
    data_above_bytes: int = _LIMIT_BYTES,
    rtol: float = 1e-4,
) -> Written:
    """Write a graph as ONNX; the file gets its name after it was checked and run on the probes.

    Needs:   probes are (flat inputs, expected flat outputs), as `interpret` takes and gives them,
             or objects with `inputs`, `original` and `witness`.
    Ensures: the file has standard operators only, of opset 20 unless another is asked for, or of
             21 for weights in groups; with `contrib` it may have ONNX Runtime's own, and is of the
             opset that is fastest there.
    Raises:  DfcError X001 for an op without a translation, X002 for a model that is invalid or
             fails to run, X003 (status 4) for a result that differs, D010.. for the file itself.
    """
    from dfc.emit.onnx import ENGINE_OPSET, OPSET, build_onnx, file_opset
    from dfc.publish import publish_file

    target = Path(path).absolute()
    usual = ENGINE_OPSET if contrib else file_opset(graph)
    chosen = usual if opset is None else opset
    model = build_onnx(graph, opset=chosen, contrib=contrib, name=name)
    try:
        _check(model, target)
    except DfcError as e:
        if chosen >= OPSET:
            raise
        message = f"opset {chosen} cannot express the model: {e.message}"
        raise DfcError("X001", message, help=f"write opset {OPSET} or later") from e
    size = sum(_nbytes(v) for v in model.graph.initializers.values())
    external = size > data_above_bytes
    with contextlib.ExitStack() as stack:
        temp = stack.enter_context(publish_file(path, force=force, expect_bytes=size))
        data = stack.enter_context(_data_file(model, target)) if external else None
        _save(model, temp)
        worst = prove(graph, temp, probes, rtol=rtol)
    return Written(target, data, len(model.graph), worst, bool(probes))


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _save(model: ir.Model, path: Path) -> None:
    from onnxscript import ir

    data = ir.to_proto(model).SerializeToString()
    path.write_bytes(data)


@contextlib.contextmanager
def _data_file(model: ir.Model, target: Path) -> Iterator[Path]:
    """Move the large weights into a file named by its content, for the length of the block.

    The file is published at once, before the model that names it; when the block fails, a file
    that was not there before is removed.
    """
    from onnxscript import ir

    from dfc.publish import publish_file

    inside: dict[ir.Value, Any] = {}
    places: list[tuple[ir.Value, int, int]] = []
    digest = hashlib.sha256()
    working = target.with_name(f"{target.stem}.{os.getpid()}.data")
    with publish_file(working) as temp:
        at = 0
        with open(temp, "wb") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE_BYTES:
                    continue
                padding = bytes(-at % _ALIGN)
                content = tensor.tobytes()
                for part in (padding, content):
                    file.write(part)
                    digest.update(part)
                at += len(padding)
                places.append((value, at, len(content)))
                at += len(content)
    final = target.with_name(f"{target.stem}.{digest.hexdigest()[:16]}.data")
    was_there = final.exists()
    os.replace(working, final)
    for value, offset, length in places:
        tensor = inside[value] = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            final.name, offset, length, tensor.dtype, shape=tensor.shape,  # type: ignore[arg-type]
            name=value.name or "", base_dir=target.parent,
        )  # fmt: skip
    try:
        yield final
    except BaseException:
        if not was_there:
            final.unlink(missing_ok=True)
        raise
    finally:
        for value, tensor in inside.items():
            value.const_value = tensor


def _check(model: ir.Model, target: Path) -> None:
    """onnx.checker with strict shape inference, on the model with its large weights left open.

    Why:  the checker copies the model several times; types and shapes are all it reads of weights.
    """
    import onnx

    with open_weights(model) as names:
        proto = ir_to_proto(model)
    kept = [t for t in proto.graph.initializer if t.name not in names]
    declared = {i.name for i in proto.graph.input}  # state is an input with an initializer
    for t in proto.graph.initializer:
        if t.name in names and t.name not in declared:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as e:
        text = str(e).strip()
        raise DfcError(
            "X002", f"`{target.name}` is no valid ONNX model: {text.splitlines()[0][:300]}"
        ) from e


def ir_to_proto(model: ir.Model) -> Any:
    from onnxscript import ir

    return ir.to_proto(model)


@contextlib.contextmanager
def open_weights(model: ir.Model) -> Iterator[set[str]]:
    """Within the block the large weights are placeholders; gives their names."""
    from onnxscript import ir

    held: dict[ir.Value, Any] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_BYTES:
            continue
        held[value] = tensor
        value.const_value = ir.ExternalTensor(
            "weights",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=value.name or "",
        )
    try:
        yield {v.name or "" for v in held}
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def prove(graph: Graph, path: Path, probes: Sequence[Probe], *, rtol: float = 1e-4) -> float:
    """Run a written model on the probes, with ONNX Runtime's optimizer off and on.

    Raises:  DfcError X002 when it does not run, X003 when a result differs.
    """
    from dfc.emit.onnx import is_random, output_names
    from dfc.emit.onnx_run import Session
    from dfc.ops.rounding import ROUNDED_RTOL, rounds_values

    names = output_names(graph)
    random = is_random(graph)
    rounded = ROUNDED_RTOL if rounds_values(graph) else 0.0
    worst = 0.0
    for level in ("none", "all") if probes else ("none",):
        session = Session(path, graph, level=level)
        for index, probe in enumerate(probes):
            inputs, expected, witness = _parts(probe)
            try:
                found = session.run(inputs)
            except DfcError as e:
                raise DfcError("X002", f"the model fails on probe {index}: {e.message}") from e
            worst = max(
                worst,
                compare(graph, inputs, expected, found, names, rtol=rtol, random=random,
                        witness=witness, where=f"probe {index}, optimizer {level}",
                        rounded=rounded),
            )  # fmt: skip
    return worst


def _parts(probe: Probe) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any] | None]:
    if isinstance(probe, (tuple, list)):
        return probe[0], probe[1], None
    return probe.inputs, probe.original, probe.witness


def compare(
    graph: Graph,
    inputs: Sequence[Any],
    expected: Sequence[Any],
    found: Sequence[Any],
    names: Sequence[str],
    *,
    rtol: float = 1e-4,
    random: bool = False,
    witness: Sequence[Any] | None = None,
    where: str = "",
    rounded: float = 0.0,
) -> float:
    """The worst relative error; raises X003 that names the worst output.

    A float agrees when its error is within `rtol`, or within four times what the original itself
    loses against float64; both count by the coarsest floats that the graph computes. `rounded`, of
    the largest element, is allowed in any case; with it, a tensor that is as near to float64 in
    norm as the graph itself agrees as well. The graph itself is also what it gives where its
    numbers move (`dfc.ops.nudged`).
    """
    from dfc.ops.nudged import farthest
    from dfc.ops.rounding import FARTHEST_OWN, coarsest

    worst, problems = 0.0, []
    moved: Sequence[Any] | None = None
    eps = coarsest(graph)
    far = FARTHEST_OWN if rounded else 1e-2
    drawn = _of_drawn_size(graph) if random else frozenset()
    for i, (want, got) in enumerate(zip(expected, found, strict=True)):
        if i in drawn and (want.dtype, want.dim()) == (got.dtype, got.dim()):
            continue
        error, problem = _difference(want, got, None, rtol, random, rounded, eps, far)
        if problem and error is not None:
            if witness is None:
                witness = _witness(graph, inputs)
            if witness is not None:
                error, problem = _difference(want, got, witness[i], rtol, random, rounded, eps, far)
            if problem and witness is not None:
                moved = moved or farthest(
                    graph, inputs, expected, witness, 0, rounded=bool(rounded)
                )
                if moved[i] is not want:
                    error, problem = _difference(
                        moved[i], got, witness[i], rtol, random, rounded, eps, FARTHEST_OWN
                    )
        if error is not None:
            worst = max(worst, error)
        if problem:
            problems.append((error if error is not None else float("inf"), names[i], problem))
    if problems:
        _, name, problem = max(problems, key=lambda p: p[0])
        raise DfcError(
            "X003",
            f"ONNX Runtime gives another result for `{name}`: {problem}",
            notes=[x for x in (where, ties(graph, inputs)) if x],
            status=4,
        )
    return worst


def _of_drawn_size(graph: Graph) -> frozenset[int]:
    """The results that have a size which data decides: random data, in a graph that draws it."""
    bound = {b.symbol for node in graph.walk() for b in node.binds}
    types = [v.type for v in graph.result.inputs if isinstance(v, Value)]
    return frozenset(
        i
        for i, t in enumerate(types)
        if isinstance(t, TensorType) and any(symbols(n) & bound for n in t.shape)
    )


def _witness(graph: Graph, inputs: Sequence[Any]) -> Sequence[Any] | None:
    try:
        return interpret(graph, inputs, double=True)
    except DfcError:
        return None


def _difference(
    want: Any,
    got: Any,
    witness: Any,
    rtol: float,
    random: bool,
    rounded: float,
    eps: float,
    far: float,
) -> tuple[float | None, str | None]:
    """The error relative to the largest value, None for an exact mismatch; and what is wrong."""
    import torch

    from dfc.ops.rounding import FARTHEST_OWN, rounded_alike

    if not isinstance(want, torch.Tensor):
        if want is None:
            return 0.0, None
        same = want == got or (want != want and got != got) or random
        return None if not same else 0.0, None if same else f"{got} instead of {want}"
    if got.dtype != want.dtype or got.shape != want.shape:
        a, b = (f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for t in (got, want))
        return None, f"{a} instead of {b}"
    if random or want.numel() == 0:
        return 0.0, None
    want, got = want.cpu(), got.cpu()
    if not (want.is_floating_point() or want.is_complex()):
        wrong = int((want != got).sum())
        return (
            (None, f"{wrong} of {counted(want.numel(), 'element')} differ")
            if wrong
            else (0.0, None)
        )
    if want.is_complex():
        want, got = torch.view_as_real(want.resolve_conj()), torch.view_as_real(got.resolve_conj())
        if witness is not None:
            witness = torch.view_as_real(witness.resolve_conj())
    eps = max(torch.finfo(want.dtype).eps, 1e-7, eps)
    w, g = want.double(), got.double()
    finite = torch.isfinite(w)
    same = torch.isnan(w) == torch.isnan(g)
    same &= finite | torch.isnan(w) | (w == g)
    same &= finite == torch.isfinite(g)
    if not bool(same.all()):
        return 1.0, f"{int((~same).sum())} of {want.numel()} elements are not finite alike"
    w, g = w[finite], g[finite]
    if not w.numel():
        return 0.0, None
    scale = float(w.abs().max())
    own = torch.zeros(())
    truth = w
    if witness is not None and witness.shape == want.shape:
        t = witness.double()[finite]
        if bool(torch.isfinite(t).all()):
            # an original this far from float64 proves nothing: the graph itself may be wrong
            cap = min(FARTHEST_OWN, max(far, 64 * eps)) * scale
            own = (w - t).abs().max()
            if float(own) <= cap:
                truth = t
            else:
                own = torch.zeros(())
    error = (g - truth).abs()
    allowed = 4 * own + max(rtol, 8 * eps) * truth.abs()
    allowed = allowed + max(1e-2 * rtol, 2 * eps, rounded) * scale
    relative = float(error.max()) / scale if scale else float(error.max())
    if bool((error <= allowed + 1e-30).all()):
        return relative, None
    if rounded and witness is not None and rounded_alike(g, w, witness[finite]):
        return relative, None
    at = int((error - allowed).argmax())
    return relative, (
        f"{float(g[at]):.9g} instead of {float(truth[at]):.9g}, off by {float(error[at]):.3g}"
    )
