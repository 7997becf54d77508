"""Pipeline schedules by name: what each rank computes for which microbatch, in which order.

Linear placement puts stage s on rank s; looped placement stage s on rank s mod p; V placement the
stages r and 2p-1-r on rank r. Sources: GPipe, torchgpipe's paper; 1F1B and interleaved 1F1B,
Megatron-LM's; breadth-first, arXiv 2211.05953; ZB1P and its interleaved form, arXiv 2401.10241;
ZB-V, arXiv 2405.15362; DualPipeV, DeepSeek's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean
from dfc.planning.actions import JOINED, Kind, Program, of_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

F, I, W, B = Kind.F, Kind.I, Kind.W, Kind.B  # noqa: E741 - the papers' letters


MAX_ACTIONS = 2**24  # of each kind in one step: 4096 microbatches on 4096 ranks


@dataclass(frozen=True)
class Schedule:
    """How a schedule is made, and what it asks of ranks, chunks and microbatches."""

    name: str
    make: Callable[[int, int, int], Program]  # ranks, microbatches, chunks a rank
    chunks: str = "1"  # "1", "2" or "any"
    trains: bool = True
    why: str = ""
    turns: bool = False  # V placement
    refuses: Callable[[int, int, int], str | None] = lambda p, m, v: None


def schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Program:
    """The program of a schedule.

    Raises:  DfcError N001 for an unknown schedule, N002 when it cannot be made for these numbers.
    """
    found = known_schedule(name)
    usual = 1 if found.chunks == "1" or not found.trains else 2
    v = chunks if chunks is not None else usual
    reason = why_not(found, ranks, microbatches, v)
    if reason:
        raise DfcError("N002", f"`{name}` cannot be made: {reason}")
    return found.make(ranks, microbatches, v)


def known_schedule(name: str) -> Schedule:
    """
    Raises:  DfcError N001 for an unknown schedule.
    """
    found = SCHEDULES.get(name)
    if found is None:
        near = [s for s in SCHEDULES if name.startswith(s)] or list(SCHEDULES)  # interleaved_1f1b
        help = did_you_mean(name, near) or f"there are {', '.join(SCHEDULES)}"
        raise DfcError("N001", f"unknown schedule `{name}`", help=help)
    return found


def why_not(found: Schedule, ranks: int, microbatches: int, chunks: int) -> str | None:
    """Why a schedule does not exist for these numbers, None when it does."""
    if min(ranks, microbatches, chunks) < 1:
        return "it needs at least one rank, one microbatch and one chunk"
    if ranks * microbatches * chunks > MAX_ACTIONS:
        return f"a step has at most {MAX_ACTIONS} actions of a kind, as a step repeats"
    if found.chunks != "any" and chunks != int(found.chunks):
        return f"it has {found.chunks} chunk a rank, not {chunks}"
    return found.refuses(ranks, microbatches, chunks)


def _forward_only(p: int, m: int, v: int) -> Program:
    if v > 1:
        return forward_program([s % p for s in range(p * v)], m)
    return _linear("forward", p, m, lambda r: _kinds([(F, m)]))


def forward_program(placement: Sequence[int], microbatches: int) -> Program:
    """Forward only, for stages anywhere: rounds of as many microbatches as there are ranks.

    Ensures: all ranks follow one order of (round, stage, microbatch), so that none waits forever.
    """
    ranks = 1 + max(placement)
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for first in range(0, microbatches, ranks):
        for stage, rank in enumerate(placement):
            for b in range(first, min(first + ranks, microbatches)):
                rows[rank].append((int(F), stage, b))
    return of_rows("forward", rows, placement)


def forward_of(program: Program, microbatches: int | None = None) -> Program:
    """The program itself if it only goes forward, with so many microbatches; else one that does,
    with the same stages on the same ranks."""
    count = microbatches or program.microbatches
    if not program.trains and program.microbatches == count:
        return program
    return forward_program(program.placement, count)


def split(program: Program) -> Program:
    """The program with I and W, one right after the other, for each B."""
    import numpy as np

    ranks = []
    for rows in program.ranks:
        both = (rows[:, 0] & ~JOINED) == B
        found = np.repeat(rows, 1 + both, axis=0)
        at = np.flatnonzero(both) + np.arange(both.sum())  # where the I of each B is
        found[at, 0], found[at + 1, 0] = I, rows[both, 0] & JOINED | W
        ranks.append(found)
    return replace(program, ranks=tuple(ranks))


def _gpipe(p: int, m: int, v: int) -> Program:
    return _linear("gpipe", p, m, lambda r: _kinds([(F, m), (B, m)]))


def _one_f_one_b(p: int, m: int, v: int) -> Program:
    return _linear("1f1b", p, m, lambda r: _alternating(m, min(m, p - 1 - r), B))


def _zb1p(p: int, m: int, v: int) -> Program:
    def kinds(r: int) -> Ints:
        return _with_weights(_alternating(m, min(m, p - 1 - r), I), r)

    return _linear("zb1p", p, m, kinds)


def _linear(name: str, p: int, m: int, kinds: Callable[[int], Ints]) -> Program:
    """Each kind takes the microbatches in order."""

    def rank(r: int) -> NDArray[np.int32]:
        return _numbered(kinds(r), lambda kind, k: (_same(k, r), k))

    return Program(name, tuple(range(p)), m, tuple(rank(r) for r in range(p)))


def _interleaved(p: int, m: int, v: int) -> Program:
    def warm(r: int, per: int) -> int:
        return min(m * v, (v - 1) * per + 2 * (p - 1 - r))

    return _looped("interleaved", p, m, v, lambda r, per: _alternating(m * v, warm(r, per), B))


def _interleaved_zb(p: int, m: int, v: int) -> Program:
    def kinds(r: int, per: int) -> Ints:
        return _with_weights(_alternating(m * v, min(m * v, (v - 1) * per + p - 1 - r), I), r)

    return _looped("interleaved_zb", p, m, v, kinds)


def _looped(name: str, p: int, m: int, v: int, kinds: Callable[[int, int], Ints]) -> Program:
    """Rounds of `per` microbatches go through all chunks of a rank, backwards in reverse."""
    per = m // max(1, m // p)

    def rank(r: int) -> Any:
        def where(kind: Kind, k: Ints) -> tuple[Ints, Ints]:
            chunk = (k // per) % v
            chunk = chunk if kind == F else v - 1 - chunk
            return chunk * p + r, k // (per * v) * per + k % per

        return _numbered(kinds(r, per), where)

    return Program(name, tuple(s % p for s in range(p * v)), m, tuple(rank(r) for r in range(p)))


def _whole_rounds(p: int, m: int, v: int) -> str | None:
    rounds = max(1, m // p)
    if m % rounds == 0:
        return None
    return (
        f"{m} microbatches are not {rounds} equal rounds: take a multiple of {counted(p, 'rank')}"
    )


def _breadth_first(p: int, m: int, v: int) -> Program:
    def rank(r: int) -> list[tuple[int, int, int]]:
        local = [c * p + r for c in range(v)]
        forward = [(int(F), s, b) for s in local for b in range(m)]
        return forward + [(int(B), s, b) for s in reversed(local) for b in reversed(range(m))]

    return of_rows("breadth_first", [rank(r) for r in range(p)], [s % p for s in range(p * v)])


def _zb_v(p: int, m: int, v: int) -> Program:
    ranks = []
    for r in range(p):
        counted = _Counted((r, 2 * p - 1 - r), m)
        counted.take(list(_zb_v_order(p, r, max(2 * p - 1, m))))
        ranks.append(counted.rows)
    return of_rows("zb_v", ranks, _v_placement(p))


def _zb_v_order(p: int, r: int, n: int) -> Iterator[str]:
    """The order for n microbatches, as kind and chunk; those that do not exist are dropped."""
    yield from ["F0"] * (2 * (p - r) - 1)
    yield from ["F1", "F0"] * r
    yield from ["F1", "I1", "W1"] * (p - r)
    first, second = 2 * (p - r) - 1 + r, r + p - r
    while first < n or second < n:
        if first < n:
            yield "F0"
            first += 1
        yield from ("I0", "W0", "F1", "I1", "W1")
        second += 1
    yield from ["I0", "I1"] * r
    yield from ["I0", "W0"] * (p - r)
    yield from ["W1"] * r
    yield from ["W0"] * r


def _dualpipe_v(p: int, m: int, v: int) -> Program:
    ranks = []
    for r in range(p):
        counted = _Counted((r, 2 * p - 1 - r), m)
        counted.take(list(_dualpipe_order(p, r, m)))
        ranks.append(counted.rows)
    return of_rows("dualpipe_v", ranks, _v_placement(p))


def _dualpipe_order(p: int, r: int, m: int) -> Iterator[str]:
    yield from ["F0"] * (2 * (p - r - 1))
    yield from ["F0", "F1"] * (r + 1)
    yield from ["I1", "W", "F1"] * (p - r - 1)
    for i in range(m - 2 * p + r + 1):
        alone = i == 0 and r == p - 1  # joined, the two would only wait for each other
        yield from ["F0", "B1"] if alone else ["F0&", "B1"]
        yield from ["F1&", "B0"]
    yield from ["B1", "F1&", "B0"] * (p - r - 1)
    # The second half leaves its weights for later; which of the two begins depends on the rank.
    for i in range(r + 1):
        yield from (f"{_half(r, i, chunk)}{chunk}" for chunk in "10")
    yield from ["W", "I0"] * (p - r - 1)
    yield from ["W"] * (r + 1)


def _half(r: int, i: int, chunk: str) -> str:
    middle = (r + 1) // 2
    split = i > middle or (i == middle and (r % 2 == 1 or chunk == "0"))
    return "I" if split else "B"


def _v_placement(p: int) -> list[int]:
    return [*range(p), *reversed(range(p))]


class _Counted:
    """Rows of one rank with two chunks, where each kind takes the microbatches in order."""

    def __init__(self, stages: Sequence[int], m: int) -> None:
        self.stages, self.m = stages, m
        self.rows: list[tuple[int, int, int]] = []
        self._next: dict[tuple[int, str], int] = {}
        self._pending: list[tuple[int, int]] = []

    def take(self, words: Sequence[str]) -> None:
        """Add `F0`, `I1`, `W` (the oldest left) and the like; those beyond m are dropped."""
        for word in words:
            if word == "W":
                if self._pending:
                    self.rows.append((W, *self._pending.pop(0)))
                continue
            kind, stage = word[0], self.stages[int(word[1])]
            b = self._next.get((stage, kind), 0)
            if kind in "BI":
                b = self._next.get((stage, "I"), 0)
                self._next[stage, "I"] = b + 1
            else:
                self._next[stage, kind] = b + 1
            if b >= self.m:
                continue
            if kind == "I":
                self._pending.append((stage, b))
            self.rows.append((Kind[kind] + (JOINED if word.endswith("&") else 0), stage, b))


def _kinds(runs: Sequence[tuple[Kind, int]]) -> Ints:
    import numpy as np

    return np.repeat([kind for kind, _ in runs], [n for _, n in runs])


def _alternating(n: int, warm: int, back: Kind) -> Ints:
    """`warm` forwards, then forward and backward by turns, then the backwards that are left."""
    import numpy as np

    return np.concatenate(
        [np.full(warm, F), np.tile([F, back], n - warm), np.full(warm, back)]
    ).astype(np.int64)


def _with_weights(kinds: Ints, r: int) -> Ints:
    """After the k-th backward for inputs, k >= r, the oldest weights left; the rest last."""
    import numpy as np

    after = np.flatnonzero(kinds == I)[r:] + 1
    left = int((kinds == I).sum()) - len(after)
    return np.concatenate([np.insert(kinds, after, W), np.full(left, W)])


def _numbered(kinds: Ints, where: Callable[[Kind, Ints], tuple[Ints, Ints]]) -> NDArray[np.int32]:
    """Rows: the k-th action of a kind is the stage and microbatch that `where` gives."""
    import numpy as np

    rows = np.empty((len(kinds), 3), dtype=np.int32)
    rows[:, 0] = kinds
    for kind in (F, B, I, W):
        mine = np.flatnonzero(kinds == kind)
        if len(mine):
            rows[mine, 1], rows[mine, 2] = where(kind, np.arange(len(mine)))
    return rows


def _same(k: Ints, value: int) -> Ints:
    import numpy as np

    return np.full_like(k, value)


SCHEDULES = {
    s.name: s
    for s in (
        Schedule("forward", _forward_only, "any", trains=False,
                 why="inference: nothing to wait for"),
        Schedule("gpipe", _gpipe, why="all forwards, then all backwards"),
        Schedule("1f1b", _one_f_one_b, why="as GPipe with fewer activations"),
        Schedule("interleaved", _interleaved, "any", refuses=_whole_rounds,
                 why="a smaller bubble for more messages"),
        Schedule("breadth_first", _breadth_first, "any", why="as interleaved, weights used once"),
        Schedule("zb1p", _zb1p, why="weights' gradients fill the bubble"),
        Schedule("interleaved_zb", _interleaved_zb, "any", refuses=_whole_rounds,
                 why="interleaved, and weights' gradients fill the bubble"),
        Schedule("zb_v", _zb_v, "2", turns=True, why="first and last stage on one rank"),
        Schedule("dualpipe_v", _dualpipe_v, "2", turns=True, why="forward and backward overlap",
                 refuses=lambda p, m, v: None if m >= 2 * p else f"it needs {2 * p} microbatches"),
    )
}  # fmt: skip
