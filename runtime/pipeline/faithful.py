"""Whether a graph trains what its model trains: results, what is written, and gradients of both.

Dropout drops nothing meanwhile, on both sides, so that what is left can be compared. What else is
random, as numbers of `random` or numpy that were drawn while the model was traced, shows in results
that are not the same twice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dfc.calling import allowed, flat_inputs
from dfc.capture.original import Original, matching, same
from dfc.capture.own_gradients import plain_gradients
from dfc.emit.trainable import TrainableGraph
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType
from dfc.planning.microbatches import batch_dim, batch_of, least_of, parts_of

# Of a norm, and of all gradients together: shorter ones are judged as a part of these. Both run the
# same kernels, or nearly, and what differs does so by far.
_USUAL, _COARSE = (1e-2, 1e-3), (1e-1, 3e-1)
_ITEMS = 2  # of the example's batch: a pipeline need not hold more at once

Tensors = Mapping[str, torch.Tensor]


class Incomparable(Exception):
    """Why a graph and its model cannot be compared."""


@dataclass(frozen=True)
class _Outcome:
    """What a call gave, what it wrote to buffers, and gradients of a mixture of its results."""

    results: Tensors
    written: Tensors
    gradients: Tensors
    random: str | None


def compare(graph: Graph, reduction: str = "mean") -> str:
    """What can be said of a graph and its model, after both ran forward and backward on the first
    items of the example; and of a loss that is not its microbatches' mean, or sum.

    Keeps:   the model, its gradients, and PyTorch's stream of random numbers.
    Raises:  DfcError T010 (exit status 3) where the graph trains something else.
    """
    try:
        original, inputs, leaves = _example(graph)
        devices = {p.device for p in original.model.parameters() if p.is_cuda}
        with torch.random.fork_rng([*devices]), torch.enable_grad():
            module = TrainableGraph(graph)
            found = _of_graph(graph, module, inputs)
            expected = _of_model(graph, original, leaves, found.written)
            again = _of_model(graph, original, leaves, found.written)
    except Incomparable as e:
        return f"not compared with the model: {e}"
    limits = _COARSE if _is_coarse(graph) else _USUAL
    unsteady = _difference(again, expected, limits)
    wrong = _difference(found, expected, limits) or unsteady
    if wrong and expected.random:
        return f"not compared with the model: it draws numbers by `{expected.random}`"
    if wrong:
        raise _other(wrong, steady=unsteady is None)
    told = "compared with the model: same results and gradients on the example"
    return told + _uneven(graph, module, inputs, reduction)


def _uneven(graph: Graph, module: TrainableGraph, inputs: list[Any], reduction: str) -> str:
    """What microbatches change of the loss, where they do: as those of a sum that is averaged, of
    batch norm, of a mean over some items."""
    batch = batch_of(graph)
    losses = [
        i for i, v in enumerate(graph.outputs)
        if isinstance(v.type, TensorType) and not v.type.shape and v.type.dtype.is_float
    ]  # fmt: skip
    if batch is None or len(losses) != 1:
        return ""
    try:
        dims = {v: batch_dim(v, batch) for v in graph.inputs}
        parts = [list(p.values()) for p in parts_of(graph, batch, inputs, dims, _ITEMS)]
        with torch.no_grad(), torch.random.fork_rng([]), _undropped():
            whole, *each = (
                float(module.flat([x.cpu() for x in part])[losses[0]]) for part in (inputs, *parts)
            )
    except (DfcError, RuntimeError):
        return ""
    of = next(i for i, d in enumerate(dims.values()) if d is not None)
    dim = dims[graph.inputs[of]]
    counts = [part[of].shape[dim] if reduction == "mean" else 1 for part in parts]
    total = sum(counts) if reduction == "mean" else 1
    made = sum(x * n / total for x, n in zip(each, counts, strict=True))
    if abs(made - whole) <= _USUAL[0] * abs(whole):
        return ""
    return (
        f"; but {len(parts)} microbatches change its loss from {whole:.4g} to {made:.4g}, the "
        f"{reduction} of theirs: is it a sum, or a mean over some items, or of batch norm?"
    )


def _other(wrong: str, steady: bool) -> DfcError:
    why = "its code takes another way while it is traced"
    if not steady:
        why = "it does not give the same twice: it counts its calls, or draws numbers by `random` "
        why += "or numpy, which are constants in the graph; give them to the model as inputs"
    return DfcError(
        "T010", f"the captured graph does not train what the model does: {wrong}",
        help=f"{why}; compare=False trains the graph as it is", status=3,
    )  # fmt: skip


def _example(graph: Graph) -> tuple[Original, list[Any], list[Any]]:
    """The first items of the example: as the graph's inputs, and as leaves of the model's call."""
    original: Original | None = graph.original
    if original is None or not original.is_of(graph):
        raise Incomparable("the graph is not as it was captured from one")
    leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in original.leaves]
    args, kwargs = original.spec.unflatten(leaves)
    try:
        inputs = _fewer(graph, flat_inputs(graph, args, kwargs))
    except DfcError as e:
        raise Incomparable(e.message) from e
    whole = flat_inputs(graph, args, kwargs)
    less = {id(x): y for x, y in zip(whole, inputs, strict=True)}
    return original, inputs, [less.get(id(x), x) for x in leaves]


def _fewer(graph: Graph, inputs: list[Any]) -> list[Any]:
    """The first items of the batch, where the graph is true for so few."""
    batch = batch_of(graph)
    items = max(_ITEMS, least_of(graph, batch))
    try:
        dims = [batch_dim(v, batch) for v in graph.inputs]
    except DfcError:
        return inputs
    some = [x if d is None else x.narrow(d, 0, min(items, x.shape[d]))
            for x, d in zip(inputs, dims, strict=True)]  # fmt: skip
    return some if allowed(graph, bind_inputs(graph, some)) else inputs


def _of_graph(graph: Graph, module: TrainableGraph, inputs: Sequence[Any]) -> _Outcome:
    given = [x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.manual_seed(0)
    try:
        with _undropped() as seen:
            made = module.flat(given)
            results = _named(made[: len(graph.outputs)])
            gradients = _gradients(results, module.weights())
    except RuntimeError as e:  # an assertion that does not hold for so few items
        raise Incomparable(f"its graph fails on the example: {e}") from e
    targets = [m.target for m in graph.mutations]
    written = {t.name: x for t, x in zip(targets, made[len(graph.outputs) :], strict=True)
               if isinstance(t, Parameter)}  # fmt: skip
    return _Outcome(results, written, gradients, seen.random)


def _of_model(
    graph: Graph, original: Original, leaves: Sequence[Any], written: Tensors
) -> _Outcome:
    model = original.model
    names = {a: p.name for p in graph.parameters.values() for a in (p.name, *p.aliases)}
    weights = {names.get(n, n): p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: b.detach().clone() for n, b in model.named_buffers()}
    args, kwargs = original.spec.unflatten(copy.deepcopy(list(leaves)))
    torch.manual_seed(0)
    with original.as_traced():
        try:
            with plain_gradients(), _undropped() as seen:
                made = model(*args, **kwargs)
                tensors = [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
                results = _named(matching(graph, tensors, made))
                gradients = _gradients(results, weights)
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError,
                NotImplementedError) as e:  # fmt: skip
            raise Incomparable(f"it fails on the example: {e}") from e
        now = {
            names.get(n, n): b.detach().clone() for n, b in model.named_buffers()
            if n in before and (names.get(n, n) in written or not same(b, before[n]))
        }  # fmt: skip
    return _Outcome(results, now, gradients, seen.random)


def _named(results: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {f"{i}": x for i, x in enumerate(results) if isinstance(x, torch.Tensor)}


def _gradients(results: Tensors, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of all results, mixed by numbers that are always the same."""
    total = torch.zeros(())
    for x in results.values():
        if x.requires_grad:
            parts = torch.view_as_real(x) if x.is_complex() else x
            mixed = (torch.arange(parts.numel()) * 0.7).cos().view(parts.shape)
            total = total + (parts.nan_to_num() * mixed.to(parts.device)).sum().float().cpu()
    if not total.requires_grad:
        return {}
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {n: g for n, g in zip(weights, found, strict=True) if g is not None}


def _is_coarse(graph: Graph) -> bool:
    """Whether something is computed in half precision, where noise is another with each kernel."""
    types = (r.type for n in graph.walk() for r in n.results)
    return any(isinstance(t, TensorType) and t.dtype.name in ("f16", "bf16") for t in types)


def _difference(found: _Outcome, expected: _Outcome, limits: tuple[float, float]) -> str | None:
    """The first thing that is another's, in words."""
    several = len(expected.results) > 1
    for what, ours, theirs in (
        ("the result", found.results, expected.results),
        ("the buffer", found.written, expected.written),
        ("the gradient of", found.gradients, expected.gradients),
    ):
        all_of_them = sum(_norm(x) ** 2 for x in theirs.values()) ** 0.5
        for name in dict.fromkeys([*theirs, *ours]):
            a, b = ours.get(name), theirs.get(name)
            like = a if b is None else b
            assert like is not None
            off = _norm(like) if a is None or b is None else _distance(a, b)
            size = max(0.0 if b is None else _norm(b), limits[1] * all_of_them)
            if off > limits[0] * size:
                told = f"{what} {name if several else ''}".rstrip()
                told = told if what == "the result" else f"{what} `{name}`"
                if a is None or b is None:
                    return f"{told} is not there in the {'graph' if a is None else 'model'}"
                return f"{told} is off by {off / max(size, 1e-30):.2g} of what it is"
    return None


def _norm(x: torch.Tensor) -> float:
    return float(_plain(x).norm())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((_plain(a) - _plain(b)).norm())


def _plain(x: torch.Tensor) -> torch.Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.detach().cpu().double().nan_to_num(posinf=1e30, neginf=-1e30)


class _Undropped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dropout that drops nothing; `random` is another operator that drew numbers."""

    random: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::bernoulli_":
            return args[0].fill_(1)
        if name == "aten::bernoulli":
            return torch.ones_like(args[0])
        if name == "aten::native_dropout" and args[2] is not False:
            return args[0] / (1 - args[1]), torch.ones_like(args[0], dtype=torch.bool)
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
            self.random = name
        return func(*args, **(kwargs or {}))


def _undropped() -> _Undropped:
    return _Undropped()  # type: ignore[no-untyped-call]
