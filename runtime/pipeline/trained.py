"""One stage in training: runs F, I, W and B, and keeps what they need of each other.

Gradients are added up by W and B themselves, over the old sums where the engine can. A stage that
recomputes keeps what other stages gave it, and runs its forward again in R, or keeps what leaves
cheap operators to R; what the caller gave is given again, masks of dropout drawn again, so that
they are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter, Value
from dfc.planning.actions import AGAIN, Action, Kind
from dfc.planning.backward import Part, replay
from dfc.planning.engine import Donating, Runner
from dfc.planning.stages import HOST
from dfc.runtime.engines import find_engine
from dfc.runtime.kernels import attention
from dfc.runtime.pipeline.differentiated import Differentiated, Gradient
from dfc.runtime.pipeline.streams import on_stream

if TYPE_CHECKING:
    import torch

Sums = tuple[dict[str, Any], dict[str, Any]]  # gradients, and buffers
Build = Callable[[Graph, Collection[Value]], Runner]  # the graph, and inputs to write over


def builder(name: str, threads: int, device: str = "cpu") -> Build:
    """How an engine builds a stage's parts: one that writes over no input gives new sums."""
    engine = find_engine(name)
    if device.startswith("cuda"):
        attention.register()
    if isinstance(engine, Donating):
        return lambda graph, donated: engine.build_donating(graph, device, threads, donated)
    return lambda graph, _: on_stream(name, engine.build(graph, device, threads), device)


class TrainedStage:
    """The actions of one stage.

    Needs:   all actions of a stage come from one thread, those of a microbatch as F, I, W or F, B,
             with R or S before I or B in a step in which the stage recomputes.
    Keeps:   what I and W read, from F until W, or from R or S where the stage recomputes; `most`
             says of how many microbatches at once, `most_bytes` what they took, without weights and
             what others hold as well. `drawn` are the caller's values that nobody else has.
             `state` are the buffers that F writes to, as the last `commit` left them.
    Ensures: weights' gradients are added in the order in which W (or B) runs; they are those of
             the last programs until the first W of one that is `fresh`.
    """

    def __init__(
        self,
        stage: Differentiated,
        weights: Mapping[str, torch.Tensor],
        readers: Mapping[Value, Sequence[Gradient]],
        build: Build,
        kinds: Collection[Kind],
        recomputes: str | None = None,
        drawn: Collection[Value] = (),
        state: Mapping[Value, tuple[str, torch.Tensor]] | None = None,
        checks: Mapping[Value, str] | None = None,
    ) -> None:
        import torch

        joint, sums = stage.joint, stage.cut.sums
        self.stage, self._build, self._kinds = stage, build, kinds
        self._drawn = frozenset(drawn)
        sources = zip(joint.inputs, stage.stage.sources, strict=False)
        self._taken = frozenset(v for v, source in sources if source != HOST)
        self._runs: dict[Kind, _Run] = {}
        self.recompute(recomputes)
        self._weights = {joint.weights[name]: weights[name] for name in joint.weights}
        self.gradients = {
            name: torch.zeros(w.shape, dtype=w.dtype, device=w.device)
            for name in sums
            for w in [weights[name]]
        }
        self._given = list(zip(stage.stage.gives, joint.outputs, strict=True))
        # weights and constants that the stage hands on
        constants = [v for v in joint.outputs if isinstance(v, Parameter)]
        self._as_they_are: dict[Value, torch.Tensor] = {
            v: v.data.tensor() for v in constants if v.data is not None
        }
        self._as_they_are |= {v: self._weights[v] for v in joint.outputs if v in self._weights}
        mine = {out: state[v] for v, out in self._given if v in state} if state else {}
        self._written = {out: name for out, (name, _) in mine.items()}
        self.state = dict(mine.values())
        self._changed = dict(self.state)
        self._checks = {out: checks[v] for v, out in self._given if v in checks} if checks else {}
        self._tangents = [
            (t, readers.get(v) or (Gradient(v, HOST),))
            for v, t in zip(stage.stage.gives, joint.tangents, strict=True)
            if t is not None
        ]
        self._returned = [
            (Gradient(v, stage.number), g)
            for v, g in zip(stage.stage.takes, stage.cut.input_gradients, strict=True)
            if g is not None
        ]
        self._alive: dict[int, dict[Value, Any]] = {}
        self._whole: set[int] = set()  # the microbatches of which all is kept
        self.most = self.most_bytes = 0
        self.limit = 0
        self._fresh = True  # the gradients are those of steps before this one

    def recompute(self, recomputes: str | None) -> None:
        """Whether the stage keeps all that F makes, or has R make it again, and in which way."""
        joint, cut = self.stage.joint, self.stage.cut
        table = {Kind.F: cut.forward, Kind.I: cut.inputs, Kind.W: cut.weights, Kind.B: cut.both}
        parts = {kind: table[kind] for kind in self._kinds if kind in table}
        self._kept = cut.saved
        if recomputes:
            again = replay(joint, cut, self._taken, recomputes)
            parts |= {Kind.F: again.forward, AGAIN[recomputes]: again.again}
            self._kept = again.kept
        sums, anew = cut.sums.values(), (Kind.F, *AGAIN.values())
        changed = {k: p for k, p in parts.items() if k not in self._runs or k in anew}
        self._runs |= {k: _Run(p, self._build, sums) for k, p in changed.items()}
        self.recomputes = recomputes
        self.saved_bytes = self.taken_bytes = 0
        self._sizes: tuple[Any, ...] = ()

    def start(self, limit: int, fresh: bool = True) -> None:
        """Begin a program that keeps at most `limit` microbatches at once.

        What a failed one left is forgotten; one that is `fresh` also forgets the gradients of those
        before it, and what they wrote to buffers.
        """
        self.limit = limit
        self._alive.clear()
        self._whole.clear()
        if fresh:
            self._fresh = True
            self._changed = dict(self.state)
        self.most = self.most_bytes = 0

    def sums(self) -> Sums:
        """What programs have added up and written to buffers, to be given to `restore`."""
        return {n: g.clone() for n, g in self.gradients.items()}, dict(self._changed)

    def restore(self, sums: Sums) -> None:
        """Go on from there."""
        gradients, self._changed = sums
        self.gradients, self._fresh = dict(gradients), False

    def set_gradient(self, name: str, sum: torch.Tensor | None) -> None:
        """Go on from another sum of a weight's gradients, or from none."""
        import torch

        own = self.gradients[name]
        self.gradients[name] = torch.zeros_like(own) if sum is None else sum.to(own, copy=True)

    def commit(self) -> None:
        """Take over what the last step wrote to buffers."""
        self.state = dict(self._changed)

    def run(self, action: Action, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Carry out an action; values and results are named as the edges name them."""
        b = action.microbatch
        if action.kind == Kind.F:
            return self._forward(b, values)
        if action.kind in AGAIN.values():
            return self._again(action.kind, b, values)
        known = self._alive.pop(b) if action.kind != Kind.I else self._alive[b]
        if action.kind != Kind.W:
            known.update((t, _sum([values[r] for r in names])) for t, names in self._tangents)
        if action.kind != Kind.I:
            self._give_sums(known)
        self._runs[action.kind](known, self._weights)
        found = {}
        if action.kind != Kind.W:
            found = {name: known[g] for name, g in self._returned}
        if action.kind == Kind.I:
            self._keep(b, known, self.stage.cut.kept_for_weights)
        else:
            self._take_sums(known)
            self._whole.discard(b)
        return found

    def _forward(self, b: int, values: Mapping[Any, Any]) -> dict[Any, Any]:
        joint = self.stage.joint
        known = dict(zip(joint.inputs, (values[v] for v in self.stage.stage.takes), strict=True))
        known.update((v, self._changed[name]) for name, v in joint.state.items())
        known.update(self._as_they_are)
        if not self.most:
            self._begin(tuple(getattr(known[v], "shape", ()) for v in joint.inputs if v in known))
        self._runs[Kind.F](known, self._weights)
        for condition, message in self._checks.items():
            if not bool(known[condition]):
                raise DfcError("K023", message)
        self._changed.update((name, known[out]) for out, name in self._written.items())
        found = {v: known[out] for v, out in self._given}
        self._keep(b, known, self._kept)
        taken = self._kept if self.recomputes else self._taken
        self.taken_bytes = self.taken_bytes or _bytes([known[v] for v in taken], ())
        if not self.recomputes:
            self._is_whole(b, self._given_by_others(values))
        self._note_bytes()
        self.most = max(self.most, len(self._alive))
        if len(self._alive) > self.limit:
            raise DfcError("K055", f"stage {self.stage.number} keeps {len(self._alive)} "
                           f"microbatches, the program has {self.limit} at most")  # fmt: skip
        return found

    def _begin(self, sizes: tuple[Any, ...]) -> None:
        """Of the first microbatch of a step, the largest: other sizes are to be counted anew."""
        if sizes != self._sizes:
            self._sizes, self.saved_bytes, self.taken_bytes = sizes, 0, 0

    def _again(self, kind: Kind, b: int, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Make what F did not keep, of what it kept and what the caller gives again."""
        known = dict(self._alive[b])
        given = [*known.values(), *self._given_by_others(values)]
        mine = zip(self.stage.joint.inputs, self.stage.stage.takes, strict=True)
        known.update((own, values[v]) for own, v in mine if v in values)
        self._runs[kind](known, self._weights)
        self._keep(b, known, self.stage.cut.saved)
        self._is_whole(b, given)
        return {}

    def _given_by_others(self, values: Mapping[Any, Any]) -> list[Any]:
        return [x for v, x in values.items() if v not in self._drawn]

    def _is_whole(self, b: int, given: Collection[Any]) -> None:
        """All that the backward pass reads of a microbatch is kept."""
        if not self.saved_bytes:
            others = [*given, *self._weights.values()]
            self.saved_bytes = _bytes(self._alive[b].values(), others)
        self._whole.add(b)
        self._note_bytes()

    def _note_bytes(self) -> None:
        """What is kept now: of some microbatches all, of others what the stage took."""
        taken = len(self._alive) * self.taken_bytes if self.recomputes else 0
        held = len(self._whole) * self.saved_bytes + taken
        self.most_bytes = max(self.most_bytes, held)

    def _keep(self, b: int, known: Mapping[Value, Any], names: Collection[Value]) -> None:
        self._alive[b] = {v: x for v, x in known.items() if v in names}

    def _give_sums(self, known: dict[Value, Any]) -> None:
        import torch

        if self._fresh and self.gradients:
            torch._foreach_zero_(list(self.gradients.values()))
        self._fresh = False
        known.update((v, self.gradients[name]) for name, v in self.stage.cut.sums.items())

    def _take_sums(self, known: Mapping[Value, Any]) -> None:
        for name, v in self.stage.cut.weight_gradients.items():
            self.gradients[name] = known[v]


class _Run:
    """A part as a function that reads values and adds those that it makes."""

    def __init__(self, part: Part, build: Build, sums: Collection[Value]) -> None:
        pairs = zip(part.graph.inputs, part.takes, strict=True)
        self.part = part
        donated = [own for own, v in pairs if v in sums]
        self.runner = build(part.graph, donated) if part.gives else None

    def __call__(self, known: dict[Value, Any], weights: Mapping[Value, Any]) -> None:
        if self.runner is None:
            return
        inputs = [known[v] if v in known else weights[v] for v in self.part.takes]
        known.update(zip(self.part.gives, self.runner(inputs), strict=True))


def _sum(parts: Sequence[Any]) -> Any:
    """The first reader's gradient and the others', in order."""
    total = parts[0]
    for x in parts[1:]:
        total = total + x
    return total


def _bytes(values: Collection[Any], given: Collection[Any]) -> int:
    """The memory of the values, each storage once, without what others hold as well."""
    sizes = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in values if hasattr(x, "untyped_storage")
    }  # fmt: skip
    for x in given:
        if hasattr(x, "untyped_storage"):
            sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
