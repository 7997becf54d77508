"""What a trainer's stages cost here, for schedules to be chosen by: steps that are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from dfc.planning.actions import SELECTIVE, Kind, Program
from dfc.planning.recompute import recomputing
from dfc.planning.simulate import Costs
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.lanes import Step
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.trained import TrainedStage

# seconds of each kind of action and stage, and the bytes that a stage saves and keeps first
Measured = tuple[dict[tuple[int, int], float], dict[int, tuple[int, int]]]
Measure = Callable[[Program, int], Measured]  # a program, and how often it runs


def stage_costs(
    model: StagedModel, program: Program, measure: Measure, repeats: int, selective: bool
) -> Costs:
    """What F, I and W of each stage take, or F and B, and the bytes that each keeps; if asked for
    also what selective recomputation takes, keeps and makes again."""
    n = len(model.parts)
    times, saved = measure(program, repeats)
    f = [times[int(Kind.F), s] for s in range(n)]
    i = [times.get((int(Kind.I), s)) or times[int(Kind.B), s] for s in range(n)]
    w = [times.get((int(Kind.W), s), 0.0) for s in range(n)]
    pairs = {(e.source, e.target, 0) for e in model.edges if not e.backward}
    edges = sorted(e for e in pairs if HOST not in e)
    kept, taken = zip(*(saved[s] for s in range(n)), strict=True)
    plain = Costs(f, i, w, edges=edges, activations=kept, taken=taken)
    if not selective:
        return plain
    times, saved = measure(recomputing(program, range(n), SELECTIVE), 1)
    remade, kept = zip(*(saved[s] for s in range(n)), strict=True)
    remake = [times[int(Kind.S), s] for s in range(n)]
    return replace(plain, remake=remake, kept=kept, remade=remade)


def measured(
    stages: Sequence[TrainedStage], run: Callable[[], Step], repeats: int, keep: bool
) -> Measured:
    """The medians over `repeats` steps after a first one; `keep` says that the stages have sums of
    gradients, which are theirs again afterwards."""
    times: dict[tuple[Kind, int], list[float]] = {}
    before = [t.sums() for t in stages] if keep else []
    for repeat in range(1 + repeats):
        step = run()
        for span in step.spans if repeat else ():
            key = span.action.kind, span.action.stage
            times.setdefault(key, []).append(span.end - span.start)
    for stage, sums in zip(stages, before, strict=False):
        stage.restore(sums)
    saved = {t.stage.number: (t.saved_bytes, t.taken_bytes) for t in stages}
    return {(int(kind), s): median(x) for (kind, s), x in times.items()}, saved
