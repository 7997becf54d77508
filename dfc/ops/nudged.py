"""How far a graph goes by itself where its numbers move by as much as any engine may move them.

A value that lies in the middle between two codes gets either, by the order in which a kernel adds.
In a deep model that is one code of thousands, and it may decide the result: of a language model of
30 layers in int4 that reads a random cache, the logits move by a quarter of their norm when a few
inputs move by their last bit. An engine that is as far from float64 as that is not wrong.

A function that saturates at 1 is exact to a few units in the last place of 1, however small its
result is: engines compute it by polynomials that are fitted so. Of a sigmoid of 3e-4 that is a
relative error of 4e-4, and where all results are as small, nothing larger hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.interpret import Observer, interpret
from dfc.ops.rounding import FARTHEST_OWN

if TYPE_CHECKING:
    from torch import Generator

_TIMES = 3
_LARGEST = 2**20  # numbers of a parameter that is moved too: all scales, biases and norms
# What engines compute by its distance from 1; their softmax is exact relatively.
_SATURATES = frozenset({"sigmoid", "special_expit", "tanh", "erf", "special_erf", "lstm"})
# In the last place of 1: ONNX Runtime's sigmoid is off by one, OpenVINO's error function by three.
_UNITS = 2  # judges allow twice what is found


def farthest(
    graph: Graph,
    inputs: Sequence[Any],
    original: Sequence[Any],
    witness: Sequence[Any],
    seed: int,
    *,
    rounded: bool,
) -> list[Any]:
    """For each result the original, moved as the graph moves, farthest from the witness, as far as
    that still says something.

    What saturates is moved always; with `rounded` inputs and parameters are too.
    Why:  the original moves, for a graph that is wrong must not vouch for itself.
    Raises:  DfcError K020 when the graph fails.
    """
    import torch

    found = list(original)
    if not rounded and not any(_saturates(n) for n in graph.walk()):
        return found
    torch.manual_seed(seed)
    still = interpret(graph, inputs)
    for number in range(_TIMES):
        generator = torch.Generator().manual_seed(seed + number)
        moved, parameters = inputs, {}
        if rounded:
            moved = [_moved(x, generator) for x in inputs]
            parameters = {
                p.name: _moved(p.data.tensor(), generator)
                for p in graph.parameters.values()
                if _is_moved(p) and p.data is not None
            }
        torch.manual_seed(seed)
        results = interpret(graph, moved, parameters=parameters, observe=_mover(generator))
        for i, (x, s, o, w) in enumerate(zip(results, still, original, witness, strict=True)):
            if _distance(x, w) >= 0 and x.shape == s.shape == o.shape:
                x = (o.double() + (x.double() - s.double())).to(o.dtype)
            if _distance(found[i], w) < _distance(x, w) <= FARTHEST_OWN:
                found[i] = x
    return found


def _saturates(node: Node) -> bool:
    namespace, _, name = node.op.partition(".")
    return namespace == "aten" and name.partition(".")[0] in _SATURATES


def _mover(generator: Generator) -> Observer:
    """Adds units in the last place of 1, or takes them away, before anything reads the results."""
    import torch

    def move(node: Node, results: Sequence[Any]) -> None:
        for x in (r for r in results if r.is_floating_point()) if _saturates(node) else ():
            # Kernels compute narrower types in float32.
            unit = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps
            sign = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
            x += (_UNITS * unit * sign).to(x.dtype)

    return move


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
