"""Small graphs in few words, and what a rule makes of them.

Graphs are written like right sides are: `x: f32[2, 3]` is an input, `!w: f32[3]` a parameter,
`a = relu(x)` a node.
"""

from __future__ import annotations

import re

import torch

from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.lang.reader import parse_expression
from dfc.lang.source import Source
from dfc.ops.builder import Builder
from dfc.passes.fuse import JOURNAL, Fuse, Journal
from dfc.rewrite.construct import Construction, construct
from dfc.rewrite.deciding import Facts, base_of
from dfc.rewrite.match import Refusal, attempt
from dfc.rewrite.pass_ import Context
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rule import RuleSet
from dfc.rewrite.rulesets import instead

DOUBLE = "match y = neg(neg(x))\nrewrite y = x"
ONE = "x: f32[2, 3]\n"


def tensor_type(text: str) -> TensorType:
    dtype, dims = re.fullmatch(r"(\w+)\[(.*)\]", text).groups()  # type: ignore[union-attr]
    sizes = [d.strip() for d in dims.split(",") if d.strip()]
    return TensorType(DTYPES[dtype], tuple(int(d) if d.isdigit() else symbol(d) for d in sizes))


def graph(text: str) -> Graph:
    made = Graph("f")
    env: dict[str, object] = {}
    to = Construction(Builder(made), Facts(made))
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        if line.startswith("return"):
            made.set_outputs([env[n.strip()] for n in line[6:].split(",")])  # type: ignore[misc]
        elif line.startswith("!"):
            name, kind = (p.strip() for p in line[1:].split(":"))
            type_ = tensor_type(kind.partition(" = ")[0])
            given = kind.partition(" = ")[2]
            torch.manual_seed(len(made.parameters))
            data = torch.randn(type_.shape)  # type: ignore[arg-type]
            data = torch.full_like(data, float(given)) if given else data
            env[name] = made.add_parameter(name, type_, "parameter", TensorData(name, data))
        elif "=" in line:
            names, _, value = line.partition(" = ")
            found = construct(parse_expression(Source(value)), env, to)
            parts = found if isinstance(found, tuple) else (found,)
            for n, v in zip(names.split(","), parts, strict=True):
                env[n.strip()] = v
                made.rename(v, n.strip())
        else:
            name, kind = (p.strip() for p in line.split(":"))
            type_ = tensor_type(kind)
            made.ranges.update(dict.fromkeys(sorted(type_.symbols), (1, 64)))
            env[name] = made.add_input(name, type_)
    made.arguments = tuple(Argument(v.name, LEAF) for v in made.inputs)
    verify(made)
    return made


def ruleset(clauses: str) -> RuleSet:
    """One rule, or several that begin with `rule`. Nothing here is proved: see test_prove."""
    text = clauses if "rule " in clauses else f"rule r {{\n{clauses}\n}}"
    if "exact" not in text and "within" not in text:
        text = text.replace("}", "within 1e-5\n}")
    return rules_of(Source(f"dfc 1\n{text}\n", "t.dfc"), "t")


def shown(g: Graph) -> list[str]:
    def operand(x: object) -> str:
        if isinstance(x, tuple):
            return "[" + ", ".join(map(operand, x)) + "]"
        return "None" if x is None else x.name  # type: ignore[attr-defined]

    return [
        f"{', '.join(r.name for r in n.results)} = {base_of(n.op)}"
        f"({', '.join(operand(x) for x in n.inputs)})"
        for n in g.nodes
    ]


def rewritten(clauses: str, text: str) -> list[str]:
    """The nodes after the rule was applied wherever it fits; the graph means what it meant."""
    before, after = graph(text), graph(text)
    run(clauses, after)
    if not before.ranges:
        torch.manual_seed(0)
        inputs = [_values(v.tensor_type) for v in before.inputs]
        for a, b in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
            torch.testing.assert_close(a, b)
    return shown(after)


def _values(t: TensorType) -> torch.Tensor:
    return torch.randn([int(str(d)) for d in t.shape]).to(t.dtype.to_torch())


def run(clauses: str, g: Graph) -> Journal:
    ctx = Context()
    with instead(ruleset(clauses)):
        Fuse(rules=("t",)).run(g, ctx)
    verify(g)
    journal = ctx.products[JOURNAL]
    assert isinstance(journal, Journal)
    return journal


def fires(clauses: str, text: str) -> bool:
    g = graph(text)
    return bool(run(clauses, g).firings)


def why_not(clauses: str, text: str, at: str = "y") -> str:
    g = graph(text)
    node = next(n for n in g.nodes if at in {r.name for r in n.results})
    found = attempt(ruleset(clauses).rules[0], g, node)
    assert isinstance(found, Refusal)
    return found.reason
