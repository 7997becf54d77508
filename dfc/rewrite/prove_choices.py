"""All graphs of a pattern, as far as they can be built: each choice alone, then several at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import torch

from dfc.rewrite.prove_build import Choices, Left, build_left
from dfc.rewrite.prove_sample import Case, Unbuildable
from dfc.rewrite.rule import Rule


def choices_of(
    rule: Rule, case: Case, data: Mapping[str, torch.Tensor], limit: int, seed: int = 0
) -> Iterator[tuple[dict[str, int], Left | Unbuildable]]:
    """The graphs of a pattern: each choice alone, then several at once; at most `limit` graphs.

    What differs in one choice from a graph comes before what differs from none that could be built.
    """
    tried: set[tuple[tuple[str, int], ...]] = set()
    seen: dict[str, int] = {}
    near: list[dict[str, int]] = [{}]
    far: list[dict[str, int]] = []
    good: dict[str, list[int]] = {}  # the options with which a graph came about
    generator = random.Random(seed)
    graphs = attempts = 0
    while graphs < limit and attempts < 4 * limit:
        if not near and not far:
            far = _mixed(good, tried, generator)
            if not far:
                return
        wanted = (near or far).pop(0)
        key = tuple(sorted((k, v) for k, v in wanted.items() if v))
        if key in tried:
            continue
        tried.add(key)
        choices = Choices(wanted)
        attempts += 1
        try:
            built: Left | Unbuildable = build_left(rule, case, choices, data)
            graphs += 1
            for place, i in key:
                good[place] = [*dict.fromkeys((*good.get(place, ()), i))]
        except Unbuildable as e:
            built = e
        behind = far if isinstance(built, Unbuildable) else near
        for place, options in choices.seen.items():
            if options > seen.get(place, 0):
                seen[place] = options
                behind += [{**wanted, place: i} for i in range(1, options)]
        yield {k: v for k, v in wanted.items() if v}, built


def _mixed(
    good: Mapping[str, list[int]],
    tried: set[tuple[tuple[str, int], ...]],
    generator: random.Random,
) -> list[dict[str, int]]:
    """Some combinations of several choices that were not tried."""
    found: list[dict[str, int]] = []
    for _ in range(64):
        wanted = {p: generator.choice(o) for p, o in good.items() if generator.random() < 0.4}
        if tuple(sorted(wanted.items())) not in tried:
            found.append(wanted)
    return found
