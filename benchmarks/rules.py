"""A hundred rules over graphs of growing size, and the same task in other rewriters.

    python benchmarks/rules.py [sizes...]         default 1000 3000 10000 30000 100000
    python benchmarks/rules.py --peers [sizes...] default 1000 3000; the tools alternate

Goals: 10 000 nodes in at most 3 s, and time close to linear in the nodes. Times are processor
seconds of this process, so that a busy machine does not count. For TVM's Relax see
`make bench-peers`, which gives it an environment of its own (.venv-peers).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _rules_task import PATTERNS, SHAPE, Step, left_over, steps

ROUNDS = 3
LIMIT_S = 120.0  # a tool that takes longer is not tried on larger graphs
ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
Prepared = tuple[Callable[[], Any], Callable[[Any], int]]  # what is timed, and how many are left


# dfc


def rule_text() -> str:
    rules = []
    for i, (outer, a, b, left) in enumerate(PATTERNS):
        kept = "x"
        for op in reversed(left):
            kept = f"{op}({kept})"
        rules.append(
            f"rule r{i}(x) {{\n  match   y = {outer}({a}({b}(x)))\n  rewrite y = {outer}({kept})\n"
            f"  exact\n  applies x: f32[2, 3]\n}}\n"
        )
    return "dfc 1\n" + "\n".join(rules)


def dfc_graph(made: list[Step]) -> Any:
    import dfc.ops  # noqa: F401 - makes the ops known
    from dfc.ir.graph import Argument, Graph
    from dfc.ir.tree import LEAF
    from dfc.ir.types import DTYPES, TensorType

    graph = Graph("main")
    kind = TensorType(DTYPES["f32"], SHAPE)
    values: dict[int, Any] = {-1: graph.add_input("a", kind), -2: graph.add_input("b", kind)}
    graph.arguments = (Argument("a", LEAF), Argument("b", LEAF))
    for i, s in enumerate(made):
        name = {"add": "add.Tensor", "mul": "mul.Tensor"}.get(s.op, f"{s.op}.default")
        attributes = {"alpha": 1} if s.op == "add" else {}
        node = graph.add(f"aten.{name}", [values[j] for j in s.inputs], attributes, types=[kind])
        values[i] = node.result
    graph.set_outputs([values[len(made) - 1]])
    return graph


def prepare_dfc(made: list[Step]) -> Prepared:
    """Through the driver: a copy, the pass, and the checks of what it did."""
    from dfc.lang.source import Source
    from dfc.passes.fuse import Fuse
    from dfc.rewrite.driver import run_passes
    from dfc.rewrite.read_rules import rules_of
    from dfc.rewrite.rulesets import instead

    rules = rules_of(Source(rule_text(), "idle.dfc"), "idle")
    graph = dfc_graph(made)

    def run() -> Any:
        with instead(rules):  # sound by construction; what proofs take is another benchmark
            return run_passes(graph, [Fuse(("idle",))], mode="none")

    return run, lambda outcome: len(outcome.graph)


# Peers


def prepare_onnxscript(made: list[Step]) -> Prepared:
    """onnxscript.rewriter: all rules in one set."""
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    names = {s: s.capitalize() for s in {s.op for s in made}}

    def chain(ops: tuple[str, ...]) -> Callable[[Any, Any], Any]:
        def build(op: Any, x: Any) -> Any:
            for name in reversed(ops):
                x = getattr(op, name.capitalize())(x)
            return x

        return build

    rules = RewriteRuleSet(
        [RewriteRule(chain((outer, a, b)), chain((outer, *left))) for outer, a, b, left in PATTERNS]
    )
    kind = ir.TensorType(ir.DataType.FLOAT)

    def value(name: str) -> Any:
        return ir.Value(name=name, type=kind, shape=ir.Shape(SHAPE))

    values: dict[int, Any] = {-1: value("a"), -2: value("b")}
    nodes = []
    for i, s in enumerate(made):
        values[i] = value(f"v{i}")
        inputs = [values[j] for j in s.inputs]
        nodes.append(ir.Node("", names[s.op], inputs, outputs=[values[i]]))
    graph = ir.Graph(
        [values[-1], values[-2]], [values[len(made) - 1]], nodes=nodes, opset_imports={"": 21}
    )
    model = ir.Model(graph, ir_version=10)

    def run() -> Any:
        rules.apply_to_model(model)
        return model

    return run, lambda m: len(m.graph)


def prepare_fx(made: list[Step]) -> Prepared:
    """torch.fx.subgraph_rewriter.replace_pattern, once for each rule."""
    import torch
    from torch.fx import Graph, GraphModule
    from torch.fx.subgraph_rewriter import replace_pattern

    def function(name: str) -> Any:
        return (
            getattr(torch.ops.aten, name).Tensor
            if name in ("add", "mul")
            else getattr(torch.ops.aten, name).default
        )

    def module(ops: tuple[str, ...]) -> GraphModule:
        graph = Graph()
        x = graph.placeholder("x")
        for name in reversed(ops):
            x = graph.call_function(function(name), (x,))
        graph.output(x)
        return GraphModule(torch.nn.Module(), graph)

    pairs = [(module((o, a, b)), module((o, *left))) for o, a, b, left in PATTERNS]
    graph = Graph()
    values: dict[int, Any] = {-1: graph.placeholder("a"), -2: graph.placeholder("b")}
    for i, s in enumerate(made):
        inputs = tuple(values[j] for j in s.inputs)
        values[i] = graph.call_function(function(s.op), inputs)
    graph.output(values[len(made) - 1])
    main = GraphModule(torch.nn.Module(), graph)

    def run() -> Any:
        for pattern, wanted in pairs:
            replace_pattern(main, pattern, wanted)
        return main

    return run, lambda m: len(m.graph.nodes) - 3


def time_tvm(size: int) -> tuple[float, int] | None:
    """TVM's own process: processor seconds of the rewriting, and the nodes that are left."""
    if not PEER_PYTHON.exists():
        return None
    script = Path(__file__).parent / "_rules_tvm.py"
    done = subprocess.run(
        [str(PEER_PYTHON), str(script), str(size)], capture_output=True, text=True,
        timeout=20 * LIMIT_S,
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    seconds, left = done.stdout.split()[-2:]
    return float(seconds), int(left)


TOOLS: dict[str, Callable[[list[Step]], Prepared]] = {
    "dfc": prepare_dfc, "onnxscript": prepare_onnxscript, "torch.fx": prepare_fx,
}  # fmt: skip


def timed(tool: str, made: list[Step]) -> tuple[float, int]:
    run, count = TOOLS[tool](made)
    start = time.process_time()
    found = run()
    return time.process_time() - start, count(found)


def curve(sizes: list[int]) -> None:
    print(f"{len(PATTERNS)} rules, dfc, through the driver (copy, pass, checks)")
    print(f"{'nodes':>8} {'rewrites':>9} {'s':>8} {'us/node':>8}")
    points = []
    timed("dfc", steps(200)[0])  # loads what is loaded once
    for size in sizes:
        made, rewrites = steps(size)
        taken, left = timed("dfc", made)
        assert left == left_over(made), (left, left_over(made))
        points.append((math.log(size), math.log(taken)))
        print(f"{size:>8} {rewrites:>9} {taken:>8.2f} {taken / size * 1e6:>8.0f}", flush=True)
    if len(points) > 2:
        print(f"time grows with the nodes to the power of {slope(points):.2f}")


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent of growth: least squares on the logarithms."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def peers(sizes: list[int]) -> None:
    print(f"{len(PATTERNS)} rules; processor seconds, median of {ROUNDS} alternating rounds")
    print(f"{'nodes':>8} {'tool':11} {'s':>8} {'spread':>14} {'times dfc':>10} {'left':>7}")
    out: set[str] = set()
    for tool in TOOLS:
        timed(tool, steps(200)[0])  # loads what is loaded once
    for size in sizes:
        made, _ = steps(size)
        times: dict[str, list[float]] = {t: [] for t in [*TOOLS, "tvm relax"]}
        left: dict[str, int] = {}
        for _ in range(ROUNDS):
            for tool in times:
                if tool in out:
                    continue
                found = time_tvm(size) if tool == "tvm relax" else timed(tool, made)
                if found is None:
                    out.add(tool)
                    print(f"{'':8} {tool:11} is not here: make bench-peers", flush=True)
                    continue
                times[tool].append(found[0])
                left[tool] = found[1]
                if found[0] > LIMIT_S:
                    out.add(tool)
        for tool, t in times.items():
            if t:
                note = "" if left[tool] == left_over(made) else "  (merges equal nodes as well)"
                print(f"{size:>8} {tool:11} {median(t):>8.2f} {min(t):>6.2f}..{max(t):<6.2f} "
                      f"{median(t) / median(times['dfc']):>10.1f} {left[tool]:>7}{note}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    if "--peers" in sys.argv:
        peers(numbers or [1_000, 3_000])
    else:
        curve(numbers or [1_000, 3_000, 10_000, 30_000, 100_000])
