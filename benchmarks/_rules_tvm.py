"""The task of rules.py in TVM's Relax pattern rewriter; run by rules.py in TVM's own environment.

Prints processor seconds of the rewriting and the nodes that are left. Of Relax's two ways (one
`rewrite_call` for each rule, or all rules in one `PatternMatchingRewriter`), the one that is asked
for: `chain` (default) or `all`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _rules_task import PATTERNS, SHAPE, steps
from tvm import relax
from tvm.relax.dpl import is_op, rewrite_call, wildcard

NAMES = {"neg": "relax.negative", "relu": "relax.nn.relu", "mul": "relax.multiply"}


def name(op: str) -> str:
    return NAMES.get(op, f"relax.{op}")


def call(op: str, *args: relax.Expr) -> relax.Expr:
    if op == "relu":
        return relax.op.nn.relu(*args)
    short = name(op).removeprefix("relax.")
    return getattr(relax.op, short)(*args)


def build(count: int) -> relax.Function:
    made, _ = steps(count)
    kind = (
        relax.TensorStructInfo(SHAPE, "float32")
        if hasattr(relax, "TensorStructInfo")
        else (relax.TensorType(SHAPE, "float32"))
    )
    a, b = relax.Var("a", kind), relax.Var("b", kind)
    values: dict[int, relax.Expr] = {-1: a, -2: b}
    builder = relax.BlockBuilder()
    with builder.function("main", [a, b]):
        with builder.dataflow():
            for i, s in enumerate(made[:-1]):
                values[i] = builder.emit(call(s.op, *(values[j] for j in s.inputs)))
            last = builder.emit_output(call(made[-1].op, *(values[j] for j in made[-1].inputs)))
        builder.emit_func_output(last)
    return builder.finalize()["main"]


def main(count: int) -> None:
    function = build(count)
    rules = []
    for outer, a, b, left in PATTERNS:
        x = wildcard()
        rules.append((is_op(name(outer))(is_op(name(a))(is_op(name(b))(x))), x, outer, left))
    start = time.process_time()
    for pattern, x, outer, left in rules:

        def rewriter(expr, matches, x=x, outer=outer, left=left):
            found = matches[x]
            for op in reversed(left):
                found = call(op, found)
            return call(outer, found)

        function = rewrite_call(pattern, rewriter, function)
    taken = time.process_time() - start
    print(taken, sum(len(block.bindings) for block in function.body.blocks))


if __name__ == "__main__":
    main(int(sys.argv[1]))
