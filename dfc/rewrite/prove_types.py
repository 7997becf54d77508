"""What a sample stands for: other sizes, ranks, element types and numbers than it happens to have.

Sizes that are equal in a sample may be tied (`x: f32[4, 8], w: f32[8, 16]`) or equal by accident;
both are tried: all equal ones changed together, and each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dfc.ir.expr import symbol
from dfc.ir.graph import Range
from dfc.ir.types import DTYPES, DType, TensorType
from dfc.rewrite.prove_inputs import BRIEF, QUICK
from dfc.rewrite.prove_sample import Case, Given, Spec

LARGE = 70_000  # elements of all inputs together: enough for every way a kernel is split


@dataclass(frozen=True)
class Variation:
    """A case that differs from the sample, and how. `sizes` are tried for symbolic dimensions.

    `care` says how many inputs it deserves.
    """

    label: str
    case: Case
    care: str = QUICK
    ranges: Mapping[str, Range] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ({},)


def variations(case: Case) -> Iterator[Variation]:
    """What the sample stands for, one change at a time."""
    yield from _dtypes(case)
    yield from _sizes_together(case)
    yield from _sizes_alone(case)
    yield from _ranks(case)
    yield from _numbers(case)
    yield from _roles(case)


def _changed(case: Case, change: Callable[..., Given], *more: Any) -> Case:
    """The case with each thing in it changed: `change(given, *more)`."""
    return {name: change(given, *more) for name, given in case.items()}


def _sizes(case: Case) -> list[int]:
    """The sizes of the tensors, each once, in order."""
    found = [d for g in case.values() if isinstance(g, Spec) for d in g.type.shape]
    return [d for d in dict.fromkeys(found) if isinstance(d, int)]


# Element types


def _dtypes(case: Case) -> Iterator[Variation]:
    """All tensors of a float type in each other one, and in integers; then one tensor alone."""
    own = dict.fromkeys(g.type.dtype for g in case.values() if isinstance(g, Spec))
    for old in own:
        for new in _others(old):
            label = f"{old} changed to {new}"
            yield Variation(label, _changed(case, _cast, old, new), BRIEF)
    for name, given in case.items():
        if isinstance(given, Spec) and len(case) > 1:
            for new in _others(given.type.dtype)[:2]:
                changed = replace(given, type=given.type.with_dtype(new))
                yield Variation(f"{name} changed to {new}", {**case, name: changed})


def _others(old: DType) -> list[DType]:
    if old.is_float:
        names = ["f16", "bf16", "f32", "f64", "i64", "i32", "bool"]
    elif old.is_integer:
        names = ["i32", "i64", "u8", "f32", "bool"]
    else:
        names = ["i64", "f32"]
    return [DTYPES[n] for n in names if n != old.name]


def _cast(given: Given, old: DType, new: DType) -> Given:
    if isinstance(given, Spec):
        same = given.type.dtype == old
        return replace(given, type=given.type.with_dtype(new)) if same else given
    return new if isinstance(given, DType) and given == old else given


# Sizes


def _sizes_together(case: Case) -> Iterator[Variation]:
    """All sizes of a sample that are equal, changed at once; with the numbers that equal them."""
    values = sorted(_sizes(case))
    for old in values:
        for new in _other_sizes(old):
            for numbers in (True, False) if _has_number(case, old) else (False,):
                made = _changed(case, _resized, old, new, numbers)
                yield from _followed(case, Variation(f"sizes {old} changed to {new}", made))
    for grow in (lambda d: 2 * d + 1, lambda d: 5 * d + 2):
        made = _changed(case, _all_resized, grow, values)
        yield from _followed(case, Variation("larger sizes", made))
    yield Variation("all sizes 1", _changed(case, _all_resized, lambda d: 1, values))


def _followed(case: Case, variation: Variation) -> Iterator[Variation]:
    """A change of sizes, if they are no more than `LARGE`; once more with the numbers changed that
    are a product of neighbouring sizes, as those of `view(x, [2 * 3, 4])` are."""
    if _elements(variation.case) > LARGE:
        return
    yield variation
    products = _products(case, variation.case)
    made = {**variation.case}
    for name, given in case.items():
        numbers = given if isinstance(given, tuple) else (given,)
        if any(type(x) is int and x in products for x in numbers):
            now = variation.case[name]
            now = now if isinstance(now, tuple) else (now,)
            changed = tuple(
                products.get(old, new) if type(old) is int else new
                for old, new in zip(numbers, now, strict=True)
            )
            made[name] = changed if isinstance(given, tuple) else changed[0]
    if made != variation.case:
        yield replace(variation, label=f"{variation.label}, and their products", case=made)


def _products(before: Case, after: Case) -> dict[int, int]:
    """What products of neighbouring sizes of one tensor become; without those that stay."""
    found: dict[int, int] = {}
    for name, given in before.items():
        new = after[name]
        if not isinstance(given, Spec) or not isinstance(new, Spec):
            continue
        for i in range(given.type.rank):
            for j in range(i + 2, given.type.rank + 1):
                old_sizes, new_sizes = given.type.shape[i:j], new.type.shape[i:j]
                if old_sizes != new_sizes:
                    found.setdefault(math.prod(old_sizes), math.prod(new_sizes))  # type: ignore[arg-type]
    return found


def _other_sizes(old: int) -> list[int]:
    found = [1, 0, old + 1, 2, 33]
    return [n for n in dict.fromkeys(found) if n != old]


def _has_number(case: Case, n: int) -> bool:
    return any(
        type(x) is int and x == n
        for g in case.values()
        if not isinstance(g, Spec)
        for x in (g if isinstance(g, tuple) else (g,))
    )


def _resized(given: Given, old: Any, new: Any, numbers: bool) -> Given:
    if isinstance(given, Spec):
        shape = tuple(new if d == old else d for d in given.type.shape)
        return replace(given, type=given.type.with_shape(shape))
    if isinstance(given, tuple) and numbers:
        return tuple(new if type(x) is int and x == old else x for x in given)
    return new if numbers and type(given) is int and given == old else given


def _all_resized(given: Given, f: Callable[[int], int], values: list[int]) -> Given:
    if isinstance(given, Spec):
        shape = tuple(d if d == 1 or not isinstance(d, int) else f(d) for d in given.type.shape)
        return replace(given, type=given.type.with_shape(shape))
    if isinstance(given, tuple):
        return tuple(f(x) if type(x) is int and x > 1 and x in values else x for x in given)
    return given


def _sizes_alone(case: Case) -> Iterator[Variation]:
    """One dimension of one tensor."""
    for name, given in case.items():
        if not isinstance(given, Spec):
            continue
        for i, d in enumerate(given.type.shape):
            for new in (1, d + 1, 0):
                if new == d:
                    continue
                shape = (*given.type.shape[:i], new, *given.type.shape[i + 1 :])
                changed = replace(given, type=given.type.with_shape(shape))
                label = f"dimension {i} of {name} changed to {new}"
                yield from _followed(case, Variation(label, {**case, name: changed}))


def _ranks(case: Case) -> Iterator[Variation]:
    """One tensor, or every one, with a dimension less or more."""

    def less(g: Given) -> Given:
        if not isinstance(g, Spec) or not g.type.rank:
            return g
        return replace(g, type=g.type.with_shape(g.type.shape[1:]))

    def more(g: Given) -> Given:
        return replace(g, type=g.type.with_shape((3, *g.type.shape))) if isinstance(g, Spec) else g

    yield Variation("one dimension less", _changed(case, less))
    yield Variation("one dimension more", _changed(case, more))
    for name, given in case.items():
        if isinstance(given, Spec):
            for label, change in (("less", less), ("more", more)):
                if change(given) != given:
                    made = {**case, name: change(given)}
                    yield Variation(f"{name} with one dimension {label}", made)
            scalar = replace(given, type=given.type.with_shape(()))
            if given.type.rank > 1:
                yield Variation(f"{name} without dimensions", {**case, name: scalar})


def _elements(case: Case) -> int:
    total = 0
    for g in case.values():
        if isinstance(g, Spec):
            count: Any = g.type.numel
            total += int(count)
    return total


# Numbers


def _numbers(case: Case) -> Iterator[Variation]:
    """Other numbers than the sample's, and a tensor where the sample has a number."""
    shapes = [g.type for g in case.values() if isinstance(g, Spec) and g.type.dtype.is_float]
    for name, given in case.items():
        for new in _other_values(given):
            yield Variation(f"{name} = {new}", {**case, name: new})
        if isinstance(given, int | float) and not isinstance(given, bool) and shapes:
            first = max(shapes, key=lambda t: t.rank)
            for shape in ((), first.shape, first.shape[-1:]):
                for mark in ("", "constant"):
                    spec = Spec(TensorType(first.dtype, shape), mark)
                    yield Variation(f"{name} a tensor, {spec}", {**case, name: spec})
    if sum(isinstance(g, float) for g in case.values()) > 1:
        # What two numbers give together may be more than a type can hold, or nothing.
        for label, factor in (("large", 1e30), ("small", 1e-30)):
            made = {n: g * factor if isinstance(g, float) else g for n, g in case.items()}
            yield Variation(f"numbers 1e30 times as {label}", made, BRIEF)


def _other_values(given: Given) -> list[Any]:
    if isinstance(given, bool):
        return [not given]
    if isinstance(given, int):
        return [n for n in (-2, -1, 0, 1, 2, 3, given + 7) if n != given]
    if isinstance(given, float):
        some = [given * 1.7, -given, 0.0, 1.0, given * 1e6, given * 1e-6]
        return [*dict.fromkeys(x for x in some if x != given), float("inf"), float("nan")]
    if isinstance(given, DType):
        return [
            d for d in map(DTYPES.__getitem__, ("f16", "bf16", "f32", "f64", "i64")) if d != given
        ]
    if isinstance(given, tuple) and given and all(type(x) is int for x in given):
        orders = [given[::-1], given[1:] + given[:1]]
        others = (-1, 0, 1, 2) if len(given) == 1 else (-1, 1, 2)  # sizes of 0: see `_sizes`
        changed = [
            (*given[:i], n, *given[i + 1 :]) for i, x in enumerate(given) for n in (*others, x + 1)
        ]
        return [o for o in dict.fromkeys([*orders, *changed]) if o != given]
    return []


def _roles(case: Case) -> Iterator[Variation]:
    """Constants as inputs and inputs as constants, and numbers in the place of tensors."""
    specs = {n: g for n, g in case.items() if isinstance(g, Spec)}
    if any(not g.constant for g in specs.values()):
        every = {n: replace(g, mark="constant") for n, g in specs.items()}
        yield Variation("every input constant", {**case, **every})
    if any(g.constant for g in specs.values()):
        every = {n: replace(g, mark="") for n, g in specs.items()}
        yield Variation("no input constant", {**case, **every})
    for name, given in specs.items():
        if given.type.dtype.is_float and len(specs) > 1:
            yield Variation(f"{name} a number", {**case, name: 0.5})


# Symbolic sizes


def symbolic(case: Case) -> Iterator[Variation]:
    """Equal sizes as one symbol: all at once, and the first size of the first tensor alone."""
    values = [d for d in _sizes(case) if d != 1]
    if not values:
        return
    names = {d: f"S{i}" for i, d in enumerate(values)}
    for numbers in (True, False) if any(_has_number(case, d) for d in values) else (False,):
        made = case
        for old, name in names.items():
            made = _changed(made, _resized, old, symbol(name), numbers)
        yield _with_sizes("symbolic sizes", made, names)
    first = values[0]
    made = _changed(case, _resized, first, symbol(names[first]), True)
    yield _with_sizes(f"a symbolic size in place of {first}", made, {first: names[first]})


def _with_sizes(label: str, case: Case, names: Mapping[int, str]) -> Variation:
    ranges: dict[str, Range] = {name: (1, 64) for name in names.values()}
    sizes = (
        {name: d for d, name in names.items()},
        {name: d + 1 + i for i, (d, name) in enumerate(names.items())},
        {name: 1 for name in names.values()},
        {name: 2 for name in names.values()},
        {name: 17 + i for i, name in enumerate(names.values())},
    )
    return Variation(label, case, QUICK, ranges, sizes)
