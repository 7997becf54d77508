"""`--use`: the user's own passes, ops, engines and rules, from files that the user names.

Only the command line names code. A recipe never can: it refers to what was loaded by its name.
"""

from __future__ import annotations

from pathlib import Path

from dfc.errors import DfcError, did_you_mean


def load_extension(name: str) -> None:
    """Import a Python file or module, or read a file of rules.

    Raises:  DfcError D050 for what is not there, K040 when the user's code raises, Q and R for
             definitions that are wrong.
    """
    if Path(name).suffix == ".dfc":
        _rules(Path(name))
        return
    from dfc.cli.sources import load_module

    if not name:
        raise DfcError("Q010", "--use names nothing", help="write --use FILE.py or --use rules.dfc")
    if ":" in name and not Path(name).exists():
        file = name.rpartition(":")[0]
        raise DfcError("Q010", f"--use takes a whole file, not `{name}`", help=f"--use {file}")
    if load_module(name)[0].__file__ is None:
        help = "name the file: --use FILE.py"
        raise DfcError("Q010", f"--use {name} is a folder without Python code", help=help)


def _rules(path: Path) -> None:
    from dfc.cli.progress import Progress
    from dfc.rewrite.read_rules import load_rules
    from dfc.rewrite.rulesets import add_set, proved_rules

    if not path.is_file():
        folder = path.parent
        near = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise DfcError("D050", f"there is no `{path}`", help=did_you_mean(path.name, near))
    rules = load_rules(path)
    if not rules.rules:
        help = "a recipe is given by `-r`, a graph as MODEL"
        raise DfcError("R001", f"`{path}` has no rules", help=help)
    add_set(rules)
    with Progress() as say:
        proved_rules([r.full_name for r in rules.rules], say)
