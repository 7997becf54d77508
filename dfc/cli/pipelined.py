"""`dfc run --pipeline`: a model as stages on threads, measured beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfc.compiled import Compiled
    from dfc.runtime.pipeline.local import Pipeline

_WARM = 2  # steps before the one that is told


def run_pipelined(
    compiled: Compiled,
    inputs: Sequence[Any],
    stages: int,
    microbatches: int,
    trace: str | None,
    force: bool,
    say: Callable[[str], None],
) -> tuple[list[Any], dict[str, Any]]:
    """The output leaves, and what the step took.

    Raises:  DfcError N050 for a model that cannot be a pipeline, N051, N053; D010.. for the trace.
    """
    from dfc.runtime.pipeline.local import Pipeline, balanced

    say(f"timing each node of {compiled.graph.name}")
    placed = balanced(compiled.graph, stages, inputs)
    engine = compiled.engine.name
    say(f"building {stages} stages for {engine}")
    with Pipeline(compiled.graph, placed, engine=engine, microbatches=microbatches) as pipeline:
        for i in range(_WARM + 1):
            say(f"step {i + 1} of {_WARM + 1}")
            results = pipeline.run_flat(inputs)
        data = _data(pipeline)
        if trace:
            _write_trace(pipeline, trace, force)
    return results, data


def _data(pipeline: Pipeline) -> dict[str, Any]:
    report = pipeline.report()
    return {
        "stages": [
            {"nodes": len(s.graph), "seconds": t, "busy": report.busy[rank],
             "values_in": len(s.takes)}
            for s, t, rank in zip(
                pipeline.stages, report.stage_seconds, pipeline.placement, strict=True)
        ],
        "step_seconds": report.seconds,
        "predicted_seconds": report.predicted,
        "bubble": report.bubble,
        "bytes": [[source, target, size] for (source, target), size in report.bytes.items()],
    }  # fmt: skip


def _write_trace(pipeline: Pipeline, path: str, force: bool) -> None:
    from dfc.publish import publish_file

    names = [f"rank {r}" for r in range(len(pipeline.threads))]
    with publish_file(Path(path), force=force) as temp:
        temp.write_text(json.dumps(pipeline.report().trace(names)))


def show(data: dict[str, Any]) -> None:
    """The report as text."""
    from dfc.cli.tables import print_table, print_text
    from dfc.lang.units import amount_text

    print_table(
        ["stage", "nodes", "a microbatch", "busy"],
        [
            [str(i), str(s["nodes"]), amount_text(s["seconds"], "time"), f"{s['busy']:.0%}"]
            for i, s in enumerate(data["stages"])
        ],
        right=(0, 1, 2, 3),
    )
    took, predicted = data["step_seconds"], data["predicted_seconds"]
    print_text(
        f"the step took {amount_text(took, 'time')}, {amount_text(predicted, 'time')} were "
        f"predicted from the stages' times; the busiest stage waited {data['bubble']:.0%} of it"
    )
