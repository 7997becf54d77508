"""What `dfc VERB` calls: every verb by its line, the overview, and a command line taken apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dfc.cli import INTERRUPTED
from dfc.cli.failures import usage
from dfc.errors import DfcError

VERBS = {  # what the overview says of each, so that it need not import them
    "compile": "Compile a model, prove it, choose the fastest engine.",
    "run": "Run a model, or a reproducer, and say what came out.",
    "bench": "Measure engines side by side: median, spread and ratio.",
    "plan": "Show how a model would run as stages on several devices.",
    "calibrate": "Measure this machine as a target that plans read.",
    "tune": "Measure a package here and keep its fastest engine.",
    "show": "Show a model's graph, a package's own, or a recipe, resolved.",
    "select": "Show what a selector finds: nodes, modules, parameters.",
    "explain": "Say why a rule, a pass or a node came out as it did.",
    "verify": "Check every byte of a package and prove it again here.",
    "check": "Check recipes, targets, rules and graphs; tell every error.",
    "fmt": "Lay out recipes, targets, rules and graphs in one form.",
    "diff": "Tell what changed between two graphs, by module path.",
    "bisect": "Find the first step, and change in it, that breaks a check.",
    "test": "Prove rewrite rules on ordinary and hostile inputs.",
    "list": "List passes with their options, engines, or ops.",
    "doctor": "Say what this machine has, and what is missing.",
    "lsp": "Help editors with .dfc files, as a language server.",
}


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


class Verbs(TyperGroup):
    """All verbs; a verb's module is imported when it is the one that was asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = vars(import_module(f"dfc.cli.{cmd_name}"))
        verb = module.get(cmd_name) or module[f"{cmd_name}_"]  # `list_`: the other name is taken
        alone = typer.Typer(rich_markup_mode=None, add_completion=False)
        alone.command(name=cmd_name, cls=Verb)(verb)
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,  # plain help: examples keep their lines, and nothing slow is loaded
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
            raise usage(e, [*VERBS]) from e
        raise
    if result == INTERRUPTED:  # typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0
