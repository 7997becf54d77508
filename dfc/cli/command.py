"""What `dfc VERB` calls: every verb, the overview, and a command line taken apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dfc.cli import INTERRUPTED
from dfc.cli.bench import bench as bench_
from dfc.cli.bisect import bisect as bisect_
from dfc.cli.calibrate import calibrate as calibrate_
from dfc.cli.check import check as check_
from dfc.cli.compile import compile as compile_
from dfc.cli.diff import diff as diff_
from dfc.cli.doctor import doctor as doctor_
from dfc.cli.explain import explain as explain_
from dfc.cli.failures import usage
from dfc.cli.fmt import fmt as fmt_
from dfc.cli.list import list_
from dfc.cli.lsp import lsp as lsp_
from dfc.cli.plan import plan as plan_
from dfc.cli.run import run as run_
from dfc.cli.select import select as select_
from dfc.cli.show import show as show_
from dfc.cli.test import test as test_
from dfc.cli.tune import tune as tune_
from dfc.cli.verify import verify as verify_
from dfc.errors import DfcError


class Verb(TyperCommand):
    """A verb that takes each option once, unless it is a list, and no value that is empty: what a
    script's unset variable leaves, and what a second one would silently replace."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(args=[*args])
        for param in dict.fromkeys(order):
            name = _name(param)
            values = given.get(param.name)
            single = not getattr(param, "multiple", True) and not getattr(param, "is_flag", False)
            if single and order.count(param) > 1:
                ctx.fail(f"`{name}` takes one value, and is given {order.count(param)} times")
            if "" in (values if isinstance(values, (list, tuple)) else [values]):
                ctx.fail(f"`{name}` is empty")
        return super().parse_args(ctx, args)


def _name(param: Any) -> str:
    """An option as it is written in full, an argument as the help calls it."""
    if param.param_type_name == "option":
        return max(param.opts, key=len)  # type: ignore[no-any-return]
    return str(param.metavar or param.name).strip("[].")


app = typer.Typer(
    rich_markup_mode=None,  # plain help: examples keep their lines, and nothing slow is loaded
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    compile_,
    run_,
    bench_,
    plan_,
    calibrate_,
    tune_,
    show_,
    select_,
    explain_,
    verify_,
    check_,
    fmt_,
    diff_,
    bisect_,
    test_,
    list_,
    doctor_,
    lsp_,
):
    app.command(name=verb.__name__.rstrip("_"), cls=Verb)(verb)


@app.callback(invoke_without_command=True)
def _top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """A dataflow-graph compiler for PyTorch models: proved, never worse, explained.

    MODEL is FILE.py:FUNCTION or package.module:FUNCTION (a function that returns (module, args),
    (module, args, kwargs) or (module, args, kwargs, dynamic_shapes)), a model.pt2, a graph.dfc or
    a package folder.

    \b
    Examples:
      dfc compile encoder.py:build -o encoder.dfcpkg --onnx encoder.onnx
      dfc run encoder.dfcpkg --random --size B=4
      dfc doctor

    \b
    Exit status:
      0  done                             5    a requirement is not met
      1  internal error                   6    does not fit
      2  bad input, packages included     7    environment: disk, libraries
      3  capture failed, unsupported op   8    failed while running, your code raised
      4  results differ                   9    a check found differences
                                          130  interrupted
    """
    if version:
        import dfc

        typer.echo(f"dfc {dfc.__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def dispatch(argv: Sequence[str]) -> int:
    """One command: its exit status, or whatever it raises."""
    try:
        os.getcwd()
    except FileNotFoundError:
        message = "the folder that this runs in is gone"
        raise DfcError("D030", message, help="change to one that is there", status=7) from None
    try:
        result: Any = app([*argv], prog_name="dfc", standalone_mode=False)
    except SystemExit as e:  # typer's answer to a reader that went away
        if isinstance(e.__context__, BrokenPipeError):
            raise e.__context__ from None
        raise
    except Exception as e:
        if hasattr(e, "format_message"):  # typer's own: a wrong option, a missing argument
            raise usage(e, [c.name or "" for c in app.registered_commands]) from e
        raise
    if result == INTERRUPTED:  # typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0
