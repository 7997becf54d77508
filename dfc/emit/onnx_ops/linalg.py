"""Linear algebra of small matrices, unrolled: ONNX has products only.

Every algorithm walks over the columns of a matrix whose size is known, batched over the rest.
"""

from __future__ import annotations

from typing import Any

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import REFUSED, translates
from dfc.emit.onnx_types import D

_LARGEST = 64  # columns; an unrolled algorithm has some ten nodes for each


def _size(b: Builder, x: Val) -> int:
    n, m = b.type(x).shape[-2:]
    if not isinstance(n, int) or not isinstance(m, int):
        raise b.refuse("the matrix has no fixed size")
    if max(n, m) > _LARGEST:
        raise b.refuse(f"the matrix is larger than {_LARGEST}, too large to unroll")
    return n


def _eye(b: Builder, n: int, like: Val) -> Val:
    import numpy as np

    assert like.dtype is not None
    return b.array(np.eye(n).astype(like.dtype.numpy()), like.dtype)


def _row(b: Builder, x: Val, i: Any) -> Val:
    return b.op("Slice", x, [i], [i + 1], [-2]) if isinstance(i, int) else x


def _column(b: Builder, x: Val, i: int) -> Val:
    return b.op("Slice", x, [i], [i + 1], [-1])


def _one(b: Builder, i: int, n: int, like: Val, column: bool) -> Val:
    import numpy as np

    assert like.dtype is not None
    v = np.zeros((n, 1) if column else (1, n))
    v.reshape(-1)[i] = 1
    return b.array(v.astype(like.dtype.numpy()), like.dtype)


def _wide(b: Builder, x: Val) -> Val:
    """Float64 inside: an unrolled elimination would lose more than LAPACK's."""
    return b.cast(x, D.DOUBLE)


def _turn(b: Builder, x: Val, rank: int) -> Val:
    return b.transpose(x, [*range(rank - 2), rank - 1, rank - 2])


def _eliminate(
    b: Builder, a: Val, rhs: Val | None, n: int, rank: int
) -> tuple[Val, Val | None, Val]:
    """Gauss-Jordan with partial pivoting. Gives the reduced matrix, the solution, the determinant.

    The pivot row is found by ArgMax and swapped in by a rank-one update, so the batch may pivot
    differently.
    """
    determinant: Val | None = None
    import numpy as np

    for i in range(n):
        column = b.op("Abs", _column(b, a, i))
        allowed = b.array((np.arange(n) >= i).reshape(n, 1))
        column = b.op("Where", allowed, column, b.like(-1.0, a))
        pivot = b.op("ArgMax", column, axis=-2, keepdims=1)  # *, 1, 1
        chosen = b.cast(
            b.op("Equal", b.array(np.arange(n).reshape(n, 1)), pivot), D.DOUBLE
        )  # *, n, 1
        swap = b.op("Sub", chosen, _one(b, i, n, a, True))  # e_p - e_i
        turned = _turn(b, swap, rank)
        a = b.op("Sub", a, b.op("Mul", swap, b.op("MatMul", turned, a)))
        if rhs is not None:
            rhs = b.op("Sub", rhs, b.op("Mul", swap, b.op("MatMul", turned, rhs)))
        value = b.op("Slice", _row(b, a, i), [i], [i + 1], [-1])  # *, 1, 1
        same = b.op("Equal", pivot, i)
        signed = b.op("Where", same, value, b.op("Neg", value))
        determinant = signed if determinant is None else b.op("Mul", determinant, signed)
        factors = b.op("Div", _column(b, a, i), value)
        if rhs is None:
            below = b.array((np.arange(n) > i).reshape(n, 1))
            factors = b.op("Where", below, factors, b.like(0.0, a))
        else:
            own = b.array((np.arange(n) == i).reshape(n, 1))
            scale = b.op("Sub", b.like(1.0, a), b.op("Div", b.like(1.0, a), value))
            factors = b.op("Where", own, scale, factors)
            rhs = b.op("Sub", rhs, b.op("Mul", factors, _row(b, rhs, i)))
        a = b.op("Sub", a, b.op("Mul", factors, _row(b, a, i)))
    assert determinant is not None
    return a, rhs, b.squeeze(determinant, -2, -1)


@translates("linalg_inv", "inverse", "linalg_inv_ex")
def inverse(b: Builder, x: Val, call: Call) -> Any:
    n = _size(b, x)
    wide = _wide(b, x)
    start = b.op("Expand", _eye(b, n, wide), b.op("Shape", wide))
    _, found, _ = _eliminate(b, wide, start, n, b.rank(x))
    if len(call.results) == 1:
        return found
    return [found, b.op("Expand", b.const(0, D.INT32), b.sizes.vector(b, call.results[1].shape))]  # type: ignore[union-attr]


@translates("linalg_solve", "_linalg_solve_ex", "linalg_solve_ex")
def solve(b: Builder, x: Val, B: Val, call: Call) -> Any:
    if call.attributes.get("left") is False:
        raise b.refuse("a solve from the right")
    n = _size(b, x)
    vector = b.rank(B) == b.rank(x) - 1 and call.result.rank == b.rank(B)
    rhs = _wide(b, B)
    if vector:
        rhs = b.unsqueeze(rhs, -1)
    _, found, _ = _eliminate(b, _wide(b, x), rhs, n, b.rank(x))
    assert found is not None
    if vector:
        found = b.squeeze(found, -1)
    if len(call.results) > 1:
        raise b.refuse("the factors of a solve")
    return found


@translates("linalg_det", "det", "logdet", "linalg_slogdet", "slogdet")
def determinant(b: Builder, x: Val, call: Call) -> Any:
    n = _size(b, x)
    _, _, found = _eliminate(b, _wide(b, x), None, n, b.rank(x))
    if "logdet" not in call.op:
        return found
    if call.op == "aten.logdet.default":
        return b.op("Log", found)
    return [b.op("Sign", found), b.op("Log", b.op("Abs", found))]


@translates("linalg_cholesky", "cholesky", "linalg_cholesky_ex")
def cholesky(b: Builder, x: Val, upper: bool, call: Call) -> Any:
    """Column by column: each one minus what the columns before it explain."""
    import numpy as np

    n, rank = _size(b, x), b.rank(x)
    a = _wide(b, x)
    factor: Val | None = None
    for i in range(n):
        column = _column(b, a, i)
        if factor is not None:
            row = b.op("Slice", factor, [i], [i + 1], [-2])
            column = b.op("Sub", column, b.op("MatMul", factor, _turn(b, row, rank)))
        root = b.op("Sqrt", b.op("Slice", column, [i], [i + 1], [-2]))
        below = b.array((np.arange(n) >= i).reshape(n, 1))
        column = b.op("Where", below, b.op("Div", column, root), b.like(0.0, a))
        factor = column if factor is None else b.op("Concat", factor, column, axis=-1)
    assert factor is not None
    if upper:
        factor = _turn(b, factor, rank)
    if len(call.results) == 1:
        return factor
    return [factor, b.op("Expand", b.const(0, D.INT32), b.sizes.vector(b, call.results[1].shape))]  # type: ignore[union-attr]


@translates("linalg_solve_triangular", "triangular_solve")
def solve_triangular(b: Builder, x: Val, call: Call) -> Any:
    """Substitution, a row at a time."""
    a = call.attributes
    if call.op.startswith("aten.triangular") or not a.get("left", True):
        raise b.refuse("a triangular solve from the right")
    rhs = call.operands[1]
    assert not isinstance(rhs, tuple) and rhs is not None
    n = _size(b, x)
    order = range(n - 1, -1, -1) if a["upper"] else range(n)
    unit = bool(a.get("unitriangular"))
    return _substitute(b, _wide(b, x), _wide(b, rhs), order, unit)


def _substitute(b: Builder, matrix: Val, rest: Val, order: range, unit: bool = False) -> Val:
    rows: dict[int, Val] = {}
    for i in order:
        row = _row(b, rest, i)
        for j, known in rows.items():
            weight = b.op("Slice", _row(b, matrix, i), [j], [j + 1], [-1])
            row = b.op("Sub", row, b.op("Mul", weight, known))
        if not unit:
            row = b.op("Div", row, b.op("Slice", _row(b, matrix, i), [i], [i + 1], [-1]))
        rows[i] = row
    return b.op("Concat", *(rows[i] for i in sorted(rows)), axis=-2)


@translates("linalg_matrix_exp", "matrix_exp")
def matrix_exp(b: Builder, x: Val) -> Val:
    """Taylor's series of the matrix scaled down by 2^10, squared ten times."""
    n = _size(b, x)
    a = b.op("Mul", _wide(b, x), b.const(2.0**-10, D.DOUBLE))
    total = b.op("Add", a, _eye(b, n, a))
    term = a
    for k in range(2, 14):
        term = b.op("Mul", b.op("MatMul", term, a), b.const(1.0 / k, D.DOUBLE))
        total = b.op("Add", total, term)
    for _ in range(10):
        total = b.op("MatMul", total, total)
    return total


@translates("cholesky_solve")
def cholesky_solve(b: Builder, x: Val, input2: Val, upper: bool) -> Val:
    """Down with the factor, up with its transpose."""
    n, rank = _size(b, input2), b.rank(input2)
    factor, rest = _wide(b, input2), _wide(b, x)
    lower = _turn(b, factor, rank) if upper else factor
    half = _substitute(b, lower, rest, range(n))
    return _substitute(b, _turn(b, lower, rank), half, range(n - 1, -1, -1))


@translates("linalg_qr")
def qr(b: Builder, x: Val, mode: str, call: Call) -> list[Val]:
    """Householder's reflections, signs as LAPACK's: the diagonal of R is against the column's."""
    import numpy as np

    _size(b, x)
    rows, columns = (int(s) for s in b.type(x).shape[-2:])  # type: ignore[arg-type]
    rank = b.rank(x)
    r = _wide(b, x)
    q = b.op("Expand", _eye(b, rows, r), b.sizes.vector(b, [*b.type(x).shape[:-2], rows, rows]))
    for i in range(min(rows - 1, columns)):
        below = b.array((np.arange(rows) >= i).reshape(rows, 1))
        v = b.op("Where", below, _column(b, r, i), b.like(0.0, r))
        size = b.op("Sqrt", b.op("ReduceSum", b.op("Mul", v, v), [-2], keepdims=1))
        head = b.op("Slice", v, [i], [i + 1], [-2])
        side = b.op("Where", b.op("Less", head, b.like(0.0, r)), b.op("Neg", size), size)
        v = b.op("Add", v, b.op("Mul", side, _one(b, i, rows, r, True)))
        norm = b.op("ReduceSum", b.op("Mul", v, v), [-2], keepdims=1)
        none = b.op("Equal", norm, b.like(0.0, r))
        factor = b.op("Where", none, norm, b.op("Div", b.like(2.0, r), norm))
        turned = _turn(b, v, rank)
        r = b.op("Sub", r, b.op("Mul", b.op("Mul", factor, v), b.op("MatMul", turned, r)))
        q = b.op("Sub", q, b.op("MatMul", b.op("MatMul", q, v), b.op("Mul", factor, turned)))
    r = b.op("Trilu", r, upper=1)
    if mode != "complete":
        k = min(rows, columns)
        q, r = b.op("Slice", q, [0], [k], [-1]), b.op("Slice", r, [0], [k], [-2])
    return [q, r]


@translates("linalg_householder_product")
def householder_product(b: Builder, x: Val, tau: Val) -> Val:
    """The first columns of the product of the reflections that the columns below tell."""
    import numpy as np

    _size(b, x)
    rows, columns = (int(s) for s in b.type(x).shape[-2:])  # type: ignore[arg-type]
    count = b.type(tau).shape[-1]
    if not isinstance(count, int):
        raise b.refuse("the number of reflections is not fixed")
    rank = b.rank(x)
    a, scales = _wide(b, x), b.unsqueeze(_wide(b, tau), -2)
    start = b.array(np.eye(rows, columns))
    q = b.op("Expand", start, b.op("Shape", a))
    for i in reversed(range(count)):
        below = b.array((np.arange(rows) > i).reshape(rows, 1))
        v = b.op("Where", below, _column(b, a, i), b.like(0.0, a))
        v = b.op("Add", v, _one(b, i, rows, a, True))
        factor = b.op("Slice", scales, [i], [i + 1], [-1])
        change = b.op("MatMul", b.op("Mul", factor, v), b.op("MatMul", _turn(b, v, rank), q))
        q = b.op("Sub", q, change)
    return q


_FACTORIZATIONS = [
    "_linalg_svd",
    "linalg_svd",
    "linalg_svdvals",
    "linalg_eigh",
    "_linalg_eigh",
    "linalg_eig",
    "linalg_eigvalsh",
    "linalg_eigvals",
    "linalg_lstsq",
    "geqrf",
    "linalg_pinv",
]
for _name in _FACTORIZATIONS:
    REFUSED[f"aten.{_name}.default"] = (
        "ONNX has no matrix factorization, and an iteration would not converge alike"
    )
