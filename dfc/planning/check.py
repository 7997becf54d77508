"""What is checked of a program before anything runs: that it is whole, ordered, fits and ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dfc.errors import DfcError, Diagnostic
from dfc.planning.actions import AGAIN, Action, Kind, Program
from dfc.planning.simulate import Costs, Link, peaks, simulate

_MOST = 8  # problems that are told


def check(program: Program, costs: Costs, caps: Sequence[float] = (), slots: int = 2) -> None:
    """Check a program: every action once, in an order that can be, within memory, without deadlock.

    `caps` are the bytes of each rank; `slots` how many transfers of an edge may wait to be used.
    Deadlock is judged with transfers that wait until both ends are ready: what ends so, ends with
    any kind of sending.
    Raises:  DfcError N022 for actions that are missing or twice, N023 for one before what it needs
             on its own rank, N061 (status 6) for memory, N020 for a deadlock.
    """
    problems = [*_counts(program), *_orders(program)]
    if problems:
        raise DfcError.of(problems[:_MOST])
    _memory(program, costs, caps)
    edges = [(u, v, 1) for u, v, _ in costs.all_edges()]
    n = program.stages
    strict = replace(
        costs, forward=[1] * n, inputs=[1] * n if program.trains else (),
        weights=[1] * n if program.trains else (), replay=(), remake=(), edges=edges,
        link=Link(0, 1), links={}, slots=slots,
    )  # fmt: skip
    simulate(program, strict)


def _counts(program: Program) -> list[Diagnostic]:
    """Every F, and every I and W or their B, once for each stage and microbatch."""
    count: Counter[tuple[str, int, int]] = Counter()
    for rank in range(len(program.ranks)):
        for a in program.actions(rank):
            for kind in "IW" if a.kind == Kind.B else a.kind.name:
                count[kind, a.stage, a.microbatch] += 1
    found = []
    ways = program.ways
    again = {k.name: sorted(s for s in ways if AGAIN[ways[s]] == k) for k in AGAIN.values()}
    for kind in ("F", "I", "W", *again) if program.trains else "F":
        for stage in again.get(kind, range(program.stages)):
            for b in range(program.microbatches):
                times = count[kind, stage, b]
                if times != 1:
                    said = "is missing" if not times else f"is there {times} times"
                    found.append(Diagnostic("N022", f"{kind}({stage},{b}) {said}"))
    return found


def _orders(program: Program) -> list[Diagnostic]:
    """On its rank F comes before R or S, that before I, and I before W."""
    found, ways = [], program.ways
    for rank in range(len(program.ranks)):
        seen: set[tuple[str, int, int]] = set()
        for a in program.actions(rank):
            needs = _needs(a, ways)
            if needs is not None and needs not in seen:
                kind, stage, b = needs
                message = f"rank {rank} has {a} before {kind}({stage},{b})"
                found.append(Diagnostic("N023", message))
            for kind in "IW" if a.kind == Kind.B else a.kind.name:
                seen.add((kind, a.stage, a.microbatch))
    return found


def _needs(a: Action, ways: Mapping[int, str]) -> tuple[str, int, int] | None:
    if a.kind == Kind.F:
        return None
    before = Kind.I if a.kind == Kind.W else Kind.F
    if a.kind in (Kind.I, Kind.B) and a.stage in ways:
        before = AGAIN[ways[a.stage]]
    return before.name, a.stage, a.microbatch


def _memory(program: Program, costs: Costs, caps: Sequence[float]) -> None:
    if not caps:
        return
    for rank, (need, cap) in enumerate(zip(peaks(program, costs), caps, strict=True)):
        if need > cap:
            raise DfcError(
                "N061", f"rank {rank} would hold {need:.6g} bytes of {cap:.6g}",
                help="keep fewer microbatches in flight, or use more ranks", status=6,
            )  # fmt: skip
