"""`dfc list`: the passes, engines and ops that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from dfc.cli.options import Json, Use, load_used
from dfc.errors import DfcError, did_you_mean

_ONE = {"passes": "pass", "engines": "engine", "ops": "op"}
_KINDS = tuple(_ONE)


def list_(
    kind: Annotated[
        str, typer.Argument(metavar="[passes|engines|ops]", help="What to list.")
    ] = "passes",
    word: Annotated[
        str, typer.Argument(metavar="[WORD]", help="Only names with this in them.")
    ] = "",
    use: Use = None,
    as_json: Json = False,
) -> None:
    """List passes with their options, engines, or ops.

    \b
    Examples:
      dfc list
      dfc list engines
      dfc list ops softmax
    """
    if kind not in _KINDS:
        raise DfcError(
            "Q010", f"there are {', '.join(_KINDS)} to list, not `{kind}`",
            help=did_you_mean(kind, _KINDS),
        )  # fmt: skip
    load_used(use)
    from dfc.cli.progress import Progress

    with Progress() as say:
        say("loading")
        rows = {"passes": _passes, "engines": engine_rows, "ops": _ops}[kind](word)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(rows)
        return
    from dfc.cli.tables import print_table, print_text

    if not rows:
        print_text(f"no {_ONE[kind]} has `{word}` in its name")
        return
    if kind == "passes":
        shown = [
            [r["name"], r["numerics"], r["does"], _options(r["options"]),
             "" if r["from"] == "dfc" else r["from"]]
            for r in rows
        ]  # fmt: skip
        print_table(["pass", "numerics", "does", "options", ""], shown)
    elif kind == "engines":
        shown = [[r["name"], ", ".join(r["devices"]), r["state"], r["does"]] for r in rows]
        print_table(["engine", "devices", "", "does"], shown)
        found = [form for r in rows for form in r["forms"]]
        if found:
            print_text(f"\nforms, also by name: {', '.join(found)}")
    else:
        print_table(["op", "means"], [[r["name"], r["does"]] for r in rows])
        if not word:
            print_text("\nand every functional aten op; `dfc list ops WORD` finds them by name")


def _passes(word: str) -> list[dict[str, Any]]:
    from dfc.cli.steps import option_rows
    from dfc.rewrite.pass_ import DEFAULT, PASSES, pass_classes

    return [
        {
            "name": name,
            "from": PASSES.origin(name),
            "numerics": "",
            "default": False,
            "does": f"missing: {cls.message}",
            "options": [],
        }
        if isinstance(cls, DfcError)
        else {
            "name": name,
            "from": PASSES.origin(name),
            "numerics": "its rules'" if isinstance(cls.numerics, property) else str(cls.numerics),
            "default": name in DEFAULT,
            "does": first_line(cls),
            "options": option_rows(cls),
        }
        for name, cls in _loaded(pass_classes(), word)
    ]


def _loaded(classes: Mapping[str, Any], word: str) -> Iterator[tuple[str, Any]]:
    """Everything by name; what a package brings that does not load stands there with the reason."""
    for name in sorted(n for n in classes if word in n):
        try:
            yield name, classes[name]
        except DfcError as e:
            yield name, e


def _options(options: list[dict[str, str]]) -> str:
    """As Python declares them; what has no default must be given."""
    shown = [f"{o['name']}: {o['type']} = {o['default']}" for o in options]
    return ", ".join(text.removesuffix(" = ") for text in shown)


def engine_rows(word: str = "") -> list[dict[str, Any]]:
    """Every engine: where it runs, and what is missing if it cannot."""
    from dfc.runtime.engines import engine_names, find_engine

    rows = []
    for name in engine_names():
        try:
            engine = find_engine(name)
            found = {"devices": list(engine.devices), "state": "available",
                     "does": first_line(type(engine)),
                     "forms": [f"{name}:{v}" for v in getattr(engine, "variants", {})]}  # fmt: skip
        except DfcError as e:
            found = {"devices": [], "state": f"missing: {e.message}", "does": "", "forms": []}
        if word in name:
            rows.append({"name": name, **found})
    return rows


def _ops(word: str) -> list[dict[str, Any]]:
    import dfc.ops  # noqa: F401 - declares them
    from dfc.ir.op import declared_ops
    from dfc.registry import plugins

    found = []
    for plugin in plugins("dfc.ops"):
        try:
            plugin.load()
        except DfcError as e:
            found.append({"name": plugin.name, "does": f"missing: {e.message}"})
    found += [{"name": op.name, "does": first_line(op.cls)} for op in declared_ops()]
    if word:
        import torch

        for schema in torch._C._jit_get_all_schemas():
            space, _, base = schema.name.partition("::")
            if space == "aten" and not schema.is_mutable:
                overload = schema.overload_name or "default"
                text = str(schema).partition("::")[2]
                found.append({"name": f"aten.{base}.{overload}", "does": text})
    return sorted((op for op in found if word in op["name"]), key=lambda op: op["name"])


def first_line(thing: Any) -> str:
    """The first line of a docstring, without its full stop."""
    doc = (getattr(thing, "__doc__", None) or "").strip()
    return doc.splitlines()[0].rstrip(".") if doc else ""
