"""Graph work against graph size: canonicalize + cse + dce, and printing + parsing.

    python benchmarks/graph_scale.py [sizes...]         default 1000 10000 100000

Goals: 100 000 nodes through the passes in at most 10 s, 10 000 nodes printed and parsed in at
most 3 s, and time close to linear in the number of nodes.
"""

from __future__ import annotations

import sys
import time

import dfc
import dfc.ops
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph, Value
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import find_pass


def synthetic(count: int) -> Graph:
    """A graph of varied ops and shapes with dead code, twins and things to canonicalize."""
    graph = Graph("main")
    batch = symbol("B")
    graph.ranges = {"B": (1, 64)}
    x = graph.add_input("x", TensorType(DTYPES["f32"], (batch, 8, 16)))
    graph.arguments = (Argument("x", LEAF),)
    recent: list[Value] = [x]
    for i in range(count):
        a = recent[(i * 7) % len(recent)]
        b = recent[(i * 13) % len(recent)]
        kind = i % 8
        if kind < 2:
            v = graph.add("aten.relu.default", [a]).result
        elif kind < 4 and a.type == b.type:
            v = graph.add("aten.add.Tensor", [a, b], {"alpha": 1}).result
        elif kind == 4:
            shape = (batch, 8, 16) if a.tensor_type.rank == 2 else (batch, 128)
            t = a.tensor_type.with_shape(shape)
            v = graph.add(
                "aten.view.default", [a], {"size": (batch, *shape[1:-1], -1)}, types=[t]
            ).result
        elif kind == 5:
            v = graph.add("aten.mul.Scalar", [a], {"other": 1 + i % 5}).result
        elif kind == 6:
            t = a.tensor_type
            dims = {"dim0": -1, "dim1": -2 if t.rank > 2 else -1}
            flipped = (*t.shape[:-2], t.shape[-1], t.shape[-2]) if t.rank > 2 else t.shape
            v = graph.add("aten.transpose.int", [a], dims, types=[t.with_shape(flipped)]).result
            v = graph.add("aten.transpose.int", [v], dims, types=[t]).result
        else:
            v = graph.add("aten.tanh.default", [a]).result
        recent.append(v)
        if len(recent) > 50:
            recent.pop(0)
    graph.set_outputs([recent[-1]])
    return graph


def main(sizes: list[int]) -> None:
    names = ("canonicalize", "cse", "dce")
    print(
        f"{'nodes':>8} {'passes s':>9} {'us/node':>8} {'print s':>8} {'parse s':>8} {'us/node':>8}"
    )
    for size in sizes:
        graph = synthetic(size)
        start = time.perf_counter()
        outcome = run_passes(graph, [find_pass(n) for n in names], mode="none")
        passes_s = time.perf_counter() - start
        start = time.perf_counter()
        text = str(graph)
        print_s = time.perf_counter() - start
        start = time.perf_counter()
        again = dfc.parse(text)
        parse_s = time.perf_counter() - start
        assert len(again) == len(graph) and len(outcome.graph) < len(graph)
        print(
            f"{size:>8} {passes_s:>9.2f} {passes_s / size * 1e6:>8.1f} {print_s:>8.2f} "
            f"{parse_s:>8.2f} {(print_s + parse_s) / size * 1e6:>8.1f}"
        )


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1_000, 10_000, 100_000])
