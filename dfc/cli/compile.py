"""`dfc compile`: a model in, a proved package and ONNX out, and a table of what was gained."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import Device, Force, Json, Model, Use, load_used
from dfc.errors import DfcError, did_you_mean

if TYPE_CHECKING:
    from dfc.cli.progress import Progress
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
    passes: Annotated[
        str | None,
        typer.Option(
            "-p", "--passes", metavar="STEPS", help="Passes in order, as in 'cse{limit=3},dce'."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="auto, eager, inductor or onnxruntime.")
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
    device: Device = "cpu",
    use: Use = None,
    force: Force = False,
    as_json: Json = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="PATH", help="Write the report as a page.")
    ] = None,
) -> None:
    """Compile a model, prove it, choose the fastest engine.

    \b
    Examples:
      dfc compile encoder.py:build -o encoder.dfcpkg
      dfc compile encoder.py:build --onnx encoder.onnx --engine onnxruntime
      dfc compile graph.dfc -p 'canonicalize,cse{limit=3}' --print-after cse
    """
    from dfc.cli.outputs import require_writable
    from dfc.cli.progress import Progress

    load_used(use)
    for path in (output, onnx, html):
        require_writable(path, force)
    written: dict[str, str] = {}
    with Progress() as say:
        compiled = _compile(
            model, passes, engine, verify, strict, print_after, device, reproducers, say
        )
        if output:
            say(f"writing {output}")
            compiled.save(output, force=force)
            written["package"] = output
        if onnx:
            say(f"writing {onnx} and running it in ONNX Runtime")
            compiled.export(onnx, force=force, contrib=contrib)
            written["onnx"] = onnx
        if html:
            from dfc.cli.outputs import write_text

            write_text(html, compiled.report.to_html(), force)
            written["html"] = html
        say("looking for the largest error")
        data = _facts(model, compiled, written)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(data)
    else:
        _print(model, compiled, data)


def _compile(
    model: str,
    passes: str | None,
    engine: str,
    verify: str | None,
    strict: bool,
    print_after: str | None,
    device: str,
    reproducers: str | None,
    say: Progress,
) -> Compiled:
    say("reading the options")
    import dfc
    from dfc.cli.engines import check_device, check_engine
    from dfc.cli.sources import open_source
    from dfc.recipe.sources import DEFAULT_RECIPE, plan_of
    from dfc.rewrite.driver import VERIFY

    plan = plan_of(DEFAULT_RECIPE) if passes is None else _pipeline(passes)
    if verify not in (None, *VERIFY):
        raise DfcError("Q004", f"verify is one of {', '.join(VERIFY)}, got `{verify}`")
    check_engine(engine)
    check_device(device)
    _check_print_after(print_after, [step.name for step in plan.passes()])
    say(f"loading {model}")
    source = open_source(model)

    def show(step: str, graph: Any) -> None:
        if print_after in ("all", step.partition("{")[0]):
            say.log(f"# after {step}\n{graph}")

    return dfc.compile(
        source.model,
        source.args,
        source.kwargs,
        source.dynamic_shapes,
        recipe=plan if passes is not None else None,
        engine=engine,
        verify=verify,
        strict=strict,
        device=device,
        reproducers=reproducers,
        print_after=show if print_after else None,
        progress=say,
    )


def _pipeline(text: str) -> Any:
    from dfc.cli.steps import parse_pipeline

    return parse_pipeline(text)


def _check_print_after(wanted: str | None, names: list[str]) -> None:
    if wanted not in (None, "all", *names):
        assert wanted is not None
        raise DfcError(
            "Q006",
            f"--print-after names `{wanted}`, the passes are {', '.join(names)}",
            help=did_you_mean(wanted, [*names, "all"]),
        )


def _facts(model: str, compiled: Compiled, written: dict[str, str]) -> dict[str, Any]:
    from dfc.cli.prove import largest_error
    from dfc.cli.tables import size_of

    worst = largest_error(compiled)
    return {
        "model": model,
        "engine": compiled.engine.name,
        "report": asdict(compiled.report),
        "largest_error": worst.to_data() if worst else None,
        "largest_error_text": str(worst) if worst else None,
        "written": {k: {"path": p, "bytes": size_of(p)} for k, p in written.items()},
        "next": _next(model, written),
    }


def _next(model: str, written: dict[str, str]) -> str:
    if "package" in written:
        return f"dfc bench {written['package']}"
    return f"dfc compile {json.dumps(model) if ' ' in model else model} -o model.dfcpkg"


def _print(model: str, compiled: Compiled, data: dict[str, Any]) -> None:
    from dfc.cli.tables import bytes_text, ms_text, print_table, print_text

    report = compiled.report
    print_text(f"{model}: {report.proof}\n")
    gain = ""
    if report.before_ms and report.after_ms:
        gain = f"{report.before_ms / report.after_ms:.2f}x on {compiled.engine.name}"
    rows = [
        ["nodes", str(report.nodes_before), str(report.nodes_after), ""],
        ["weights", bytes_text(report.bytes_before), bytes_text(report.bytes_after), ""],
        ["latency", ms_text(report.before_ms), ms_text(report.after_ms), gain],
    ]
    print_table(["", "before", "after", ""], rows, right=(1, 2))
    if data["largest_error_text"]:
        print_text(f"largest error against the original: {data['largest_error_text']}")
    if report.passes:
        print_text("")
        _print_passes(report)
    if report.engines:
        print_text("")
        _print_engines(report)
    for note in report.notes:
        print_text(f"note: {note}")
    print_text("")
    for kind, file in data["written"].items():
        print_text(f"wrote {file['path']} ({kind}, {bytes_text(file['bytes'])})")
    print_text(f"next: {data['next']}")


def _print_passes(report: Any) -> None:
    from dfc.cli.tables import ms_text, print_table

    rows = [
        [p.step, str(p.changes), f"{p.nodes_before} -> {p.nodes_after}", ms_text(p.ms),
         f"{p.verdict}: {p.reason}" if p.reason else p.verdict]
        for p in report.passes
    ]  # fmt: skip
    print_table(["pass", "changes", "nodes", "time", ""], rows, right=(1, 3))


def _print_engines(report: Any) -> None:
    from dfc.cli.tables import ms_text, print_table

    rows = [
        [e.name, ms_text(e.p50_ms), f"± {ms_text(e.spread_ms)}" if e.spread_ms is not None else "",
         f"{e.verdict}: {e.reason}" if e.reason else e.verdict]
        for e in report.engines
    ]  # fmt: skip
    print_table(["engine", "p50", "spread", ""], rows, right=(1,))
