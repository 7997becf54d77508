"""Bugs put into passes on purpose, one line each: what the guarded driver must catch and blame.

`HOST` is a graph in which each bug has a site; `Seeded` is a pass that makes a right change at
every node (its value is read through an alias) but the wrong one at the site of its bug.
Source:  reference trust.md 5.5
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import dfc
import dfc.ops
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.rewrite.pass_ import Context, Pass
from dfc.rewrite.probe import Probes, make_probes
from tests.golden_file import give_data

HOST = """dfc 1
graph @host(%x: f32[B, 6, 6], %y: f32[B, 6, 6], %n: i64[B, 6]) -> (f32[B, 6, 6], i64[B, 6], f32[B, 6])
    where B in 1..8 {
  !w: f32[6, 6] meta
  !b: f32[6] meta
  !g: f32[6] meta

  %lin: f32[B, 6, 6] = aten.linear.default(%x, !w, !b) loc("host.py":1 "proj")
  %sub: f32[B, 6, 6] = aten.sub.Tensor(%lin, %y, alpha=1) loc("host.py":2 "mix")
  %add: f32[B, 6, 6] = aten.add.Tensor(%sub, %y, alpha=2) loc("host.py":3 "mix")
  %turn: f32[B, 6, 6] = aten.transpose.int(%y, dim0=1, dim1=2) loc("host.py":4 "mix")
  %zero: f32[B, 6, 6] = aten.mul.Scalar(%turn, other=0) loc("host.py":5 "mix")
  %z: f32[B, 6, 6] = aten.add.Tensor(%add, %zero, alpha=1) loc("host.py":6 "mix")
  %relu: f32[B, 6, 6] = aten.relu.default(%z) loc("host.py":7 "act")
  %norm: f32[B, 6, 6] = aten.layer_norm.default(%x, !g, !b, normalized_shape=[6], eps=0.01, cudnn_enable=True) loc("host.py":8 "norm")
  %t: f32[B, 6, 6] = aten.transpose.int(%norm, dim0=1, dim1=2) loc("host.py":9 "attn")
  %soft: f32[B, 6, 6] = aten.softmax.int(%t, dim=-1, dtype=None) loc("host.py":10 "attn")
  %gelu: f32[B, 6, 6] = aten.gelu.default(%soft, approximate="none") loc("host.py":11 "act")
  %clamp: f32[B, 6, 6] = aten.clamp.default(%x, min=-0.5, max=0.5) loc("host.py":12 "act")
  %half: f16[B, 6, 6] = aten._to_copy.default(%clamp, dtype=f16) loc("host.py":13 "act")
  %back: f32[B, 6, 6] = aten._to_copy.default(%half, dtype=f32) loc("host.py":14 "act")
  %cond: bool[B, 6, 6] = aten.gt.Scalar(%x, other=0.25) loc("host.py":15 "pick")
  %pick: f32[B, 6, 6] = aten.where.self(%cond, %back, %gelu) loc("host.py":16 "pick")
  %first: f32[B, 6] = aten.select.int(%pick, dim=1, index=0) loc("host.py":17 "pool")
  %mean: f32[B, 6] = aten.mean.dim(%pick, dim=[1], keepdim=False, dtype=None) loc("host.py":18 "pool")
  %exp1: f32[B, 6] = aten.exp.default(%first) loc("host.py":19 "pool")
  %exp2: f32[B, 6] = aten.exp.default(%mean) loc("host.py":20 "pool")
  %pool: f32[B, 6] = aten.mul.Tensor(%exp1, %exp2) loc("host.py":21 "pool")
  %batch: f32[6] = aten.amax.default(%mean, dim=[0], keepdim=False) loc("host.py":22 "pool")
  %out: f32[B, 6] = aten.add.Tensor(%pool, %batch, alpha=1) loc("host.py":23 "pool")
  %div: i64[B, 6] = aten.div.Scalar_mode(%n, other=4, rounding_mode="floor") loc("host.py":24 "index")
  %drop: f32[B, 6, 6] = aten.dropout.default(%relu, p=0.5, train=True) loc("host.py":25 "drop")
  %mask: f32[B, 6, 6] = aten.dropout.default(%pick, p=0.25, train=True) loc("host.py":26 "drop")
  %sum: f32[B, 6, 6] = aten.add.Tensor(%drop, %mask, alpha=1) loc("host.py":27 "drop")
  return (%sum, %div, %out)
}
"""  # noqa: E501


def host() -> tuple[Graph, Probes]:
    """The graph with weights, and probes whose example holds an infinity."""
    graph = dfc.parse(HOST)
    give_data(graph)
    verify(graph)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 6, 6, generator=generator) for _ in range(2))
    y[0, 0, 1] = float("inf")
    n = torch.randint(-9, 9, (3, 6), generator=generator)
    return graph, make_probes(graph, [x, y, n])


@dataclass(frozen=True)
class Bug:
    """A wrong change: the value at which it is made, and what it does there."""

    name: str
    at: str
    change: Callable[[Graph, Node], object]
    by_results: bool = True  # it leaves a valid graph whose results are wrong

    def __str__(self) -> str:
        return self.name


def _attributes(**changed: Any) -> Callable[[Graph, Node], object]:
    return lambda graph, node: graph.set_attributes(node, **changed)


def _operand(i: int) -> Callable[[Graph, Node], object]:
    return lambda graph, node: graph.replace(node, [node.inputs[i]])  # type: ignore[list-item]


def _order(*order: int) -> Callable[[Graph, Node], object]:
    return lambda graph, node: graph.set_inputs_of(node, [node.inputs[i] for i in order])


def _op(op: str, *inputs: int, **attributes: Any) -> Callable[[Graph, Node], object]:
    def change(graph: Graph, node: Node) -> None:
        operands = [node.inputs[i] for i in inputs]
        types = [r.type for r in node.results]
        graph.replace(node, graph.add(op, operands, attributes, types=types, before=node))

    return change


def _zeros(graph: Graph, node: Node) -> None:
    shape = node.result.tensor_type.shape
    _op("aten.zeros.default", size=shape, dtype=DTYPES["f32"])(graph, node)


def _other_weight(graph: Graph, node: Node) -> None:
    w = graph.parameters["w"]
    assert w.data is not None and isinstance(w.type, TensorType)
    data = TensorData("folded.w", w.data.tensor() * 1.5)
    folded = graph.add_parameter("folded.w", w.type, "constant", data)
    graph.set_inputs_of(node, [node.inputs[0], folded, node.inputs[2]])


def _merge_blindly(graph: Graph, node: Node) -> None:
    twin = next(n for n in graph.nodes if n.op == node.op and n is not node)
    graph.replace(node, twin)


def _late(graph: Graph, node: Node) -> None:
    graph.move_before(node, next(graph.nodes))


def value(graph: Graph, name: str) -> Value:
    return next(r for n in graph.nodes for r in n.results if r.name == name)


def _raise(graph: Graph, node: Node) -> None:
    raise KeyError(node.result.name)


def _unknown(graph: Graph, node: Node) -> None:
    node.op = "aten.matmull.default"


def _half_done(graph: Graph, node: Node) -> None:
    graph.set_attributes(node, alpha=7)
    raise ValueError("half of it is done")


def _other_type(graph: Graph, node: Node) -> None:
    graph.set_type(node.result, node.result.tensor_type.with_dtype(DTYPES["i32"]))


BUGS = (
    Bug("swap the operands of sub", "sub", _order(1, 0)),
    Bug("ignore alpha", "add", _attributes(alpha=1)),
    Bug("fold x * 0", "zero", _zeros),
    Bug("drop a relu", "relu", _operand(0)),
    Bug("forget eps", "norm", _attributes(eps=1e-5)),
    Bug("forget the scale of a norm", "norm", _order(0, 2, 2)),
    Bug("drop a transpose of a square", "t", _operand(0)),
    Bug("softmax over another dimension", "soft", _attributes(dim=1)),
    Bug("another gelu", "gelu", _attributes(approximate="tanh")),
    Bug("forget a bound", "clamp", _attributes(max=None)),
    Bug("drop a cast to half and back", "back", lambda g, n: g.replace(
        n, [value(g, "clamp")])),
    Bug("swap the branches of where", "pick", _order(0, 2, 1)),
    Bug("greater for less", "cond", _op("aten.lt.Scalar", 0, other=0.25)),
    Bug("off by one in a select", "first", _attributes(index=1)),
    Bug("sum for mean", "mean", _op("aten.sum.dim_IntList", 0, dim=(1,), keepdim=False,
                                    dtype=None)),
    Bug("merge twins of other operands", "exp2", _merge_blindly),
    Bug("believe that the batch is 1", "batch", _op("aten.select.int", 0, dim=0, index=0)),
    Bug("divide towards zero", "div", _attributes(rounding_mode="trunc")),
    Bug("drop a random op", "drop", _operand(0)),
    Bug("fold other numbers", "lin", _other_weight),
    Bug("use a value before it is there", "pool", _late, by_results=False),
    Bug("raise on the way", "gelu", _raise, by_results=False),
    Bug("raise with half of it done", "add", _half_done, by_results=False),
    Bug("write an op that does not exist", "exp1", _unknown, by_results=False),
    Bug("state another type", "div", _other_type, by_results=False),
)  # fmt: skip


@dataclass(frozen=True)
class Seeded(Pass):
    """Right changes at all nodes, and wrong ones where the bugs are."""

    name = "seeded"

    bugs: tuple[Bug, ...] = ()
    limit: int | None = None
    skip: tuple[int, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> int:
        wrong = {b.at: b for b in self.bugs}
        done = 0
        for number, node in enumerate(list(graph.nodes)):
            if number in self.skip or done == self.limit or node.graph is not graph:
                continue
            bug = wrong.get(node.results[0].name)
            if bug is not None:
                bug.change(graph, node)
            else:
                read_through_alias(graph, node)
            done += 1
        return done

    def __str__(self) -> str:
        return self.name


def read_through_alias(graph: Graph, node: Node) -> None:
    """A change that is always right."""
    result = node.results[0]
    alias = graph.add("aten.alias.default", [result], types=[result.type], before=node)
    graph.move_before(node, alias)
    graph.replace_uses(result, alias.result, where=lambda n: n is not alias)
