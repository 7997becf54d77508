"""`dfc compile`: a model in, a proved package and ONNX out, and a table of what was gained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.compile_tables import facts, print_facts
from dfc.cli.options import Device, Force, Json, Model, Use, load_used
from dfc.cli.recipes import Level, RecipeFile, RecipeName, Settings, Steps, TargetFile
from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.cli.progress import Progress
    from dfc.cli.recipes import Chosen
    from dfc.compiled import Compiled


def compile(
    model: Model,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="Write a package here.")
    ] = None,
    onnx: Annotated[
        str | None, typer.Option("--onnx", metavar="PATH", help="Write plain ONNX here.")
    ] = None,
    contrib: Annotated[
        bool,
        typer.Option(
            "--contrib/--no-contrib", help="Allow ONNX Runtime's own operators in that file."
        ),
    ] = False,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            metavar="N|separate",
            help="With --onnx: a folder, one file for each of N stages of equal time, or for each "
            "stage of `partition`. `dfc run` executes it as a pipeline.",
        ),
    ] = None,
    recipe: RecipeFile = None,
    name: RecipeName = None,
    level: Level = None,
    passes: Steps = None,
    target: TargetFile = None,
    settings: Settings = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=FILE.py:FUNCTION",
            help="Data of the recipe: what it returns, or yields each time that it is read.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME=FILE.py:FUNCTION",
            help="A metric of the recipe: FUNCTION(run, data), or FUNCTION(run) without data.",
        ),
    ] = None,
    function: Annotated[
        list[str] | None,
        typer.Option(
            "--function",
            metavar="NAME=FILE.py:FUNCTION",
            help="A function of the recipe: `recover by NAME` calls it with the module and data.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="60s|20",
            help="For `tune` and `auto`: a time, or a number of tries.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="auto, or names of `dfc list engines`, commas between.")
    ] = "auto",
    verify: Annotated[
        str | None,
        typer.Option("--verify", help="Prove each pass, the end result, or none.", metavar="MODE"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a rewrite is wrong; else it is left out.")
    ] = False,
    reproducers: Annotated[
        str | None,
        typer.Option(
            "--reproducers",
            metavar="DIR",
            help="Write what shows a wrong rewrite again below here; none: nowhere. "
            "Default: $DFC_REPRODUCERS, else ~/.cache/dfc/reproducers.",
        ),
    ] = None,
    print_after: Annotated[
        str | None,
        typer.Option("--print-after", metavar="PASS|all", help="Print the graph, on stderr."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="A .safetensors file, for graph text and models on the meta device.",
        ),
    ] = None,
    device: Device = "cpu",
    use: Use = None,
    force: Force = False,
    as_json: Json = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="PATH", help="Write the report as a page.")
    ] = None,
) -> None:
    """Compile a model, prove it, choose the fastest engine.

    Exit status 5 says that a requirement of the recipe is not met: then the report is printed (and
    written, with --html), and nothing else is written.

    \b
    Examples:
      dfc compile encoder.py:build -o encoder.dfcpkg --onnx encoder.onnx
      dfc compile encoder.py:build --onnx encoder.stages --stages 2
      dfc compile encoder.py:build -r small.dfc --data val=data.py:val --metric top1=data.py:top1
      dfc compile graph.dfc --weights net.safetensors -p 'cse,fuse{rules=norms}' --print-after fuse
    """
    from dfc.cli.outputs import require_apart, require_sources_kept, require_writable
    from dfc.cli.progress import Progress
    from dfc.cli.recipes import choose_recipe, emit_paths

    load_used(use)
    parts = _stages(stages, onnx)
    if contrib and onnx is None:
        raise DfcError("Q006", "--contrib is for a file", help="name it: --onnx FILE")
    named = (("-o", output), ("--onnx", onnx), ("--html", html))
    require_apart(*named)
    read = [model, recipe, target, weights, *(data or ()), *(metric or ()), *(function or ())]
    require_sources_kept(read, *named)
    require_writable(output, force, folder=True)
    require_writable(onnx, force, folder=parts is not None)
    require_writable(html, force)
    with Progress() as say:
        say("reading the options")
        chosen = choose_recipe(recipe, name, level, passes, target, settings)
        for what, path, is_folder in emit_paths(chosen.plan, output):
            require_apart(*named, (what, path))
            require_sources_kept(read, (what, path))
            require_writable(path, force, folder=is_folder)
        job = _Job(
            chosen,
            data,
            metric,
            function,
            budget,
            engine,
            verify,
            strict,
            device,
            reproducers,
            say,
            weights,
        )
        compiled, missed = job.run(model, print_after)
        written: dict[str, str] = {}
        if missed is None:
            try:
                _write(compiled, output, onnx, contrib, parts, force, say, written)
            except DfcError as e:  # told behind the report, which says what was written
                missed = e
        if html:
            from dfc.cli.outputs import write_text

            write_text(html, compiled.report.to_html(), force)
            written["html"] = html
        say("looking for the largest error")
        told = facts(model, compiled, written, missed is not None)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(told)
    else:
        print_facts(model, compiled, told)
    if missed is not None:
        raise missed


@dataclass
class _Job:
    """What the options ask of one compilation."""

    chosen: Chosen
    data: list[str] | None
    metrics: list[str] | None
    functions: list[str] | None
    budget: str | None
    engine: str
    verify: str | None
    strict: bool
    device: str
    reproducers: str | None
    say: Progress
    weights: str | None = None

    def run(self, model: str, print_after: str | None) -> tuple[Compiled, DfcError | None]:
        """What was compiled, and the error of a requirement that it does not meet."""
        say = self.say
        import dfc
        from dfc.cli.engines import check_engine
        from dfc.cli.recipes import check_given, named_data, named_functions, named_metrics
        from dfc.cli.sources import open_source
        from dfc.planning.torch_device import check_device
        from dfc.recipe.searching import Budget
        from dfc.rewrite.driver import VERIFY

        if self.verify not in (None, *VERIFY):
            message = f"verify is one of {', '.join(VERIFY)}, got `{self.verify}`"
            raise DfcError("Q004", message)
        check_engine(self.engine)
        check_device(self.device)
        Budget.of(self.budget)
        if self.budget is not None and not self.chosen.plan.holes:
            help = "write `tune(a, b)` or `auto` for a value of the recipe, or leave out --budget"
            raise DfcError("Q006", "--budget is for a search, and nothing is searched", help=help)
        _check_print_after(print_after, [step.name for step in self.chosen.plan.passes()])
        check_given(self.chosen.plan, self.data, self.metrics, self.functions)
        say(f"loading {model}")
        source = open_source(model, self.weights)
        metrics, data = named_metrics(self.metrics), named_data(self.data)

        def show(step: str, graph: Any) -> None:
            if print_after in ("all", step.partition("{")[0]):
                say.log(f"# after {step}\n{graph}")

        try:
            compiled = dfc.compile(
                source.model,
                source.args,
                source.kwargs,
                source.dynamic_shapes,
                recipe=self.chosen.recipe,
                settings=self.chosen.settings or None,
                target=self.chosen.target,
                data=data,
                metrics=metrics,
                functions=named_functions("--function", self.functions),
                budget=self.budget,
                engine=self.engine,
                verify=self.verify,
                strict=self.strict,
                device=self.device,
                reproducers=self.reproducers,
                weights=None if source.kind == "graph" else self.weights,  # that has them
                print_after=show if print_after else None,
                progress=say,
            )
        except dfc.RequirementMissed as e:
            return e.compiled, e
        return compiled, None


def _write(
    compiled: Compiled,
    output: str | None,
    onnx: str | None,
    contrib: bool,
    stages: str | int | None,
    force: bool,
    say: Progress,
    written: dict[str, str],
) -> None:
    """The package, what the recipe emits beside it, and the ONNX file of the command line."""
    from dfc.cli.recipes import stem_of

    if output:
        say(f"writing {output}")
        compiled.save(output, force=force)
        written["package"] = output
        if compiled.emits:
            say("writing what the recipe emits")
            paths = compiled.emit(stem_of(output), force=force)
            written |= {f"emitted {i}": path for i, path in enumerate(paths, 1)}
    elif compiled.emits:
        formats = ", ".join(format for format, _ in compiled.emits)
        compiled.report.notes.append(f"`emit {formats}` writes beside a package: name one by -o")
    if onnx:
        say(f"writing {onnx} and running it in ONNX Runtime")
        compiled.export(onnx, force=force, contrib=contrib, stages=stages)
        written["onnx"] = onnx
        count = len(list(Path(onnx).glob("stage_*.onnx")))
        if isinstance(stages, int) and count != stages:
            fewer = f"{counted(count, 'stage')}, not {stages}: no more of its nodes can be apart"
            compiled.report.notes.append(fewer)


def _stages(text: str | None, onnx: str | None) -> str | int | None:
    """What --stages asks for."""
    if text is None:
        return None
    if onnx is None:
        raise DfcError("Q006", "--stages needs a folder", help="name it: --onnx FOLDER")
    if text.isdecimal() and int(text):
        return int(text)
    if text != "separate":
        raise DfcError("Q006", f"--stages is a number or `separate`, got `{text}`")
    return text


def _check_print_after(wanted: str | None, names: list[str]) -> None:
    if wanted not in (None, "all", *names):
        assert wanted is not None
        raise DfcError(
            "Q006",
            f"--print-after names `{wanted}`, the passes are {', '.join(names)}",
            help=did_you_mean(wanted, [*names, "all"]),
        )
