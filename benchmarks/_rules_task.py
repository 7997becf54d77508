"""The task that rewriters are compared on: a hundred exact rules and graphs of any size.

Each rule takes an idle step out of a chain: `tanh(neg(neg(x)))` is `tanh(x)`. The graph is a
random mesh of elementwise ops in which about one node in seven is the end of such a chain; no
rewrite makes room for another, so that every tool has the same rewrites to make and the same graph
to end with. No torch is needed here: TVM runs in an environment of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# What PyTorch, ONNX and TVM's Relax all have; the names are PyTorch's.
OUTER = (
    "acos", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "exp", "floor", "log", "round",
    "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh", "erf",
)  # fmt: skip
# The two inner ops, and what is left of them.
IDLE = {
    ("neg", "neg"): (), ("relu", "relu"): ("relu",), ("abs", "neg"): ("abs",),
    ("abs", "abs"): ("abs",), ("relu", "abs"): ("abs",),
}  # fmt: skip
PATTERNS = [(outer, a, b, left) for outer in OUTER for (a, b), left in IDLE.items()]
SHAPE = (4, 8)


@dataclass(frozen=True)
class Step:
    """One node: an op on earlier values; -1 and -2 are the graph's two inputs."""

    op: str
    inputs: tuple[int, ...]


def steps(count: int, seed: int = 0) -> tuple[list[Step], int]:
    """About `count` nodes, and how many rewrites there are to make."""
    rng = random.Random(seed)
    made: list[Step] = []
    ends = [-1, -2]  # values that may be read
    unread = {-1, -2}
    found = 0
    while len(made) + len(unread) < count:
        source = rng.choice(ends[-60:])
        unread.discard(source)
        if rng.random() < 0.2:
            outer, a, b, _ = PATTERNS[rng.randrange(len(PATTERNS))]
            for op in (b, a, outer):
                made.append(Step(op, (source,)))
                source = len(made) - 1
            found += 1
        elif rng.random() < 0.5:
            made.append(Step(rng.choice(OUTER), (source,)))
        else:
            other = rng.choice(ends[-60:])
            unread.discard(other)
            made.append(Step(rng.choice(("add", "mul")), (source, other)))
        ends.append(len(made) - 1)
        unread.add(len(made) - 1)
    first, *rest = sorted(unread)
    for other in rest:  # so that nothing is dead
        made.append(Step("add", (first, other)))
        first = len(made) - 1
    return made, found


def left_over(made: list[Step]) -> int:
    """Nodes that are left when every rewrite has been made."""
    gone = 0
    for i in range(2, len(made)):
        a, b = made[i - 1], made[i - 2]
        chain = made[i].inputs == (i - 1,) and a.inputs == (i - 2,)
        left = IDLE.get((a.op, b.op)) if chain and made[i].op in OUTER else None
        if left is not None:
            gone += 2 - len(left)
    return len(made) - gone
