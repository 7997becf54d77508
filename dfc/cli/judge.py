"""A user's check of a rewritten graph: a program, a Python function, or the probes' agreement."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.compiled import Compiled
    from dfc.ir.graph import Graph
    from dfc.rewrite.bisect import Candidate

SKIP = 125  # as in `git bisect run`: the check cannot tell
MOST = 127  # above this a program has been killed, or says that nothing can go on

Verdict = bool | None  # good, bad, cannot tell


class Judge:
    """What a graph is held against, made once from the words on the command line.

    Raises:  DfcError D050, D051 for a check that is not there.
    """

    def __init__(self, words: str | None, probes: Any) -> None:
        self.probes = probes
        self.words = words
        self.function: Callable[..., Any] | None = None
        self.command: list[str] = []
        if words is None:
            return
        place, colon, name = words.rpartition(":")
        if colon and place.endswith(".py") and name.isidentifier():
            self.function, self.file = _function(place, name)
        else:
            self.command = _command(words)

    @property
    def kind(self) -> str:
        if self.words is None:
            return "the probes"
        return f"`{self.words}`"

    def __call__(self, candidate: Candidate) -> Verdict:
        if self.words is None:
            return self._agrees(candidate)
        if self.function is not None:
            return self._called(compiled_of(candidate.graph, self.probes))
        with tempfile.TemporaryDirectory(prefix="dfc-bisect-") as folder:
            return self._run(write_candidate(candidate, self.probes, Path(folder)), candidate)

    def _agrees(self, candidate: Candidate) -> Verdict:
        """Whether the probes agree with what the steps so far promise."""
        from dfc.rewrite.probe import Failure

        if candidate.promised.kind == "changes":
            return None  # meant to change results: they say nothing
        return not isinstance(self.probes.failure(candidate.graph, candidate.promised), Failure)

    def _called(self, compiled: Compiled) -> Verdict:
        from dfc.origin import failure_of

        assert self.function is not None
        try:
            found = self.function(compiled)
        except AssertionError:
            return False
        except Exception as e:
            raise failure_of(e, f"`{self.words}`", self.file) from e
        if found is None or isinstance(found, bool):
            return found is not False
        raise DfcError(
            "D052",
            f"`{self.words}` gave a {type(found).__name__}, not True or False",
            help="give True for good, False for bad, or assert; None is good",
        )

    def _run(self, path: str, candidate: Candidate) -> Verdict:
        environment = {**os.environ, "DFC_BISECT_STEPS": str(candidate)}
        # What the check prints is the user's to see; our stdout is for the result.
        done = subprocess.run([*self.command, path], stdout=2, env=environment)
        if done.returncode == SKIP:
            return None
        if not 0 <= done.returncode <= MOST:
            raise DfcError(
                "D062",
                f"the check `{self.words}` ended with {done.returncode}: it was killed, or gave up",
                help="a check exits with 0 for good, 1 to 124 for bad, 125 for cannot tell",
            )
        return done.returncode == 0


def _function(place: str, name: str) -> tuple[Callable[..., Any], str]:
    from dfc.cli.sources import load_module, no_function

    module, file = load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise no_function(module, place, name)
    return function, file


def _command(words: str) -> list[str]:
    import shutil

    try:
        command = shlex.split(words)
    except ValueError as e:
        raise DfcError("D050", f"--check cannot be read: {str(e).lower()}") from None
    if not command:
        raise DfcError("D050", "--check is empty", help="name a program, or FILE.py:FUNCTION")
    here = Path(command[0])
    found = shutil.which(here.absolute() if here.is_file() else here)
    if found is None:
        help = "make it executable: chmod +x" if here.is_file() else None
        if help and command[0].endswith(".py"):
            help += f", or name a function of it: {command[0]}:FUNCTION"
        raise DfcError("D050", f"there is no program `{command[0]}`", help=help)
    return [str(Path(found).absolute()), *command[1:]]


def compiled_of(graph: Graph, probes: Any) -> Compiled:
    """A graph as the reference engine runs it."""
    from dfc.compiled import Compiled, with_state_inputs
    from dfc.report import Report
    from dfc.runtime.engines import find_engine

    engine = find_engine("eager")
    has_data = all(p.data is not None for p in graph.parameters.values())
    runner = engine.build(with_state_inputs(graph), "cpu") if has_data else None
    made = list(probes.ready()) if probes is not None else []
    return Compiled(graph, engine, runner, Report(graph.name), made)


def write_candidate(candidate: Candidate, probes: Any, folder: Path) -> str:
    """A package where there are weights, graph text where there are none; its path."""
    from dfc.package import write_package

    graph = candidate.graph
    if any(p.data is None for p in graph.parameters.values()):
        path = folder / "graph.dfc"
        path.write_text(str(graph), encoding="utf-8")
        return str(path)
    path = folder / "model.dfcpkg"
    write_package(compiled_of(graph, probes), path)
    return str(path)
