"""The user's model as a function of the graph's flat values, left as it was found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree

from dfc.capture.call_structure import flat_leaves
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter
from dfc.ir.weights import on_host


def original_runner(
    model: Any, graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[Sequence[Any]], list[Any]]:
    """Run the model on flat inputs, where its example lies: output leaves, then what it mutated.

    Ensures: results on the host.
    Keeps:   the model's buffers, and the arguments: every run starts from the same state.
    Raises:  DfcError K022 when the model itself fails on the inputs.
    """
    leaves, spec = flat_leaves(args, dict(kwargs))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def run(inputs: Sequence[Any]) -> list[Any]:
        state = _state(model, graph)
        made = list(leaves)
        pending = [x for x in inputs if isinstance(x, torch.Tensor)]
        numbers = iter([x for x in inputs if not isinstance(x, torch.Tensor)])
        for i, x in zip(tensors, pending, strict=True):
            made[i] = (x.to(leaves[i].device) if leaves[i].is_cuda else x).detach()
        if any(not isinstance(x, torch.Tensor) for x in inputs):
            _fill_numbers(made, graph, numbers)
        call_args, call_kwargs = copy.deepcopy(pytree.tree_unflatten(made, spec))
        call_leaves, _ = flat_leaves(call_args, call_kwargs)
        try:
            with torch.no_grad():
                result = model(*call_args, **call_kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, KeyError) as e:
            raise DfcError("K022", f"the model refuses these inputs: {e}") from e
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        outputs = matching(graph, outputs, result)
        inputs_after = [call_leaves[i] for i in tensors]
        values = [v for v in graph.inputs if v.type.__class__.__name__ == "TensorType"]
        after = dict(zip(values, inputs_after, strict=True))
        now = _owned(model)
        lost = [m.target.name for m in graph.mutations
                if isinstance(m.target, Parameter) and m.target.name not in now]  # fmt: skip
        if lost:
            raise DfcError(
                "T025", f"calling the model replaces its own parameter `{lost[0]}`", status=3
            )
        mutated = [
            now[m.target.name].clone() if isinstance(m.target, Parameter) else after[m.target]
            for m in graph.mutations
        ]
        # A result may be a buffer itself, which is about to be put back.
        outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in outputs]
        _restore(model, state)
        return [on_host(x) for x in (*outputs, *mutated)]

    return run


def _fill_numbers(made: list[Any], graph: Graph, numbers: Any) -> None:
    """Put dynamic integer arguments back in their places."""
    from dfc.ir.tree import Const, Leaf, children
    from dfc.ir.types import ScalarType

    kinds: list[bool] = []
    pending = [a.tree for a in graph.arguments]
    inputs = iter(graph.inputs)
    while pending:
        tree = pending.pop(0)
        if isinstance(tree, Leaf):
            kinds.append(isinstance(next(inputs).type, ScalarType))
        elif isinstance(tree, Const):
            kinds.append(False)
        else:
            pending = [*children(tree), *pending]
    for i, is_number in enumerate(kinds):
        if is_number:
            made[i] = next(numbers)


def matching(graph: Graph, tensors: list[Any], result: Any) -> list[Any]:
    """The leaves that are values of the graph: tensors, and numbers that depend on data."""
    if len(tensors) == len(graph.outputs):
        return tensors
    from dfc.ir.tree import Const, Leaf, children

    leaves = pytree.tree_leaves(result)
    keep: list[bool] = []
    pending = [graph.output_tree]
    while pending:
        tree = pending.pop(0)
        if isinstance(tree, (Leaf, Const)):
            keep.append(isinstance(tree, Leaf))
        else:
            pending = [*children(tree), *pending]
    return [x for x, k in zip(leaves, keep, strict=True) if k]


def _owned(model: Any) -> dict[str, torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        return {}
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _state(model: Any, graph: Graph) -> dict[str, torch.Tensor]:
    """Copies of what a run may write: every buffer, and the parameters that the graph mutates."""
    targets = {m.target.name for m in graph.mutations}
    buffers = dict(model.named_buffers()) if isinstance(model, torch.nn.Module) else {}
    return {
        k: x.detach().clone()
        for k, x in _owned(model).items()
        if (k in targets or k in buffers) and not x.is_meta
    }


def _restore(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Undo what a run wrote, without touching what did not change."""
    owned = _owned(model)
    with torch.no_grad():
        for name, before in state.items():
            now = owned.get(name)
            if now is None or before.shape != now.shape:
                continue
            if not torch.equal(now.nan_to_num(), before.nan_to_num()):
                now.copy_(before)


class Original:
    """The model that a graph was captured from, as it was called, and which modules trained."""

    def __init__(
        self, model: torch.nn.Module, leaves: Sequence[Any], spec: Any, graph: Graph
    ) -> None:
        self.model, self.leaves, self.spec = model, leaves, spec
        self._ops = [n.op for n in graph.nodes]
        self._training = {name for name, m in model.named_modules() if m.training}

    def is_of(self, graph: Graph) -> bool:
        """Whether the graph is as it was captured, and the weights are still the model's."""
        own = dict(self.model.named_parameters())
        same = all(
            p.name not in own or own[p.name].is_cuda
            or (p.data is not None and p.data.tensor().data_ptr() == own[p.name].data_ptr())
            for p in graph.parameters.values()
        )  # fmt: skip
        return same and self._ops == [n.op for n in graph.nodes]

    @contextmanager
    def as_traced(self) -> Iterator[None]:
        """In the modes of then; modes and buffers are afterwards what they were before."""
        modes = [(m, m.training, n in self._training) for n, m in self.model.named_modules()]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        for module, _, then in modes:
            module.training = then
        try:
            yield
        finally:
            for module, before, _ in modes:
                module.training = before
            with torch.no_grad():
                for b, held in buffers:
                    if not same(b, held):
                        b.copy_(held)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
