"""From an exception to an exit status and a text on stderr; a bug of ours leaves a reproducer."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dfc.cli.streams import give_up_stdout
from dfc.ending import Ended, is_behind
from dfc.errors import DfcError, did_you_mean

INTERNAL, DIFFERENT = 1, 9
_FULL = (errno.ENOSPC, errno.EDQUOT)


def guarded(action: Callable[[], int], argv: Sequence[str]) -> int:
    """Run a command; every way to fail becomes its documented status, but Ctrl-C (`main`)."""
    try:
        status = action()
        sys.stdout.flush()
        return status
    except Exception as e:  # the one place where a bug of ours is caught
        # A compiled module's import turns Ctrl-C into an ImportError.
        if is_behind(e, KeyboardInterrupt) or is_behind(e, Ended):
            raise KeyboardInterrupt from e
        return _told(e, argv)


def _told(error: Exception, argv: Sequence[str]) -> int:
    if isinstance(error, BrokenPipeError):  # `dfc show ... | head`: the reader has seen enough
        give_up_stdout()
        return 0
    if isinstance(error, OSError) and error.errno in _FULL:
        give_up_stdout()
        where = f"`{error.filename}`" if error.filename else "the output"
        help = "free some space, or write somewhere else"
        message = f"cannot write {where}: {(error.strerror or str(error)).lower()}"
        error = DfcError("D013", message, help=help, status=7)
    if not isinstance(error, DfcError):
        return _bug(error, argv)
    _say(error.render())
    if error.status == INTERNAL:
        _report_bug(error, argv)
    return error.status


def _bug(error: Exception, argv: Sequence[str]) -> int:
    first = str(error).splitlines()[0] if str(error) else ""
    _say(f"dfc: internal error: {type(error).__name__}: {first}")
    _report_bug(error, argv)
    return INTERNAL


_OTHER_WORDS = {  # of Python, or of other tools, for what a verb or a step does
    "export": "`dfc compile MODEL --onnx FILE` writes ONNX",
    "trace": "`dfc show MODEL` traces it and prints the graph",
    "quantize": "it is a step: `dfc compile MODEL -p quantize`, or of a recipe, -r FILE.dfc",
    "prune": "it is a step: `dfc compile MODEL -p prune`, or of a recipe, -r FILE.dfc",
}


def usage(error: Any, verbs: Sequence[str]) -> DfcError:
    """A wrong command line in our words."""
    message = str(error.format_message())
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "dfc")
    hint = f"see `{path} --help`"
    if message.startswith("No such command"):
        message = message.partition(". ")[0]  # it guesses too, and once is enough
        word = message.split("'")[1]
        hint = _OTHER_WORDS.get(word) or did_you_mean(word, verbs) or hint
    if message.startswith("No such option"):
        message, option = error.message, error.option_name
        word = option.lstrip("-")  # dashes alone make short options look alike
        known = [p for p in error.possibilities or () if did_you_mean(word, [p.lstrip("-")])]
        near = did_you_mean(option, known)
        hint = f"{near} {hint}" if near else hint
    return DfcError("Q010", message[:1].lower() + message[1:].rstrip("."), help=hint)


def _say(text: str) -> None:
    """On stderr; where that cannot be written, the status says it alone."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _report_bug(error: BaseException, argv: Sequence[str]) -> None:
    """Write what is needed to see the error again, and say where."""
    import tempfile

    try:
        folder = Path(tempfile.mkdtemp(prefix="dfc-reproducer-"))
        text = "".join(traceback.format_exception(error))
        (folder / "error.txt").write_text(f"{_versions()}\n\n{text}", encoding="utf-8")
        (folder / "command.txt").write_text(_command(argv) + "\n", encoding="utf-8")
        graph = _graph_at_fault(error.__traceback__)
        if graph:
            (folder / "graph.dfc").write_text(graph, encoding="utf-8")
    except OSError as e:
        _say(f"  note: the reproducer could not be written: {e}")
        return
    names = ", ".join(sorted(p.name for p in folder.iterdir()))
    _say(f"  note: this is a bug in dfc; a reproducer is in {folder} ({names})")


def _command(argv: Sequence[str]) -> str:
    import shlex

    return f"cd {shlex.quote(os.getcwd())}\n{shlex.join(['dfc', *argv])}"


def _versions() -> str:
    import platform

    import dfc

    torch = sys.modules.get("torch")
    return (
        f"dfc {dfc.__version__}, torch {getattr(torch, '__version__', 'not loaded')}, "
        f"python {platform.python_version()}, {platform.platform()}"
    )


def _graph_at_fault(tb: TracebackType | None) -> str | None:
    """The text of the graph that the innermost function had in hand."""
    module = sys.modules.get("dfc.ir.graph")
    found = None
    while tb is not None and module is not None:
        for value in tb.tb_frame.f_locals.values():
            if isinstance(value, module.Graph):
                found = value
        tb = tb.tb_next
    if found is None:
        return None
    try:
        return str(found)
    except Exception as e:  # noqa: BLE001 - a broken graph may not print; the error matters more
        return f"# the graph does not print: {e!r}\n"
