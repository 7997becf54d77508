"""A reproducer run again: is the rewrite that it holds still wrong?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dfc.counting import counted

if TYPE_CHECKING:
    from dfc.reproducer import Replay

WRONG = 4  # the exit status while it is


def is_reproducer(path: str) -> bool:
    """Whether a folder says that it is one; nothing else is checked, and nothing is loaded."""
    from dfc.manifest import kind_of

    return kind_of(path) == "reproducer"


def replay_folder(path: str, as_json: bool) -> int:
    """Run it, say what came of it, and give the exit status."""
    from dfc.cli.progress import Progress

    with Progress() as say:
        say("loading PyTorch")
        from dfc.reproducer import replay

        say(f"running {path}")
        found = replay(path)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(_data(path, found))
    else:
        _print(path, found)
    return WRONG if found.happens else 0


def _data(path: str, found: Replay) -> dict[str, Any]:
    wrong = found.wrong
    return {
        "reproducer": path,
        "step": found.step,
        "nodes": found.nodes,
        "wrong": found.happens,
        "reason": wrong.reason if wrong else None,
        "elements": [asdict(e) for e in wrong.elements] if wrong else [],
        "notes": list(found.notes),
    }


def _print(path: str, found: Replay) -> None:
    from dfc.cli.tables import print_text
    from dfc.rewrite.verdicts import element_table

    print_text(f"{path}: `{found.step}` on {counted(found.nodes, 'node')}")
    if found.wrong is None:
        print_text("  right: what was wrong no longer is")
    else:
        print_text(f"  still wrong: {found.wrong.reason}")
        for line in element_table(found.wrong.elements):
            print_text(f"  {line}")
    for note in found.notes:
        print_text(f"  note: {note}")
