"""`dfc run`: a compiled model on inputs from files, at random, or on its example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import (
    Device,
    Files,
    Force,
    Json,
    Model,
    Random,
    Seed,
    Sizes,
    Use,
    load_used,
)  # fmt: skip
from dfc.cli.pipelined import Where
from dfc.cli.replay import is_reproducer, replay_folder
from dfc.cli.results import FORMATS, describe, print_results, write_tensors
from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.cli.progress import Progress
    from dfc.compiled import Compiled
    from dfc.ir.graph import Graph

LINKS = {"sockets": "local", "gloo": "gloo", "nccl": "nccl"}
PLACES = ("threads", "processes", "torchrun", "ray")


def run(
    model: Model,
    inputs: Files = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="PATH", help="Write the outputs: .npz, .safetensors."
        ),
    ] = None,
    random: Random = False,
    size: Sizes = None,
    seed: Seed = 0,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", help="Another engine than the package's; in a pipeline one for each stage."
        ),
    ] = None,
    device: Device = "cpu",
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="N|plan",
            help="Run as N stages of equal time, or as `partition` planned it.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="WHERE", help=f"What a pipeline's stages run on: {', '.join(PLACES)}."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="cpu,cuda:0",
            help="A device for each stage of a pipeline, or one for all; else the plan's.",
        ),
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(
            "--links",
            metavar="KIND",
            help="What ranks in processes send over: sockets, gloo, or nccl between GPUs.",
        ),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option("-m", "--microbatches", min=1, help="Parts of the batch: 8, or as planned."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write the pipeline's times for Perfetto; with --memory the plan's, or an .svg.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE[,...]",
            help="Take no more of the device, or of each rank: what does not fit is streamed.",
        ),
    ] = None,
    use: Use = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run a model, or a reproducer, and say what came out.

    \b
    Examples:
      dfc run encoder.dfcpkg inputs.npz -o outputs.npz
      dfc run encoder.dfcpkg --random --size B=4,S=16 --seed 0
      dfc run encoder.dfcpkg --size B=32,S=16 --pipeline 2 --on processes --trace step.json
      dfc run decoder.dfcpkg inputs.npz --memory 8GB --device cuda --trace passes.svg
      torchrun --nproc-per-node 2 -m dfc.cli run encoder.dfcpkg --pipeline 2 --on torchrun

    \b
    A pipeline tells what a step took beside what was predicted. `--pipeline plan` takes the stages
    of `partition`; `--on processes` gives each rank a process; `--engine eager,onnxruntime` gives
    each stage an engine, and `--devices cpu,cuda:0` a device. A folder of ONNX stages (`dfc compile
    --stages`) is a pipeline already, and runs in ONNX Runtime.

    \b
    With --memory a model runs that does not fit: as many weights as can stay, the others come from
    the package's file, or from this machine's memory to a GPU, while other layers compute. It tells
    what a pass took beside the plan and the bound, and what would make it faster. With a budget for
    the host as well (cuda=8GiB,cpu=16GiB) what that does not hold is read from the file. In a
    pipeline each rank has so much, one value for all or one for each, and the host (1GiB,2GiB,
    host=4GiB) what ranks on devices stream; every microbatch is a pass.

    \b
    A reproducer is what dfc writes when it finds a rewrite to be wrong. It exits with 4 while the
    rewrite is wrong, and with 0 when it no longer is.
    """
    from dfc.cli.inputs import output_names
    from dfc.cli.outputs import (
        require_apart,
        require_sources_kept,
        require_suffix,
        require_writable,
    )  # fmt: skip
    from dfc.cli.progress import Progress
    from dfc.emit.onnx_stages import is_stages

    staged = is_stages(model)
    check_choices(model if staged else None, {
        "--pipeline": pipeline, "--engine": engine, "--device": device != "cpu", "--memory": memory,
        "--on": on not in (None, PLACES[0]), "--devices": devices, "--links": links,
    })  # fmt: skip
    check_place(None if staged else on, pipeline)
    check_links(links, devices, on, pipeline)
    if memory is not None:
        check_memory(memory, pipeline, microbatches)
    load_used(use)
    if is_reproducer(model):
        raise typer.Exit(replay_folder(model, as_json))
    require_apart(("-o", output), ("--trace", trace))
    require_sources_kept([model, *(inputs or ())], ("-o", output), ("--trace", trace))
    require_suffix("-o", output, *FORMATS)
    drawn = memory is not None and pipeline is None  # of a pipeline there is a trace alone
    require_suffix("--trace", trace, ".json", *([".svg"] if drawn else []))
    require_writable(output, force)
    require_writable(trace, force)
    with Progress() as say:
        job = _Job(
            inputs, random, size, seed, engine, device, microbatches,
            Where(on or PLACES[0], device, devices, LINKS[links] if links else None, use or ()),
            trace, force, say, memory,
        )  # fmt: skip
        ran = job.run(model, pipeline, staged)
        named = dict(zip(output_names(ran.graph), ran.results, strict=True))
        if output:
            say(f"writing {output}")
            write_tensors(output, named, force)
    rows = [describe(name, x) for name, x in named.items()]
    if as_json:
        from dfc.cli.tables import print_json

        print_json(
            {"model": model, "engine": ran.engine, "inputs": ran.origin, "outputs": rows,
             "written": output, **ran.told}
        )  # fmt: skip
        return
    from dfc.cli.tables import print_text

    print_text(f"{model} on {ran.engine}, inputs: {ran.origin}")
    print_results(rows)
    ran.show()
    for row in rows:
        if row["not_finite"]:
            name, n = row["name"], row["not_finite"]
            which = counted(n, f"element of {name} is", f"elements of {name} are")
            print_text(f"note: {which} not finite")
    if output:
        print_text(f"wrote {output}")


def check_choices(staged: str | None, options: Mapping[str, Any]) -> None:
    """Raises:  DfcError Q006 for options that a folder of ONNX stages leaves no choice of."""
    given = [name for name, value in options.items() if value]
    if staged and given:
        message = f"`{staged}` is cut into its stages already, and runs in ONNX Runtime in threads"
        help = (
            f"leave out {', '.join(given)}; a package has the choice: `dfc run MODEL.dfcpkg "
            "--pipeline 2 --engine onnxruntime --on processes`"
        )
        raise DfcError("Q006", message, help=help)


def check_place(on: str | None, stages: str | None) -> None:
    """Whether a pipeline can run there, before anything is loaded.

    Raises:  DfcError Q006 for what does not go together, N057 for a world of another size.
    """
    if on is None:
        return
    if on not in PLACES:
        known = f"there are {', '.join(PLACES)}; devices of stages are for --devices"
        help = did_you_mean(on, PLACES) or known
        raise DfcError("Q006", f"`{on}` is nothing that a pipeline runs on", help=help)
    if stages is None:
        help = "say into how many stages: --pipeline 2"
        raise DfcError("Q006", "--on is for pipelines", help=help)
    if on == "torchrun":
        from dfc.runtime.pipeline.world import World

        world, count = World.of_launcher(), _count(stages)
        if count is not None:  # a plan's ranks are known when it is read
            world.expect(count)


def check_links(links: str | None, devices: str | None, on: str | None, stages: str | None) -> None:
    """Raises:  DfcError Q006 for options that are not for this, N059 for links there are not."""
    if devices is not None and stages is None:
        help = "say into how many stages: --pipeline 2; for the model as a whole there is --device"
        raise DfcError("Q006", "--devices is for pipelines", help=help)
    if links is None:
        return
    if links not in LINKS:
        help = did_you_mean(links, list(LINKS)) or f"there are {', '.join(LINKS)}"
        raise DfcError("N059", f"there are no links `{links}`", help=help, status=2)
    if on not in ("processes", "torchrun"):
        help = "run it with --on processes or --on torchrun"
        raise DfcError("Q006", "--links is for ranks in processes", help=help)


def check_memory(memory: str, stages: str | None, microbatches: int | None) -> None:
    """Raises:  DfcError Q010 for what is no size, Q006 for what only a pipeline has."""
    from dfc.lang.units import byte_count

    sizes = memory.split(",")
    for size in sizes:
        byte_count(size.rpartition("=")[2].strip())
    if "=" in memory and stages is not None:
        from dfc.cli.stage_tiers import rank_budgets

        rank_budgets(memory)
    elif "=" in memory:
        from dfc.cli.streamed import budgets

        budgets(memory, "")
        sizes = [memory]
    if stages is None and (len(sizes) > 1 or microbatches is not None):
        option = "--memory of several ranks" if len(sizes) > 1 else "--microbatches"
        help = "say into how many stages: --pipeline 2"
        raise DfcError("Q006", f"{option} is for pipelines", help=help)


@dataclass
class _Ran:
    """What was run, on what, and what came out."""

    graph: Graph
    engine: str
    origin: str
    results: list[Any]
    measured: dict[str, Any] | None = None
    kind: str = "pipeline"  # what was measured: it, or "tiers"

    @property
    def told(self) -> dict[str, Any]:
        return {self.kind: self.measured} if self.measured else {}

    def show(self) -> None:
        from dfc.cli import pipelined, streamed

        if self.measured:
            (streamed if self.kind == "tiers" else pipelined).show(self.measured)


@dataclass
class _Job:
    """What the options ask of one run."""

    files: list[str] | None
    random: bool
    size: str | None
    seed: int
    engine: str | None
    device: str
    microbatches: int | None
    where: Where
    trace: str | None
    force: bool
    say: Progress
    memory: str | None = None
    origin: str = ""

    def run(self, model: str, stages: str | None, staged: bool) -> _Ran:
        if staged:
            return self.stages(model)
        engines = (self.engine or "").split(",")
        if len(engines) > 1 and not stages:
            help = "with --pipeline N, each of N stages may have its own"
            raise DfcError("K001", f"`{self.engine}` are several engines", help=help, status=2)
        if self.memory is not None and stages is None:
            return self.streamed(model)
        compiled = self.opened(model, engines)
        example = compiled.probes[0].inputs if compiled.probes else None
        given = self.inputs(compiled.graph, example)
        if stages is None:
            return self.whole(compiled, given)
        return self.pipelined(compiled, given, _count(stages), engines)

    def opened(self, model: str, engines: list[str]) -> Compiled:
        """Ready to be called, or, where that may take more memory than there is, as it is."""
        if self.memory is None:
            return open_compiled(model, engines[0] or None, self.device, self.say)
        from dfc.cli.streamed import open_unbuilt

        return open_unbuilt(model, None, self.device, self.say)

    def inputs(self, graph: Graph, example: Sequence[Any] | None) -> list[Any]:
        from dfc.cli.inputs import choose_inputs

        found, self.origin = choose_inputs(
            graph, self.files, self.size, self.random, self.seed, example
        )
        return found

    def whole(self, compiled: Compiled, given: list[Any]) -> _Ran:
        from dfc.cli.inputs import on_device

        if self.trace or self.microbatches:
            option = "--trace" if self.trace else "--microbatches"
            help = "say into how many stages: --pipeline 2"
            raise DfcError("Q006", f"{option} is for pipelines", help=help)
        self.say(f"running on {compiled.engine.name}")
        results = _call(compiled, on_device(given, self.device), self.seed)
        return _Ran(compiled.graph, compiled.engine.name, self.origin, results)

    def streamed(self, model: str) -> _Ran:
        from dfc.cli.streamed import budgets, open_unbuilt, run_streamed

        self.device = budgets(self.memory or "", self.device)[0]
        compiled = open_unbuilt(model, self.engine, self.device, self.say)
        given = self.inputs(compiled.graph, compiled.probes[0].inputs if compiled.probes else None)
        results, measured = run_streamed(
            compiled, self.memory or "", self.device, given, self.seed, self.trace, self.force,
            self.say,
        )  # fmt: skip
        return _Ran(compiled.graph, "eager", self.origin, results, measured, "tiers")

    def pipelined(
        self, compiled: Compiled, given: list[Any], stages: int | None, engines: list[str]
    ) -> _Ran:
        from dfc.cli.pipelined import run_pipelined

        named = engines[0] and self.memory is not None  # it is not built for that engine
        names = engines if len(engines) > 1 or named else [compiled.engine.name]
        found = run_pipelined(
            compiled, given, stages, self.microbatches, names, self.where, self.trace, self.force,
            self.say, self.memory,
        )  # fmt: skip
        if found is None:
            raise typer.Exit()  # the process of rank 0 tells what came out
        results, measured = found
        return _Ran(compiled.graph, ", ".join(names), self.origin, results, measured)

    def stages(self, folder: str) -> _Ran:
        from dfc.cli.pipelined import run_stages

        graph, results, measured = run_stages(
            folder, self.inputs, self.microbatches, self.trace, self.force, self.say
        )
        return _Ran(graph, "onnxruntime", self.origin, results, measured)


def _count(text: str) -> int | None:
    """How many stages --pipeline asks for, None for those of the plan."""
    if text == "plan":
        return None
    if not text.isdecimal() or not int(text):
        help = "write --pipeline 2, or --pipeline plan"
        raise DfcError("Q006", f"`{text}` is neither a number of stages nor `plan`", help=help)
    return int(text)


def open_compiled(model: str, engine: str | None, device: str, say: Any) -> Compiled:
    """A package loaded, or a model compiled, for an engine."""
    say("loading PyTorch")
    import dfc
    from dfc.cli.engines import check_engine
    from dfc.cli.sources import is_package, open_source
    from dfc.planning.torch_device import check_device

    check_engine(engine or "auto")
    check_device(device)
    say(f"loading {model}")
    if is_package(model):
        return dfc.load(model, engine=None if engine == "auto" else engine, device=device)
    source = open_source(model)
    return dfc.compile(
        source.model, source.args, source.kwargs, source.dynamic_shapes,
        engine=engine or "eager", device=device, progress=say,
    )  # fmt: skip


def _call(compiled: Compiled, inputs: list[Any], seed: int) -> list[Any]:
    """The output leaves; random ops follow the seed."""
    import torch

    from dfc.rewrite.probe import clone

    torch.manual_seed(seed)
    results = compiled.run_flat(clone(inputs))
    return results[: len(compiled.graph.outputs)]
