"""`dfc explain`: why a rule, a pass or a node went the way it did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dfc.cli.options import Force, Json, Model, Use, load_used
from dfc.cli.recipes import TargetFile

if TYPE_CHECKING:
    from dfc.rewrite.pass_ import Pass


def explain(
    model: Model,
    rule: Annotated[
        str | None,
        typer.Option("--rule", metavar="NAME", help="Where a rule, or a set of them, applies."),
    ] = None,
    pass_: Annotated[
        str | None, typer.Option("--pass", metavar="NAME", help="What a pass did, and left.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="%NAME|MODULE|OP", help="What became of a node."),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--passes",
            metavar="STEPS",
            help="Passes in order; default: the shipped ones, then fuse.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("-r", "--recipe", metavar="FILE", help="Take the passes of a recipe."),
    ] = None,
    target: TargetFile = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--before", metavar="PASS", help="Try a rule on the graph as it reaches this pass."
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="What each lossy step of the recipe costs, layer by layer."
        ),
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME=FILE.py:FUNCTION",
            help="With --sensitivity: the recipe's metric that layers are judged by.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=FILE.py:FUNCTION", help="Data that the steps name."),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="LABEL", help="With --sensitivity: this step alone."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="With --sensitivity: where layers are timed.")
    ] = "eager",
    times: Annotated[
        bool, typer.Option("--times/--no-times", help="With --sensitivity: time each layer.")
    ] = True,
    output: Annotated[
        str | None,
        typer.Option("-o", metavar="FILE.svg", help="With --sensitivity: a plot, .svg or .html."),
    ] = None,
    force: Force = False,
    all_: Annotated[bool, typer.Option("--all", help="Every kind, not the nearest alone.")] = False,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Say why a rule, a pass or a node came out as it did.

    \b
    A rule is tried everywhere in the graph as it reaches `fuse`. For each near miss: how far it
    came, the first condition that fails with its values, and the nearest change that lets it
    match, which was tried on a copy of the graph. Without an option: an overview.

    \b
    Examples:
      dfc explain bert.py:build --rule fuse_attention
      dfc explain bert.py:build --node %softmax_3
      dfc explain bert.py:build -r staged.dfc --pass partition
      dfc explain bert.py:build -r int8.dfc --sensitivity --data calib=data.py:calib -o int8.svg
    """  # fmt: skip
    load_used(use)
    if sensitivity:
        _sensitivity(model, recipe, metric, data, step, engine, times, output, force, all_, as_json)
        return
    _nothing_else(metric, step, output)
    from dfc.cli.progress import Progress

    with Progress() as say:
        say("loading PyTorch")
        chosen, aim = _passes(passes, recipe, target)
        from dfc.cli.recipes import named_data
        from dfc.cli.sources import open_source
        from dfc.explaining import explain as answer

        say(f"loading {model}")
        source = open_source(model)
        found = answer(
            source.graph(), rule=rule, pass_=pass_, node=node, passes=chosen, before=before,
            all=all_, progress=say, data=named_data(data), target=aim,
        )  # fmt: skip
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": model, **found.data})
        return
    from dfc.cli.tables import print_text

    print_text(str(found))


def _nothing_else(metric: list[str] | None, step: str | None, output: str | None) -> None:
    """Refuse what only --sensitivity reads, rather than leave it unread.

    Raises:  DfcError D054.
    """
    given = [o for o, x in (("--metric", metric), ("--step", step), ("-o", output)) if x]
    if given:
        from dfc.errors import DfcError

        raise DfcError("D054", f"{given[0]} is for --sensitivity", help="add --sensitivity")


def _sensitivity(
    model: str, recipe: str | None, metric: list[str] | None, data: list[str] | None,
    step: str | None, engine: str, times: bool, output: str | None, force: bool, every: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from dfc.cli.outputs import require_writable
    from dfc.cli.progress import Progress
    from dfc.cli.sensitivity import check_output, tell, write_plot
    from dfc.errors import DfcError

    if recipe is None:
        help = "name one: dfc explain MODEL -r int8.dfc --sensitivity"
        raise DfcError("D054", "--sensitivity is measured of a recipe's steps", help=help)
    check_output(output)
    require_writable(output, force)
    with Progress() as say:
        say("loading PyTorch")
        import dfc
        from dfc.cli.recipes import named_data, named_metrics
        from dfc.cli.sources import open_source

        say(f"loading {model}")
        source = open_source(model)
        found = dfc.sensitivity(
            source.model, source.args, source.kwargs, source.dynamic_shapes, recipe=recipe,
            data=named_data(data), metrics=named_metrics(metric), step=step, engine=engine,
            times=times, progress=say,
        )  # fmt: skip
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": model, "steps": [s.to_json() for s in found]})
    else:
        tell(found, every)
    if output is not None:
        write_plot(found, output, force)
        if not as_json:
            from dfc.cli.tables import print_text

            print_text(f"wrote {output}")


def _passes(
    steps: str | None, recipe: str | None, target: str | None
) -> tuple[list[Pass] | None, object | None]:
    """What runs, and the target that it runs for: that of the recipe, or the one that is named."""
    from dfc.recipe.sources import plan_of

    if recipe is not None and steps is None:
        plan = plan_of(recipe, target=target)
        return [step.build({}) for step in plan.passes()], plan.target
    aim = plan_of("O0", target=target).target if target is not None else None
    if steps is None:
        return None, aim
    from dfc.cli.steps import parse_steps

    return parse_steps(steps), aim
