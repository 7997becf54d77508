"""The fewest bytes that leave cheap operators to recomputation: every other choice is tried."""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import combinations

import pytest

from dfc.ir.graph import Argument, Graph, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.builder import Builder
from dfc.planning.cost import bytes_of
from dfc.planning.rematerialize import fewest_kept, is_cheap, typical_sizes


def made(seed: int, nodes: int = 9) -> tuple[Graph, Value, list[Value]]:
    """A graph of products and cheap operators on matrices of several widths; its one input that is
    not free, and those that are."""
    rng = random.Random(seed)
    graph, widths = Graph("main"), (4, 8, 16)
    b = Builder(graph)
    f32 = DTYPES["f32"]
    x = graph.add_input("x", TensorType(f32, (8, 8)))
    pairs = [(k, n) for k in widths for n in widths]
    weights = {(k, n): graph.add_input(f"w{k}_{n}", TensorType(f32, (k, n))) for k, n in pairs}
    graph.arguments = tuple(Argument(v.name, LEAF) for v in graph.inputs)
    values = [x]
    for _ in range(nodes):
        v = rng.choice(values[-4:])
        width = int(str(v.tensor_type.shape[1]))
        match rng.randrange(5):
            case 0 | 1:
                new = b("aten.mm.default", v, weights[width, rng.choice(widths)])
            case 2:
                new = b("aten.gelu.default", v)
            case 3:
                same = [o for o in values if o.tensor_type == v.tensor_type]
                new = b("aten.add.Tensor", v, rng.choice(same))
            case _:
                new = b("aten.slice.Tensor", v, dim=1, start=0, end=4)
        values.append(new)
    graph.set_outputs([values[-1]], Seq("tuple", (LEAF,)))
    return graph, x, [*weights.values()]


def makes(kept: Collection[Value], free: Collection[Value], wanted: Collection[Value]) -> bool:
    """Whether cheap operators make all that is wanted of what is kept or free."""

    def known(v: Value) -> bool:
        if v in kept or v in free:
            return True
        return v.node is not None and is_cheap(v.node) and all(map(known, v.node.operands))

    return all(map(known, wanted))


def held(v: Value) -> float:
    """A slice holds what it is cut from."""
    while v.node is not None and v.node.op.startswith("aten.slice."):
        v = next(iter(v.node.operands))
    return bytes_of(v, {})


@pytest.mark.parametrize("seed", range(12))
def test_nothing_less_would_do(seed: int) -> None:
    graph, x, free = made(seed)
    rng = random.Random(seed)
    results = [n.result for n in graph.nodes]
    wanted = rng.sample(results, 4)
    kept = fewest_kept(wanted, free, typical_sizes(graph))
    assert makes(kept, free, wanted) and not kept & {*free}
    every = [x, *results]
    least = min(
        sum(map(held, some))
        for n in range(len(wanted) + 1)
        for some in combinations(every, n)
        if makes(some, free, wanted)
    )
    assert sum(map(held, kept)) == least


def test_what_draws_numbers_or_multiplies_is_not_cheap() -> None:
    graph, _, _ = made(0)
    cheap = {n.op: is_cheap(n) for n in graph.nodes}
    assert cheap == {op: op != "aten.mm.default" for op in cheap}
    b = Builder(graph)
    x = next(iter(graph.inputs))
    assert not is_cheap(b.node("aten.bernoulli.default", x))
    assert not is_cheap(b.node("aten.rand_like.default", x))
