"""How far a graph that rounds values to codes goes by itself where its numbers move by a bit.

A value that lies in the middle between two codes gets either, by the order in which a kernel adds.
In a deep model that is one code of thousands, and it may decide the result: of a language model of
30 layers in int4 that reads a random cache, the logits move by a quarter of their norm when a few
inputs move by their last bit. An engine that is as far from float64 as that is not wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Graph, Parameter
from dfc.ir.interpret import interpret
from dfc.ops.rounding import FARTHEST_OWN

if TYPE_CHECKING:
    from torch import Generator

_TIMES = 3
_LARGEST = 2**20  # numbers of a parameter that is moved too: all scales, biases and norms


def farthest(
    graph: Graph, inputs: Sequence[Any], original: Sequence[Any], witness: Sequence[Any], seed: int
) -> list[Any]:
    """For each result what the graph itself gives, moved or as it is, farthest from the witness,
    as far as that still says something.

    Raises:  DfcError K020 when the graph fails.
    """
    import torch

    found = list(original)
    for number in range(_TIMES):
        generator = torch.Generator().manual_seed(seed + number)
        moved = [_moved(x, generator) for x in inputs]
        parameters = {
            p.name: _moved(p.data.tensor(), generator)
            for p in graph.parameters.values()
            if _is_moved(p) and p.data is not None
        }
        torch.manual_seed(seed)
        results = interpret(graph, moved, parameters=parameters)
        for i, (x, w) in enumerate(zip(results, witness, strict=True)):
            if _distance(found[i], w) < _distance(x, w) <= FARTHEST_OWN:
                found[i] = x
    return found


def _is_moved(parameter: Parameter) -> bool:
    of = parameter.tensor_type
    return of.dtype.is_float and isinstance(of.numel, int) and of.numel <= _LARGEST


def _moved(x: Any, generator: Generator) -> Any:
    """Floats with up to one unit in the last place more or less."""
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.element_size() == 1:
        return x
    eps = torch.finfo(x.dtype).eps
    by = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
    return (x.double() * (1 + eps * by)).to(x.dtype)


def _distance(x: Any, witness: Any) -> float:
    """Of two tensors of floats, in norm, against the witness's; -1 for what is no float."""
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.shape != witness.shape:
        return -1.0
    scale = float(witness.double().norm())
    return float((x.double() - witness.double()).norm()) / scale if scale else -1.0
