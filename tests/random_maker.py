"""One random graph in the making: inputs, parameters, values so far, and choices among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import dfc.ops  # noqa: F401
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph, Loc, Node, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.weights import TensorData
from dfc.ops.builder import Builder

SIZES = (0, 1, 2, 3, 7, 16)
SYMBOL_RANGE = (2, 8)
Recipe = Callable[["Maker"], "Node | None"]
RECIPES: list[tuple[int, Recipe]] = []


def random_tensor(t: TensorType, generator: torch.Generator) -> torch.Tensor:
    shape = [int(s) for s in t.shape]  # type: ignore[arg-type]
    if t.dtype.is_float:
        return torch.randn(shape, generator=generator).to(t.dtype.to_torch())
    high = 2 if t.dtype.kind == "bool" else 3
    return torch.randint(0, high, shape, generator=generator).to(t.dtype.to_torch())


class Maker:
    """One graph in the making: values so far, and random choices among them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tensors = torch.Generator().manual_seed(seed)
        self.symbolic = seed % 3 == 0
        self.made = Graph(f"seed{seed}")
        self.b = Builder(self.made)
        self.values: list[Value] = []

    def graph(self, nodes: int) -> Graph:
        g, rng = self.made, self.rng
        if self.symbolic:
            g.ranges["B"] = SYMBOL_RANGE
        self.common = tuple(rng.choice(SIZES[1:]) for _ in range(2))
        for name in "abcd":
            self.values.append(g.add_input(name, self.type("f32" if name in "ab" else None)))
        if self.symbolic and not any(v.type.symbols for v in g.inputs):
            t = TensorType(DTYPES["f32"], (symbol("B"), *self.common))
            self.values.append(g.add_input("e", t))
        if not any(v.type.symbols for v in g.inputs):
            g.ranges.clear()
        g.arguments = tuple(Argument(v.name, LEAF) for v in g.inputs)
        for i in range(3):
            self.values.append(self.parameter(f"p{i}", self.type(static=True)))
        weights = [weight for weight, _ in RECIPES]
        while len(g) < nodes:
            self.step(rng.choices(RECIPES, weights)[0][1])
        self.finish()
        return g

    def step(self, recipe: Recipe) -> None:
        count = len(self.made)
        try:
            node = recipe(self)
        except DfcError as e:
            assert e.code in ("V020", "V011"), e
            node = None
        if node is None:
            self.drop_after(count)
            return
        self.values += [r for r in node.results if isinstance(r.type, TensorType)]
        if self.rng.random() < 0.3:
            node.loc = Loc("net.py", self.rng.randrange(1, 99), "block")

    def drop_after(self, count: int) -> None:
        for node in self.made.reversed_nodes:
            if len(self.made) <= count:
                return
            self.made.erase(node)

    def finish(self) -> None:
        g, rng = self.made, self.rng
        last = [v for v in self.values if v.node is not None][-8:]
        chosen = rng.sample(last, min(len(last), rng.randrange(2, 6)))
        chosen += rng.sample(self.values, 1)
        mutations = []
        buffer = self.parameter("state", TensorType(DTYPES["f32"], (3,)), "buffer")
        if rng.random() < 0.4:
            new = self.b("aten.mul.Scalar", buffer, other=0.5)
            mutations.append((buffer, new))
            chosen.append(self.b("aten.add.Scalar", buffer, other=1))
        g.set_outputs(chosen, Seq("tuple", tuple(LEAF for _ in chosen)), mutations)

    # choices

    def type(self, dtype: str | None = None, static: bool = False) -> TensorType:
        rng = self.rng
        name = dtype or rng.choice(("f32", "f32", "f32", "f64", "i64", "i32", "bool", "f16"))
        shape: list[Any] = list(self.common[: rng.randrange(3)])
        shape = [rng.choice(SIZES), *shape] if rng.random() < 0.5 else shape
        if self.symbolic and not static and rng.random() < 0.6:
            shape.insert(0, symbol("B"))
        return TensorType(DTYPES[name], tuple(shape))

    def parameter(self, name: str, t: TensorType, kind: str = "parameter") -> Value:
        tensor = random_tensor(t, self.tensors)
        if name.endswith("var"):
            tensor = tensor.abs() + 0.1
        return self.made.add_parameter(name, t, kind, TensorData(name, tensor))

    def fresh(self, wish: str) -> str:
        n = len(self.made.parameters)
        return f"{wish}{n}"

    def pick(self, test: Callable[[TensorType], bool] = lambda t: True) -> Value:
        """A value that passes the test, the later ones more often."""
        fits = [v for v in self.values if test(v.tensor_type)]
        if not fits:
            raise DfcError("V020", "nothing fits")
        if self.rng.random() < 0.5:
            fits = fits[-6:]
        return self.rng.choice(fits)

    def float(self, rank: int = 0) -> Value:
        return self.pick(lambda t: t.dtype.is_float and t.rank >= rank)

    def like(self, v: Value) -> Value:
        """Another value of the same dtype that may broadcast with it."""
        t = v.tensor_type

        def fits(u: TensorType) -> bool:
            pairs = zip(reversed(u.shape), reversed(t.shape), strict=False)
            return u.dtype == t.dtype and all(a == b or a == 1 or b == 1 for a, b in pairs)

        return self.pick(fits)

    def dim(self, v: Value, extra: int = 0) -> int:
        rank = v.tensor_type.rank + extra
        if rank == 0:
            raise DfcError("V020", "no dimension")
        return self.rng.randrange(-rank, rank)


def recipe(weight: int = 2) -> Callable[[Recipe], Recipe]:
    def register(function: Recipe) -> Recipe:
        RECIPES.append((weight, function))
        return function

    return register
