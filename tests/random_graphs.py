"""Random typed graphs: what a pass may meet, from a seed.

More than forty ops over several dtypes and awkward sizes (0 and 1 among them, a symbol in every
third graph), with the things that passes look for: twins, no-ops, constants, dead nodes, dropout,
batch norm behind layers, mutations, effects, nested graphs, declared ops. Every node's type comes
from its type rule; an op that refuses what it is offered is left out.
"""

from __future__ import annotations

from functools import cache

import torch

import dfc.ops  # noqa: F401
from dfc.ir.graph import Graph
from tests import random_ops  # noqa: F401 - its recipes are what is drawn from
from tests.random_maker import Maker, random_tensor


@cache
def random_graph(seed: int, nodes: int = 30) -> Graph:
    """The graph of a seed. It is shared: copy it before changing it."""
    return Maker(seed).graph(nodes)


def random_inputs(graph: Graph, seed: int, size: int = 3) -> list[torch.Tensor]:
    """Inputs of a graph, every symbol bound to one size."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for v in graph.inputs:
        t = v.tensor_type.substitute(dict.fromkeys(v.type.symbols, size))
        found.append(random_tensor(t, generator))
    return found
