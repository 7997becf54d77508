"""What one dimension is made of: a union-find over index classes that split into factors and parts.

A dimension is an axis. Two dimensions whose indices mean the same are united. A reshape refines an
axis into factors (heads x head size), a concat or a split cuts it into parts; both are kept in the
axis itself, so that whatever shares it sees them. The leaves are what pruning chooses from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dfc.ir.expr import Expr, Size, call

Kept = Callable[["Axis"], Sequence[bool]]


@dataclass(eq=False)
class Axis:
    """A dimension, or a factor or part of one. `size` may be symbolic; such a leaf is never pruned.

    C1:  `form` is "leaf", "product" (parts are factors, the outer first) or "sum" (parts lie side
         by side).
    C2:  only the representative (`find`) has a form that counts.
    """

    size: Size
    form: str = "leaf"
    parts: tuple[Axis, ...] = ()
    frozen: dict[str, None] = field(default_factory=dict)  # why it must stay: an ordered set
    marks: set[str] = field(default_factory=set)
    parent: Axis | None = None

    def __repr__(self) -> str:
        root = find(self)
        return f"<{root.form} {root.size}{' frozen' if root.frozen else ''} {id(root) % 9973}>"


def leaf(size: Size, frozen: str = "") -> Axis:
    axis = Axis(size)
    if frozen:
        axis.frozen[frozen] = None
    return axis


def find(axis: Axis) -> Axis:
    """The representative of an axis."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def product(parts: Sequence[Axis]) -> Axis:
    """The axis of a reshape that merges dimensions."""
    kept = [p for p in parts if p.size != 1]
    if len(kept) == 1:
        return kept[0]
    size: Size = 1
    for p in kept:
        size = size * p.size
    return Axis(size, "product", tuple(kept)) if kept else leaf(1)


def total(parts: Sequence[Axis]) -> Axis:
    """The axis of a concat."""
    if len(parts) == 1:
        return parts[0]
    size: Size = 0
    for p in parts:
        size = size + p.size
    return Axis(size, "sum", tuple(parts))


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves in order, as often as they occur."""
    root = find(axis)
    if root.form == "leaf":
        yield root
    else:
        for p in root.parts:
            yield from leaves(p)


def freeze(axis: Axis, reason: str) -> None:
    """Say why the indices of an axis must all stay."""
    for x in leaves(axis):
        x.frozen.setdefault(reason)


def mark(axis: Axis, word: str) -> None:
    """Note something about an axis: that a norm goes over it, that it counts heads."""
    for x in leaves(axis):
        x.marks.add(word)


def factors(axis: Axis) -> list[Axis]:
    """The factors, products inside products dissolved, those of size 1 left out."""
    root = find(axis)
    if root.form != "product":
        return [] if root.size == 1 else [root]
    return [f for p in root.parts for f in factors(p)]


def segments(axis: Axis) -> list[Axis]:
    """The parts side by side, sums inside sums dissolved."""
    root = find(axis)
    if root.form != "sum":
        return [root]
    return [s for p in root.parts for s in segments(p)]


def unite(a: Axis, b: Axis, why: str = "") -> None:
    """Let the indices of two axes of one size mean the same; what cannot be matched is frozen."""
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return
    if a.size != b.size:
        _clash(a, b, why)
    elif a.form == "leaf":
        _link(a, b)
    elif b.form == "leaf":
        _link(b, a)
    elif a.form == b.form == "product":
        if _unite_factors(factors(a), factors(b), why) and find(a) is not find(b):
            _join(a, b)
    elif a.form == b.form == "sum":
        _unite_sums(a, b, why)
    else:
        chain, parts = (a, b) if a.form == "product" else (b, a)
        _unite_mixed(chain, parts, why)


def _clash(a: Axis, b: Axis, why: str) -> None:
    reason = f"its indices are arranged in two ways{why and f' at {why}'}"
    freeze(a, reason)
    freeze(b, reason)


def _join(a: Axis, b: Axis) -> None:
    find(a).parent = find(b)


def _link(a: Axis, b: Axis) -> None:
    """Let the leaf a be b, with what is known of it."""
    for reason in a.frozen:
        freeze(b, reason)
    for word in a.marks:
        mark(b, word)
    a.parent = b


def quotient(a: Size, b: Size) -> Size | None:
    """`a / b` when it divides for all sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(a, int) or b == 0:
        return None
    found = call("floordiv", a, b)
    plain = isinstance(found, int) or (isinstance(found, Expr) and found * b == a)
    return found if plain else None  # type: ignore[return-value]


def _unite_factors(a: list[Axis], b: list[Axis], why: str) -> bool:
    """Unite two chains of factors from the innermost; False when they do not fit."""
    a, b = list(a), list(b)
    while a and b:
        x, y = a.pop(), b.pop()
        if x.size == y.size:
            unite(x, y, why)
            continue
        if quotient(x.size, y.size) is None:
            x, y, a, b = y, x, b, a
        ratio = quotient(x.size, y.size)
        if ratio is None:
            for z in (*a, *b, x, y):
                freeze(z, f"its indices are arranged in two ways{why and f' at {why}'}")
            return False
        outer, inner = refine(x, (ratio, y.size))
        a.append(outer)
        unite(inner, y, why)
    return True


def _unite_sums(a: Axis, b: Axis, why: str) -> None:
    xs, ys = segments(a), segments(b)
    while xs and ys:
        x, y = xs.pop(0), ys.pop(0)
        if x.size == y.size:
            unite(x, y, why)
        elif not isinstance(x.size, int) or not isinstance(y.size, int):
            _clash(x, y, why)
            return _clash(a, b, why)
        elif x.size > y.size:
            first, rest = cut(x, (y.size, x.size - y.size))
            unite(first, y, why)
            xs.insert(0, rest)
        else:
            first, rest = cut(y, (x.size, y.size - x.size))
            unite(x, first, why)
            ys.insert(0, rest)
    if find(a) is not find(b):
        _join(a, b)


def _unite_mixed(chain: Axis, parts: Axis, why: str) -> None:
    """Factors meet parts: n equal parts are a factor n, all of whose indices stay."""
    outer, *inner = factors(chain)
    rest = product(inner)
    if not isinstance(outer.size, int) or not isinstance(rest.size, int):
        return _clash(chain, parts, why)
    freeze(outer, f"it counts parts that lie side by side{why and f' at {why}'}")
    for piece in cut(parts, [rest.size] * outer.size):
        unite(piece, rest, why)


def refine(axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
    """The axis as factors of the given sizes, the outer first; their product is its size."""
    root = find(axis)
    if len(sizes) == 1:
        return [root]
    if root.form == "leaf":
        if any(s == root.size for s in sizes):  # the others are 1
            return [root if s == root.size else leaf(1) for s in sizes]
        made = [leaf(1) if s == 1 else _like(root, s) for s in sizes]
        root.form, root.parts = "product", tuple(m for m in made if m.size != 1)
        return made
    if root.form == "sum":
        return _refine_sum(root, sizes)
    chain, made = factors(root), []
    for wanted in reversed(sizes):
        taken = _take(chain, wanted)
        if taken is None:
            reason = "its indices are arranged in two ways"
            freeze(root, reason)
            return [leaf(s, reason) for s in sizes]
        made.append(taken)
    return made[::-1]


def _like(root: Axis, size: Size) -> Axis:
    return Axis(size, frozen=dict(root.frozen), marks=set(root.marks))


def _take(chain: list[Axis], wanted: Size) -> Axis | None:
    """The innermost factors of a chain that make up a size; None when they do not."""
    taken: list[Axis] = []
    while wanted != 1:
        if not chain:
            return None
        x = find(chain.pop())
        left = quotient(wanted, x.size)
        if left is not None:
            taken.insert(0, x)
            wanted = left
            continue
        ratio = quotient(x.size, wanted)
        if ratio is None:
            return None
        outer, inner = refine(x, (ratio, wanted))
        chain += factors(outer)
        taken.insert(0, inner)
        wanted = 1
    return product(taken)


def _refine_sum(root: Axis, sizes: Sequence[Size]) -> list[Axis]:
    first, inner = sizes[0], root.size
    rest = quotient(inner, first)
    if not isinstance(first, int) or not isinstance(rest, int):
        freeze(root, "its parts are arranged in two ways")
        return [leaf(s, "its parts are arranged in two ways") for s in sizes]
    if first == 1:
        return [leaf(1), *refine(root, sizes[1:])]
    one, *others = cut(root, [rest] * first)
    for x in others:
        unite(one, x)
    return [leaf(first, "it counts parts that lie side by side"), *refine(one, sizes[1:])]


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axis as parts of the given sizes, side by side; their sum is its size."""
    root = find(axis)
    if len(sizes) == 1:
        return [root]
    if root.form == "leaf":
        root.form, root.parts = "sum", tuple(_like(root, s) for s in sizes)
        return list(root.parts)
    if root.form == "product":
        return _cut_product(root, sizes)
    return _cut_sum(root, sizes)


def _cut_product(root: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut the outermost factor, where the cuts fall between its indices."""
    outer, *inner = factors(root)
    rest = product(inner)
    counts = [quotient(s, rest.size) for s in sizes]
    if any(not isinstance(c, int) for c in counts):
        reason = "it is cut inside what a reshape keeps together"
        freeze(root, reason)
        return [leaf(s, reason) for s in sizes]
    return [product([o, rest]) for o in cut(outer, counts)]  # type: ignore[arg-type]


def _cut_sum(root: Axis, sizes: Sequence[int]) -> list[Axis]:
    pending, made = segments(root), []
    for wanted in sizes:
        taken: list[Axis] = []
        while wanted:
            x = find(pending.pop(0))
            if _known(x) > wanted:
                x, rest = cut(x, (wanted, _known(x) - wanted))
                pending.insert(0, rest)
            taken.append(x)
            wanted -= _known(x)
        made.append(total(taken) if taken else leaf(0))
    return made


def _known(axis: Axis) -> int:
    size = find(axis).size
    assert isinstance(size, int)
    return size


def kept_mask(axis: Axis, kept: Kept) -> list[bool]:
    """Which indices of an axis of known size stay, from which units of its leaves do."""
    root = find(axis)
    if root.form == "leaf":
        return list(kept(root))
    masks = [kept_mask(p, kept) for p in root.parts]
    if root.form == "sum":
        return [x for m in masks for x in m]
    found = [True]
    for m in masks:
        found = [x and y for x in found for y in m]
    return found


def new_size(axis: Axis, count: Callable[[Axis], Size]) -> Size:
    """The size of an axis when its leaves have the sizes that `count` says."""
    root = find(axis)
    if root.form == "leaf":
        return count(root)
    sizes = [new_size(p, count) for p in root.parts]
    result: Size = 0 if root.form == "sum" else 1
    for s in sizes:
        result = result + s if root.form == "sum" else result * s
    return result
