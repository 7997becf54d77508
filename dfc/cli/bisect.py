"""`dfc bisect`: the step of a recipe, and the change within it, that breaks a user's check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.failures import DIFFERENT
from dfc.cli.options import Json, Model, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.rewrite.bisect import Conclusion
    from dfc.rewrite.pass_ import Pass


def bisect(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("-r", "--recipe", metavar="FILE", help="The steps, as a recipe.")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option("-p", "--passes", metavar="STEPS", help="The steps, as in 'cse,fuse'."),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="CHECK",
            help="A program, which is given a package's path (a graph's, without weights), or "
            "FILE.py:FUNCTION, which is given the compiled model. Default: the probes agree.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Which recipe, where the file has several.")
    ] = None,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Find the first step, and change in it, that breaks a check.

    \b
    Examples:
      dfc bisect encoder.py:build -r small.dfc --check ./accurate.sh
      dfc bisect encoder.py:build -p canonicalize,fuse --check checks.py:accurate
      dfc bisect encoder.py:build -r small.dfc --json

    \b
    The steps are not proved here. A program says by its exit status: 0 good, 1 to 127 bad, but
    125 for cannot tell, anything else to give up. A function gives True or False, or asserts.
    Exits with 9 when something breaks the check, with 0 when nothing does.
    """
    from dfc.cli.progress import Progress

    load_used(use)
    if recipe is not None and passes is not None:
        raise DfcError("D054", "-r and -p both name the steps", help="give one of them")
    with Progress() as say:
        say("loading PyTorch")
        from dfc.cli.judge import Judge
        from dfc.rewrite.bisect import bisect as find

        steps, notes = _steps(recipe, name, passes)
        graph, probes = _graph_and_probes(model, say)
        if check is None and probes is None:
            raise DfcError(
                "D054",
                "without weights and example inputs nothing can be run",
                help="name a check of your own: --check ./check.sh",
            )
        judge = Judge(check, probes)

        def told(candidate: Any) -> bool | None:
            verdict = judge(candidate)
            word = {True: "good", False: "bad", None: "cannot tell"}[verdict]
            say.log(f"dfc: after {candidate}: {word}")
            return verdict

        found = find(graph, steps, told, say=say)
        found.notes += notes
    if as_json:
        from dfc.cli.tables import print_json

        print_json(_data(model, judge.kind, found))
    else:
        _print(judge.kind, found)
    if found.step:
        raise typer.Exit(DIFFERENT)


def _steps(
    recipe: str | None, name: str | None, passes: str | None
) -> tuple[list[Pass], list[str]]:
    from dfc.rewrite.pass_ import DEFAULT, find_pass

    if recipe is not None:
        return _recipe_steps(Path(recipe), name)
    if passes is not None:
        from dfc.cli.steps import parse_steps

        return parse_steps(passes), []
    return [find_pass(p) for p in DEFAULT], []


def _recipe_steps(path: Path, name: str | None) -> tuple[list[Pass], list[str]]:
    """The passes of a recipe in order, holes at their first choice; what was passed over."""
    from dfc.cli.sources import read_text
    from dfc.lang.source import Source
    from dfc.recipe.plan import PassStep, RevertStep, WhenStep
    from dfc.recipe.resolve import resolve

    plan = resolve(Source(read_text(path), str(path)), name=name)
    reverted = {s.label for s in plan.steps if isinstance(s, RevertStep)}
    chosen = [s for s in plan.steps if isinstance(s, PassStep) and s.label not in reverted]
    notes = [f"`revert {label}`: the step is not among them" for label in sorted(reverted)]
    if any(isinstance(s, WhenStep) for s in plan.steps):
        notes.append("steps inside of `when` are passed over: nothing is measured here")
    if any(s.keep for s in chosen):
        notes.append("`keep if` is passed over: steps stay whether or not they are faster")
    return [s.build({}) for s in chosen], notes


def _graph_and_probes(model: str, say: Any) -> tuple[Any, Any]:
    from dfc.calling import flat_inputs
    from dfc.cli.sources import open_source
    from dfc.rewrite.probe import make_probes

    say(f"loading {model}")
    source = open_source(model)
    say("tracing")
    graph = source.graph()
    has_data = all(p.data is not None for p in graph.parameters.values())
    if not has_data or (source.args is None and source.kwargs is None):
        return graph, None
    say("running the original on probe inputs")
    inputs = flat_inputs(graph, tuple(source.args or ()), dict(source.kwargs or {}))
    probes = make_probes(graph, inputs)
    for _ in probes.ready():
        pass
    return graph, probes


def _data(model: str, check: str, found: Conclusion) -> dict[str, Any]:
    change = found.change
    return {
        "model": model,
        "check": check,
        "steps": list(found.steps),
        "tries": found.tries,
        "step": found.step or None,
        "culprit": found.culprit or None,
        "change": found.at or None,
        "changes": found.changes,
        "doubtful": found.doubtful,
        "broken": found.broken or None,
        "skips": found.skips,
        "what": asdict(change) if change else None,
        "notes": found.notes,
    }


def _print(check: str, found: Conclusion) -> None:
    from dfc.cli.tables import print_text

    steps = len(found.steps)
    count = f"{counted(found.tries, 'check')} by {check}, {counted(steps, 'step')}"
    if not found.step:
        print_text(f"nothing breaks the check ({count})")
    else:
        print_text(f"step {found.step}, `{found.culprit}`, breaks the check ({count})")
        for line in _within(found):
            print_text(f"  {line}")
    for note in found.notes:
        print_text(f"note: {note}")


def _within(found: Conclusion) -> list[str]:
    if found.broken:
        return ["it does not even run:", *found.broken.splitlines()]
    if found.doubtful:
        what = "changes" if found.at else "steps"
        return [f"or one of the {found.doubtful} {what} before it, which the check cannot tell"]
    if found.change is None:
        return [] if found.changes else ["it makes no change that is counted"]
    lines = [f"change {found.at} of {found.changes}: {found.change.what}"]
    if found.change.origin:
        lines.append(f"the rule stands at {found.change.origin}")
    lines.append(f"all before it: `limit={found.at - 1}`")
    if found.skips:
        lines.append(f"all but it: `skip=[{found.change.number}]`")
    return lines
