"""Whether the last dimension of a value holds everything twice, as rotary angles do.

Models compute D/2 angles and write each twice, in two halves or side by side, so that one product
turns a whole head. The op that turns it wants each angle once: a rule must know that the two agree.
"""

from __future__ import annotations

from dfc.ir.graph import Node, Parameter, Value
from dfc.ir.types import TensorType

MAX_DEPTH = 64  # nodes back; beyond, nothing is known
HALVES, PAIRS = "halves", "pairs"  # [a b c a b c], [a a b b c c]

# Each element of the result depends on the elements in its place.
_ELEMENTWISE = frozenset(
    """cos sin exp neg abs sqrt rsqrt reciprocal mul add sub div pow _to_copy to clone contiguous
    alias detach""".split()  # noqa: SIM905
)
_VIEWS = frozenset("unsqueeze squeeze expand slice select transpose permute view reshape".split())  # noqa: SIM905
_ROWS = frozenset("embedding index_select index".split())  # noqa: SIM905


def repeats(value: Value, how: str) -> bool:
    """Whether the last dimension is known to be two copies, in this order.

    Cost:  linear in the nodes behind the value, at most MAX_DEPTH back.
    """
    return _repeats(value, how, MAX_DEPTH, {})


Memo = dict[Value, bool]


def _repeats(value: Value, how: str, depth: int, memo: Memo) -> bool:
    if value not in memo:
        memo[value] = _found(value, how, depth, memo)
    return memo[value]


def _found(value: Value, how: str, depth: int, memo: Memo) -> bool:
    if not isinstance(value.type, TensorType) or not value.type.rank or depth == 0:
        return False
    last = value.type.shape[-1]
    if not isinstance(last, int) or last % 2:
        return False
    if isinstance(value, Parameter):
        return _in_data(value, how)
    return (
        value.node is not None
        and value.index == 0
        and _in_node(value, value.node, how, depth, memo)
    )


def _in_data(p: Parameter, how: str) -> bool:
    import torch

    if p.data is None or p.kind == "state":
        return False
    data = p.data.tensor()
    if how == PAIRS:
        return torch.equal(data[..., 0::2], data[..., 1::2])
    half = data.shape[-1] // 2
    return torch.equal(data[..., :half], data[..., half:])


def _in_node(value: Value, node: Node, how: str, depth: int, memo: Memo) -> bool:
    name = node.op.removeprefix("aten.").partition(".")[0] if node.op.startswith("aten.") else ""
    operands = list(node.operands)
    if name in _ELEMENTWISE:
        return all(_is_number(v) or _repeats(v, how, depth - 1, memo) for v in operands)
    if name == "cat":
        return how == HALVES and _at_end(node, value) and _twice(operands)
    if name == "repeat_interleave":
        once = node.attributes.get("repeats") == 2 and len(operands) == 1
        return how == PAIRS and once and _at_end(node, value)
    if not operands:
        return False
    if name in _VIEWS:
        if how == PAIRS and name in ("view", "reshape") and _merged_pairs(operands[0]):
            return True
        return _keeps_last(name, node, operands[0]) and _repeats(operands[0], how, depth - 1, memo)
    if name in _ROWS and (name == "embedding" or operands[0].tensor_type.rank > 1):
        return _picks_rows(name, node) and _repeats(operands[0], how, depth - 1, memo)
    return False


def _is_number(v: Value) -> bool:
    """One element for all of a row."""
    return not v.tensor_type.rank or v.tensor_type.shape[-1] == 1


def _twice(operands: list[Value]) -> bool:
    return len(operands) == 2 and operands[0] is operands[1]


def _at_end(node: Node, value: Value) -> bool:
    dim = node.attributes.get("dim")
    return isinstance(dim, int) and dim % value.tensor_type.rank == value.tensor_type.rank - 1


def _merged_pairs(x: Value) -> bool:
    """`stack([f, f], -1)` before its last two dimensions become one."""
    node = x.node
    if node is None or not node.op.startswith("aten.stack.") or x.tensor_type.shape[-1] != 2:
        return False
    return _at_end(node, x) and _twice(list(node.operands))


def _keeps_last(name: str, node: Node, x: Value) -> bool:
    """Whether a view leaves the last dimension as it is, in its place."""
    rank, at = x.tensor_type.rank, node.attributes
    last = node.results[0].tensor_type.shape[-1:]
    if last != x.tensor_type.shape[-1:]:
        return False
    if name == "transpose":
        return rank - 1 not in {at["dim0"] % rank, at["dim1"] % rank}
    if name == "permute":
        return bool(at["dims"][-1] % rank == rank - 1)
    if name == "unsqueeze":
        return bool(at["dim"] % (rank + 1) != rank)
    if name in ("squeeze", "select"):
        dims = at.get("dim")
        every = dims if isinstance(dims, tuple) else (dims,)
        return all(isinstance(d, int) and d % rank != rank - 1 for d in every)
    return True  # slice of its whole length, expand, view


def _picks_rows(name: str, node: Node) -> bool:
    if name == "index_select":
        dim, rank = node.attributes["dim"], next(node.operands).tensor_type.rank
        return bool(dim % rank != rank - 1)
    if name == "index":
        given = node.inputs[1]
        rank = next(node.operands).tensor_type.rank
        taken = [i for i, v in enumerate(given or ()) if v is not None]  # type: ignore[arg-type]
        return taken == list(range(len(taken))) and len(taken) < rank
    return True
