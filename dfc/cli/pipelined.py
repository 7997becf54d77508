"""`dfc run --pipeline`, and `dfc run` of a folder of stages: measured beside what was predicted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.cli.options import load_used
from dfc.cli.stage_devices import rank_devices
from dfc.cli.stage_tiers import host_data, rank_budgets, show_tiers
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.compiled import Compiled
    from dfc.ir.graph import Graph, Node
    from dfc.runtime.pipeline.local import Pipeline
    from dfc.runtime.pipeline.world import World


_LINKS = {
    "local": ", over sockets and shared memory of this host",
    "gloo": ", over gloo",
    "nccl": ", over nccl between GPUs",
}


@dataclass(frozen=True)
class Where:
    """What the options say of where stages run."""

    on: str = "threads"
    device: str = "cpu"  # of all, where neither options nor a plan say more
    devices: str | None = None  # of all stages, or of each
    links: str | None = None  # between ranks that are processes
    use: Sequence[str] = ()  # files that ranks load

    @property
    def hosts(self) -> tuple[Sequence[int] | None, int]:
        """The hosts of ranks, and this one among them."""
        if self.on != "torchrun":
            return None, 0
        from dfc.runtime.pipeline.world import World

        world = World.of_launcher()
        return world.hosts, world.hosts[world.rank]


_WARM = 2  # steps before those that are measured
_STEPS = 3  # of which the one in the middle is told
_DIFFERS = 0.02  # of an output's norm: more than kernels for other sizes, or other engines, make
Say = Callable[[str], None]


def run_pipelined(
    compiled: Compiled,
    inputs: Sequence[Any],
    stages: int | None,
    microbatches: int | None,
    engines: Sequence[str],
    where: Where,
    trace: str | None,
    force: bool,
    say: Say,
    memory: str | None = None,
) -> tuple[list[Any], dict[str, Any]] | None:
    """The output leaves, and what a step took beside the unsplit model on as many threads.

    `stages` is how many of equal time; without it they are the plan's. With the `memory` of each
    rank, or of all, weights are streamed, and nothing is run unsplit. None comes from a process
    that served another one, which tells it all.
    Raises:  DfcError N050 for a model that cannot be a pipeline, N051, N053; N056 for one without
             a plan; Q007, K004 for a device that is not here; D010.. for the trace; K056, K058,
             N055, N057 for ranks in other processes; N064, K070, K073 for the memory.
    """
    import torch

    make, placed, options = _maker(where, compiled, stages, inputs, say, memory, microbatches)
    count = 1 + max(placed.values(), default=0)
    if len(engines) not in (1, count):
        raise DfcError("N053", f"{len(engines)} engines are given for {counted(count, 'stage')}")
    devices = options["devices"] = rank_devices(
        where.devices, where.device, compiled.plan if stages is None else None,
        options.get("placement", range(count)), *where.hosts,
    )  # fmt: skip
    say(f"building {counted(count, 'stage')} for {', '.join(engines)}, on {where.on}")
    names = engines[0] if len(engines) == 1 else engines
    if microbatches:
        options["microbatches"] = microbatches
    host = None
    if memory is not None:
        options["memory"], host = rank_budgets(memory)
        options["host"] = host
        options["example"] = inputs
        say("timing what ranks stream")
    with make(compiled.graph, placed, engine=names, **options) as pipeline:
        if not pipeline.leads:
            pipeline.serve()
            return None
        results, data = step(pipeline, inputs, trace, force, say)
    data["on"], data["devices"] = where.on, devices
    data["link_kind"] = getattr(pipeline, "link_kind", None)  # threads have none
    if stages is not None and count < stages:
        data["fewer"] = (
            f"{counted(count, 'stage')}, not {stages}: no more of its nodes can be apart"
        )
    data["incidents"] = list(getattr(pipeline, "incidents", ()))
    if memory is not None:
        return results, {**data, **host_data(data["stages"], host)}
    say("timing the model unsplit")
    whole = compiled.run_flat(inputs)
    data["unsplit_seconds"] = _seconds(lambda: compiled.run_flat(inputs))
    data["unsplit_threads"] = torch.get_num_threads()
    data["differs"] = _differing(compiled.graph, results, whole) if data["microbatches"] > 1 else {}
    return results, data


def _differing(graph: Graph, found: Sequence[Any], whole: Sequence[Any]) -> dict[str, float]:
    """The outputs that are not the unsplit model's, by how much of their norm.

    Why:  where items of a batch depend on each other microbatches see less of it; a graph does not
          tell, since a reshape alone moves sizes into each other.
    """
    import torch

    from dfc.cli.inputs import output_names

    differs = {}
    for name, x, w in zip(output_names(graph), found, whole, strict=True):
        if isinstance(w, torch.Tensor) and (w.is_floating_point() or w.is_complex()):
            x, w = (torch.nan_to_num(t.to(torch.complex128)) for t in (x, w))
            error = float((x - w).norm() / w.norm().clamp_min(1e-30))
            if error > _DIFFERS:
                differs[name] = error
    return differs


def _placed(
    compiled: Compiled,
    stages: int | None,
    inputs: Sequence[Any],
    say: Say,
    memory: str | None = None,
    microbatches: int | None = None,
) -> tuple[Mapping[Node, int], dict[str, Any]]:
    """The stage of each node, and what the plan says of ranks and their order."""
    from dfc.planning.balanced import balanced
    from dfc.planning.pipeline import stage_of
    from dfc.planning.schedules import forward_of

    if stages is not None:
        say(f"timing each node of {compiled.graph.name}")
        if memory is not None:
            return _placed_within(compiled, stages, memory, microbatches, inputs)
        return balanced(compiled.graph, stages, inputs), {}
    plan = compiled.plan
    if plan is None:
        help = "say into how many stages: --pipeline 2; or compile it with `partition`"
        raise DfcError("N056", "the model is not partitioned: it has no plan", help=help)
    return stage_of(plan), {
        "placement": plan.program.placement,
        "microbatches": plan.program.microbatches,
        "program": partial(forward_of, plan.program),
    }


def _placed_within(
    compiled: Compiled, stages: int, memory: str, microbatches: int | None, inputs: Sequence[Any]
) -> tuple[Mapping[Node, int], dict[str, Any]]:
    """Stages of equal time, with what their ranks have to stream for each microbatch."""
    from dfc.planning.balanced import balanced_within
    from dfc.planning.microbatches import batch_dims, batch_of, parts_of
    from dfc.planning.tier_plan import DISK
    from dfc.runtime.pipeline.local import MICROBATCHES
    from dfc.runtime.tiers.stages import rank_memories

    graph = compiled.graph
    memories = rank_memories(rank_budgets(memory)[0], stages)
    batch = batch_of(graph)
    count = microbatches or MICROBATCHES
    dims = batch_dims(graph, batch, count)
    first = parts_of(graph, batch, inputs, dims, count)[0]
    placed, ranks = balanced_within(graph, memories, [first[v] for v in graph.inputs], DISK)
    return placed, {"placement": ranks}


def _maker(
    where: Where,
    compiled: Compiled,
    stages: int | None,
    inputs: Sequence[Any],
    say: Say,
    memory: str | None = None,
    microbatches: int | None = None,
) -> tuple[Callable[..., Any], Mapping[Node, int], dict[str, Any]]:
    """What makes a pipeline there, and its stages with what the plan says of ranks and order."""
    if where.on == "torchrun":
        from dfc.runtime.pipeline.torchrun import Launched, agreed_stages
        from dfc.runtime.pipeline.world import World

        world = World.of_launcher()
        make = partial(Launched, world=world, links=where.links)
        _require_same_sizes(world, compiled.graph, inputs)
        if stages is None:
            return make, *_placed(compiled, stages, inputs, say)
        placed = agreed_stages(
            world, compiled.graph, lambda: _placed(compiled, stages, inputs, say)[0]
        )
        return make, placed, {}
    if where.on in ("processes", "ray"):
        from dfc.runtime.pipeline.processes import Processes
        from dfc.runtime.pipeline.ray_ import RayLauncher
        from dfc.runtime.pipeline.spawn import Spawner

        launcher: Any = RayLauncher if where.on == "ray" else Spawner
        if where.use and where.on == "ray":
            launcher = partial(RayLauncher, before=partial(load_used, _anywhere(where.use)))
        elif where.use:
            launcher = partial(Spawner, entry=("dfc.cli.used_rank", *where.use, "--"))
        made = partial(Processes, launcher=launcher, links=where.links)
        return made, *_placed(compiled, stages, inputs, say, memory, microbatches)
    from dfc.runtime.pipeline.local import Pipeline

    return Pipeline, *_placed(compiled, stages, inputs, say, memory, microbatches)


def _require_same_sizes(world: World, graph: Graph, inputs: Sequence[Any]) -> None:
    """
    Raises:  DfcError N055 for a rank that was given inputs of other sizes: those of rank 0 are run.
    """
    sizes = {
        f"input `{v.name}` of size": "x".join(map(str, getattr(x, "shape", ()))) or "1"
        for v, x in zip(graph.inputs, inputs, strict=True)
    }
    help = "give all ranks the same files, or the same --size: rank 0's are run"
    world.same(sizes, "inputs", help)


def _anywhere(use: Sequence[str]) -> list[str]:
    """Files by their whole paths: an actor may have another working directory."""
    return [str(Path(name).absolute()) if Path(name).exists() else name for name in use]


def run_stages(
    folder: str,
    inputs: Callable[[Graph, Sequence[Any] | None], list[Any]],
    microbatches: int | None,
    trace: str | None,
    force: bool,
    say: Say,
) -> tuple[Graph, list[Any], dict[str, Any]]:
    """A folder of ONNX stages: its graph, the output leaves, and what a step took.

    `inputs` chooses them, for the graph and the example that the folder holds.
    Raises:  what `read_bundle` raises; X002, D063 for its files; D010.. for the trace.
    """
    from dfc.emit.onnx_stages import PROBES
    from dfc.package import read_probes
    from dfc.runtime.pipeline.bundle import read_bundle

    bundle = read_bundle(folder)
    file = bundle.path / PROBES
    probes = read_probes(file) if file.exists() else []
    given = inputs(bundle.graph, probes[0].inputs if probes else None)
    say(f"loading {counted(len(bundle.stages), 'stage')} into ONNX Runtime")
    with bundle.pipeline(microbatches=microbatches) as pipeline:
        return bundle.graph, *step(pipeline, given, trace, force, say)


def step(
    pipeline: Pipeline, inputs: Sequence[Any], trace: str | None, force: bool, say: Say
) -> tuple[list[Any], dict[str, Any]]:
    """The results, and what the step in the middle of several took."""
    from dfc.planning.tier_advice import tiers_data

    reports = []
    for i in range(_WARM + _STEPS):
        say(f"step {i + 1} of {_WARM + _STEPS}")
        results = pipeline.run_flat(inputs)
        reports.append(pipeline.report())
    report = sorted(reports[_WARM:], key=lambda r: r.seconds)[_STEPS // 2]
    if trace:
        from dfc.publish import publish_file

        names = [f"rank {r}" for r in range(len(pipeline.threads))]
        with publish_file(Path(trace), force=force) as temp:
            temp.write_text(json.dumps(report.trace(names)), encoding="utf-8")
    return results, {
        "stages": [
            {"nodes": len(s.graph), "rank": rank, "device": pipeline.devices[rank],
             "threads": pipeline.threads[rank],
             "seconds": t, "busy": report.busy[rank], "values_in": len(s.takes),
             **({"tiers": tiers_data(pipeline.tiers[i])} if pipeline.tiers else {})}
            for i, (s, t, rank) in enumerate(zip(
                pipeline.stages, report.stage_seconds, pipeline.placement, strict=True))
        ],
        **({"streamed_bytes": list(report.streamed), "read_bytes": list(report.read)}
           if pipeline.tiers else {}),
        "microbatches": report.program.microbatches,
        **_fewer_microbatches(pipeline, report.program.microbatches),
        "step_seconds": report.seconds,
        "predicted_seconds": report.predicted,
        "bubble": report.bubble,
        "links": [
            {"from": source, "to": target, "bytes": size}
            for (source, target), size in report.bytes.items()
        ],
    }  # fmt: skip


def _fewer_microbatches(pipeline: Pipeline, made: int) -> dict[str, str]:
    """Why a batch is not cut into as many as were asked for."""
    from dfc.planning.microbatches import least_of

    if made >= pipeline.microbatches:
        return {}
    if pipeline.batch is None:
        why = "the model has no batch of a size that varies, trace it with one"
    else:
        least = least_of(pipeline.graph, pipeline.batch)
        why = f"each has {least} or more of the batch `{pipeline.batch}`"
        if needed := pipeline.graph.requires:
            why += f", and sizes that satisfy `{needed[0]}`"
    return {
        "fewer_microbatches": f"{counted(made, 'microbatch')}, not {pipeline.microbatches}: {why}"
    }


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_WARM + _STEPS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times[_WARM:])[_STEPS // 2]


def show(data: dict[str, Any]) -> None:
    """The report as text."""
    from dfc.cli.tables import print_table, print_text
    from dfc.lang.units import amount_text

    def seconds(x: float) -> str:
        return amount_text(x, "time")

    print_table(
        ["stage", "rank", "device", "threads", "nodes", "a microbatch", "rank busy"],
        [
            [str(i), str(s["rank"]), s["device"], str(s["threads"]), str(s["nodes"]),
             seconds(s["seconds"]), f"{s['busy']:.0%}"]
            for i, s in enumerate(data["stages"])
        ],
        right=(0, 1, 3, 4, 5, 6),
    )  # fmt: skip
    took, predicted = data["step_seconds"], data["predicted_seconds"]
    print_text(
        f"the step of {counted(data['microbatches'], 'microbatch')} took {seconds(took)}, "
        f"{seconds(predicted)} were predicted from the stages' times; the busiest rank waited "
        f"{data['bubble']:.0%} of it"
    )
    for told in data.get("incidents", ()):
        print_text(f"mended: {told}")
    if "streamed_bytes" in data:
        show_tiers(data)
    over = _LINKS.get(data.get("link_kind") or "", "")
    for link in data["links"]:
        size = amount_text(link["bytes"], "bytes")
        print_text(f"stage {link['from']} gave {size} to stage {link['to']}{over}")
    if "unsplit_seconds" in data:
        print_text(verdict(took, data["unsplit_seconds"], data["unsplit_threads"]))
    for fewer in ("fewer", "fewer_microbatches"):
        if fewer in data:
            print_text(data[fewer])
    for name, error in data.get("differs", {}).items():
        print_text(
            f"note: `{name}` differs from the unsplit model's by {error:.0%} of its norm: items of "
            "the batch depend on each other, or it is random; with -m 1 they are together"
        )


def verdict(took: float, unsplit: float, threads: int) -> str:
    """Whether the pipeline was worth it."""
    from dfc.lang.units import amount_text

    count = f"{threads} thread" + ("s" if threads > 1 else "")
    told = f"the model unsplit, on {count}, took {amount_text(unsplit, 'time')}: "
    if took < unsplit:
        return f"{told}the pipeline is {unsplit / took:.2f} times as fast"
    return f"{told}run it unsplit, the pipeline takes {took / unsplit:.2f} times as long"
