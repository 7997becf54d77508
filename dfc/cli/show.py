"""`dfc show`: a graph as text, in summary, or what was decided about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import MODEL_HELP, Json, Use, load_used
from dfc.cli.recipes import Level, RecipeName, Settings, TargetFile
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Graph

_COLOURS = {
    r'(?P<a>"[^"\n]*")': "green",
    r"(?P<a>%\.?\w+)": "cyan",
    r"(?P<a>!(\"[^\"]*\"|[\w.]+))": "yellow",
    r"(?P<a>\b(aten|dfc|torch|prims)\.[\w.]+)": "bold blue",
    r"(?P<a>\b[a-z]+\d+\w*\[[^\]\n]*\]|\bbool\[[^\]\n]*\])": "magenta",
    r"(?P<a>sha256:[0-9a-f]+|loc\(.*\)|#.*)$": "dim",
}


def show(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help=f"{MODEL_HELP} Or a recipe.dfc.", show_default=False
        ),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Inputs, outputs, sizes and ops, counted.")
    ] = False,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved", help="The recipe, resolved: every step and option; engine and versions."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Stages, devices and schedule of a partitioned package.")
    ] = False,
    name: RecipeName = None,
    level: Level = None,
    target: TargetFile = None,
    settings: Settings = None,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Show a model's graph, a package's own, or a recipe, resolved.

    \b
    Examples:
      dfc show encoder.py:build > encoder.dfc
      dfc show --resolved small.dfc --set q.limit=3
      dfc show --resolved -O2
      dfc show --plan encoder.dfcpkg
    """
    from dfc.cli.progress import Progress

    load_used(use)
    if model is None or _is_recipe(model):
        _show_recipe(model, name, level, target, settings, as_json)
        return
    if (name, level, target, settings or None) != (None, None, None, None):
        message = f"--name, -O, -t and --set are of recipes, and `{model}` is none"
        raise DfcError("D054", message)
    if plan:
        _show_plan(model, as_json)
        return
    with Progress() as say:
        graph, decided = _read(model, say)
        say("printing")
        data: dict[str, Any] = {}
        if summary or (as_json and not resolved):
            data["summary"] = summarise(graph)
        if resolved or (as_json and not summary):
            data["resolved"] = decided
        if not (summary or resolved):
            data["text"] = str(graph)
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": model, **data})
        return
    if "summary" in data:
        _print_summary(data["summary"])
    if "resolved" in data:
        _print_resolved(data["resolved"])
    if "text" in data:
        _print_graph(data["text"])


def _show_plan(model: str, as_json: bool) -> None:
    """Print the plan of a package, as `dfc plan` prints one that it makes.

    Raises:  DfcError D054 for what has no plan.
    """
    from dfc.cli.plan import data_of, show_plan
    from dfc.cli.sources import is_package
    from dfc.cli.tables import print_json

    found = None
    if is_package(model):
        from dfc.package import read_package

        found = read_package(Path(model)).plan
    if found is None:
        help = "`partition` in a recipe leaves one in the package; `dfc plan` makes one at once"
        raise DfcError("D054", f"`{model}` holds no plan", help=help)
    if as_json:
        print_json({"model": model, "plan": data_of(found)})
    else:
        show_plan(found)


def _is_recipe(model: str) -> bool:
    """Whether a file of the language holds no graph, but recipes, targets and rules."""
    from dfc.recipe.sources import split_name

    file, _ = split_name(model)
    path = Path(file)
    if path.suffix != ".dfc" or not path.is_file():
        return False
    from dfc.cli.sources import read_source
    from dfc.lang.source import holds_graph

    return not holds_graph(read_source(file).text)


def _show_recipe(
    file: str | None,
    name: str | None,
    level: int | None,
    target: str | None,
    settings: list[str] | None,
    as_json: bool,
) -> None:
    """Print a recipe without imports, defaults and settings filled in."""
    from dfc.cli.recipes import choose_recipe

    if file is None and level is None:
        help = "name a model, a package, a recipe.dfc, or a preset by -O2"
        raise DfcError("D054", "there is nothing to show", help=help)
    plan = choose_recipe(file, name, level, None, target, settings).plan
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": file, "resolved": {"recipe": str(plan)}})
    else:
        _print_graph(str(plan))
    for warning in plan.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _read(model: str, say: Any) -> tuple[Graph, dict[str, Any]]:
    from dfc.cli.sources import is_package, open_source
    from dfc.recipe.sources import DEFAULT_RECIPE, plan_of

    if is_package(model):
        from dfc.package import read_package

        say(f"reading {model}")
        package = read_package(Path(model))
        decided = {"recipe": package.recipe, **package.lock, "proof": package.report.proof}
        if package.plan is not None:
            from dfc.planning.wording import summary

            decided["plan"] = summary(package.plan)
        return package.graph, decided
    if Path(model).suffix == ".dfc":
        import dfc
        from dfc.cli.sources import read_text

        graph = dfc.parse(read_text(Path(model)), model)
    else:
        say("loading PyTorch")
        source = open_source(model)
        say("tracing")
        graph = source.graph()
    return graph, {"recipe": str(plan_of(DEFAULT_RECIPE)), "engine": "auto"}


def summarise(graph: Graph) -> dict[str, Any]:
    """What a graph takes, gives and is made of."""
    from dfc.cli.inputs import input_names, output_names
    from dfc.ir.types import TensorType

    ops = Counter(node.op for node in graph.walk())
    dtypes: Counter[str] = Counter()
    size = elements = 0
    for p in graph.parameters.values():
        assert isinstance(p.type, TensorType)
        count = int(p.type.numel)  # type: ignore[arg-type]
        size += count * p.type.dtype.itemsize
        elements += count
        dtypes[str(p.type.dtype)] += count
    return {
        "name": graph.name,
        "inputs": {n: str(v.type) for n, v in zip(input_names(graph), graph.inputs, strict=True)},
        "outputs": {
            n: str(v.type) for n, v in zip(output_names(graph), graph.outputs, strict=True)
        },
        "mutates": [m.target.name for m in graph.mutations],
        "ranges": {k: list(r) for k, r in graph.ranges.items()},
        "requires": [str(r) for r in graph.requires],
        "nodes": len(graph),
        "ops": dict(ops.most_common()),
        "parameters": {
            "count": len(graph.parameters),
            "elements": elements,
            "bytes": size,
            "dtypes": dict(dtypes),
            "with_data": sum(p.data is not None for p in graph.parameters.values()),
        },
        "notes": list(graph.notes),
    }


def _print_summary(s: dict[str, Any]) -> None:
    from dfc.cli.tables import bytes_text, print_table, print_text

    held = s["parameters"]
    dtypes = ", ".join(held["dtypes"]) or "none"
    elements = f"{held['elements']:,} element{'s' * (held['elements'] != 1)}"
    print_text(
        f"@{s['name']}: {counted(s['nodes'], 'node')}, {counted(held['count'], 'parameter')} "
        f"({elements}, {bytes_text(held['bytes'])}, {dtypes})\n"
    )
    rows = [["input", n, t] for n, t in s["inputs"].items()]
    rows += [["output", n, t] for n, t in s["outputs"].items()]
    rows += [["mutates", n, ""] for n in s["mutates"]]
    for name, (low, high) in s["ranges"].items():
        rows.append(["size", name, f"{low}..{high}" if high is not None else f"at least {low}"])
    rows += [["requires", r, ""] for r in s["requires"]]
    print_table(["", "name", "type"], rows)
    print_text("")
    print_table(["op", "count"], [[op, str(n)] for op, n in s["ops"].items()], right=(1,))
    for note in s["notes"]:
        print_text(f"note: {note}")


def _print_resolved(decided: dict[str, Any]) -> None:
    from dfc.cli.tables import print_text

    print_text(decided["recipe"].rstrip())
    for key, value in decided.items():
        if key != "recipe":
            print_text(f"# {key:<8} {value}")


def _print_graph(text: str) -> None:
    import sys

    if not sys.stdout.isatty():
        print(text, end="" if text.endswith("\n") else "\n")
        return
    from rich.text import Text

    from dfc.cli.tables import console

    out = console()
    for line in text.splitlines():
        coloured = Text(line)
        for pattern, style in _COLOURS.items():
            coloured.highlight_regex(pattern.replace("(?P<a>", "("), style)
        out.print(coloured, soft_wrap=True)
