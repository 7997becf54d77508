"""Command-line options that several verbs share, each worded once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

MODEL_HELP = "FILE.py:FUNCTION, package.module:FUNCTION, model.pt2, graph.dfc or a package folder."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[INPUTS]...",
        help="Input values: .npz or .safetensors by name, .npy in order.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout, nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at the output paths.")]
Device = Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1.")]
Random = Annotated[
    bool, typer.Option("--random", help="Draw random inputs within the declared shapes.")
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="B=4,S=16", help="Sizes of dynamic dimensions; implies --random."
    ),
]

Seconds = Annotated[
    float,
    typer.Option("--seconds", min=0.01, max=86_400, help="Measuring time for each engine."),
]
MAX_THREADS = 4096  # a library that is asked for a billion takes the process down
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=MAX_THREADS, help="Threads for each engine."),
]


def _seed(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise typer.BadParameter("a seed has 64 bits")
    return value


Seed = Annotated[
    int, typer.Option("--seed", callback=_seed, help="Seed of random inputs and random ops.")
]
Use = Annotated[
    list[str] | None,
    typer.Option(
        "--use",
        metavar="FILE",
        help="Your passes, ops and engines: FILE.py or a module; your rules: FILE.dfc.",
    ),
]


def load_used(names: list[str] | None) -> None:
    """Make known what the user's files bring; before MODEL, recipes and steps are looked at.

    Raises:  DfcError K040 when the user's code raises; Q, R and P for what is wrong in it.
    """
    if names:
        from contextlib import redirect_stdout

        from dfc.cli.extensions import load_extension

        with redirect_stdout(sys.stderr):  # what it prints is no data
            for name in names:
                load_extension(name)
