"""`dfc test`: rules proved on what their samples stand for, and rule sets linted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.failures import DIFFERENT
from dfc.cli.options import Json, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.rewrite.lint import Lint
    from dfc.rewrite.prove import Proof
    from dfc.rewrite.rule import Rule, RuleSet


def test(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Files of rules, .dfc; without any, the rules that dfc ships.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("-k", "--only", metavar="TEXT", help="Only rules with this in their name."),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="For those who develop dfc: note the shipped rules that hold."
        ),
    ] = False,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Prove rewrite rules on ordinary and hostile inputs.

    Each `applies` sample stands for other sizes, ranks, element types and numbers as well; each
    `refuses` sample must be left alone. A wrong rule is shown with the input that breaks it.

    \b
    Examples:
      dfc test rules.dfc
      dfc test rules.dfc -k attention
      dfc test --json

    \b
    Exit status: 0 all rules hold; 9 one does not; 2 a file that does not parse.
    """
    load_used(use)
    sets = [_read(Path(f)) for f in files] if files else _shipped()
    chosen = [r for x in sets for r in x.rules if not only or only in r.full_name]
    if only and not chosen:
        names = ", ".join(r.full_name for x in sets for r in x.rules)
        raise DfcError("R008", f"no rule has `{only}` in its name", help=f"there are {names}")
    if write and (files or only):
        raise DfcError("Q010", "--write is for all that dfc ships: give neither files nor -k")
    proofs = _proved(chosen, quiet=as_json)
    if write:
        _note(proofs)
    lints = [x for rules in sets for x in _lints(rules, chosen)]
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"rules": [_data(p) for p in proofs], "lints": [_lint_data(x) for x in lints]})
    else:
        for found in lints:
            print(found.render())
        print(_summary(proofs, lints))
    if any(not p.holds for p in proofs) or any(not x.warning for x in lints):
        raise typer.Exit(DIFFERENT)


def _read(path: Path) -> RuleSet:
    from dfc.rewrite.read_rules import load_rules

    found = load_rules(path)
    if not found.rules:
        raise DfcError("R008", f"`{path}` has no rules")
    return found


def _shipped() -> list[RuleSet]:
    from dfc.rewrite.rulesets import shipped_sets

    return [*shipped_sets().values()]


def _proved(rules: list[Rule], quiet: bool) -> list[Proof]:
    from dfc.cli.progress import Progress
    from dfc.rewrite.prove import prove

    found = []
    with Progress() as say:
        for i, rule in enumerate(rules):
            say(f"proving {rule.full_name} ({i + 1} of {len(rules)})")
            found.append(prove(rule))
            if not quiet:
                say.result(_line(found[-1]))
    return found


def _note(proofs: list[Proof]) -> None:
    """Write down which shipped rules hold, so that nobody proves them again."""
    from dfc.cli.outputs import write_text
    from dfc.rewrite.proofs import SHIPPED, rules_folder, shipped_text

    text = shipped_text(p.rule for p in proofs if p.holds)
    write_text(str(rules_folder() / SHIPPED), text, force=True)


def _line(p: Proof) -> str:
    t = p.tally
    head = f"{p.rule.full_name}:"
    for problem in p.problems:
        head += "\n" + problem.render()
    if p.problems:
        return head
    counts = f"{counted(t.inputs, 'input')} in {counted(t.graphs, 'graph')}, refused in {t.refused}"
    return f"{head} proved on {counts}, {p.seconds:.1f} s"


def _lints(rules: RuleSet, chosen: list[Rule]) -> list[Lint]:
    """What is wrong with a set as a set, about the rules that were chosen."""
    from dfc.cli.progress import Progress
    from dfc.rewrite.lint import lint

    names = {r.full_name for r in chosen}
    with Progress() as say:
        say(f"looking at {rules.name} as a whole")
        return [x for x in lint(rules.rules) if x.rule.full_name in names]


def _summary(proofs: list[Proof], lints: list[Lint]) -> str:
    wrong = sum(not p.holds for p in proofs)
    errors = sum(not x.warning for x in lints)
    warnings = len(lints) - errors
    parts = [f"{len(proofs) - wrong} proved in {sum(p.seconds for p in proofs):.1f} s"]
    parts += [f"{wrong} wrong"] * bool(wrong)
    for count, what in ((errors, "error"), (warnings, "warning")):
        if count:
            parts.append(f"{counted(count, what)} about the set")
    return ", ".join(parts)


def _lint_data(x: Lint) -> dict[str, Any]:
    from dfc.cli.check import problem_data

    return {"rule": x.rule.full_name, "warning": x.warning, **problem_data(x.problem)}


def _data(p: Proof) -> dict[str, Any]:
    from dfc.cli.check import problem_data

    return {
        "rule": p.rule.full_name,
        "file": p.rule.source.file,
        "line": p.rule.source.span(*p.rule.at).line,
        "proved": p.holds,
        "inputs": p.tally.inputs,
        "graphs": p.tally.graphs,
        "refused": p.tally.refused,
        "skipped": p.tally.skipped,
        "seconds": round(p.seconds, 3),
        "problems": [problem_data(d) for d in p.problems],
    }
