"""`except worst(3)`: the layers that a step costs most, found by measuring when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from dfc.counting import counted
from dfc.ir.graph import Graph
from dfc.lang import syntax as s
from dfc.lang.selectors import Selector, parse_selector, worst_of
from dfc.lang.wording import expression_text
from dfc.recipe.metrics import UserMetric
from dfc.recipe.sensitivity import Measuring, Run, Sensitivity
from dfc.rewrite.pass_ import Context, Pass


@dataclass(frozen=True)
class Settled:
    """A step with its `worst(...)` replaced by layers, and what was measured for it."""

    step: Pass
    sensitivity: Sensitivity
    layers: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(x or "the model itself" for x in self.layers) or "none"
        return (
            f"{names} of {counted(len(self.sensitivity.layers), 'layer')}, by {self.sensitivity.by}"
        )


def asks_for_worst(p: Pass) -> bool:
    """Whether an option of a step names its worst layers."""
    return any(
        isinstance(x, Selector) and worst_of(x.what)
        for x in (getattr(p, f.name) for f in fields(p))  # type: ignore[arg-type]
    )


def settle(
    p: Pass, graph: Graph, ctx: Context, say: Callable[[str], None],
    metric: UserMetric | None = None, run: Run | None = None, engine: str = "",
) -> Settled:  # fmt: skip
    """Measure a step layer by layer, and put the worst layers where its options say `worst`.

    The order goes by the drop of the metric where there is one, which is called once for each
    layer on what `run` makes of a graph (on `engine`); else by the distance of results. Meanwhile
    `worst(n)` stands for nothing: of `except worst(2), "head"` the head is left out and
    every other layer measured.
    Raises:  DfcError Q052, D085; what the step raises.
    """
    found = Measuring(graph, p, ctx, say, metric, run, engine=engine).measured()
    ranked = [e.layer for e in found.layers]
    chosen: dict[str, None] = {}
    changes: dict[str, Any] = {}
    for f in fields(p):  # type: ignore[arg-type]
        selector = getattr(p, f.name)
        if isinstance(selector, Selector) and worst_of(selector.what):
            text = _text(selector.what, ranked, chosen)
            changes[f.name] = parse_selector(text)
    return Settled(replace(p, **changes), found, tuple(chosen))  # type: ignore[type-var]


def _text(x: s.Expr, ranked: list[str], chosen: dict[str, None]) -> str:
    """A selector's text with layers in the place of `worst`."""
    if isinstance(x, s.Call) and x.name.name == "worst":
        layers = ranked[: count_of(x, len(ranked))]
        chosen.update(dict.fromkeys(layers))
        return f"({' | '.join(map(json.dumps, layers))})"
    if isinstance(x, s.Binary):
        return f"({_text(x.left, ranked, chosen)} {x.op} {_text(x.right, ranked, chosen)})"
    if isinstance(x, s.Unary):
        return f"(not {_text(x.operand, ranked, chosen)})"
    return expression_text(x)


def count_of(x: s.Call, layers: int) -> int:
    """How many of so many layers `worst(3)` and `worst(10%)` mean: one at least."""
    count = x.arguments[0]
    assert isinstance(count, s.Number)
    if count.unit == "%":
        return min(layers, max(1, round(layers * count.value / 100)))
    return min(layers, int(count.value))
