"""`@dfc.pass_`: a class or a function of the user's becomes a pass, its fields a recipe's options.

Q040  a definition that cannot be a pass, with the line
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform, overload

from dfc.errors import DfcError, Diagnostic
from dfc.ir.graph import Graph
from dfc.ir.types import DType
from dfc.lang.selectors import Selector
from dfc.origin import Origin, failure_of, origin_of
from dfc.rewrite.pass_ import PASSES, Context, Data, Numerics, Pass

C = TypeVar("C", bound=type)

# Words that begin a statement of a recipe, or join the words of a step.
RESERVED = frozenset(
    """apply verify emit revert keep when else minimize maximize require recipe rule target import
    with on by to from into except using at if""".split()  # noqa: SIM905
)
_FACTS = ("name", "numerics", "idempotent", "cached", "phrases", "auto", "not_after", "serves")
_PLAIN = (bool, int, float, str, Selector, Data, DType, type(None))
_TYPES = "int, float, bool, str, Literal, Selector, Data, DType, tuple[...] of one, or `| None`"


@overload
def pass_(thing: C) -> C: ...
@overload
def pass_(thing: Callable[..., int]) -> type[Pass]: ...
@overload
def pass_(
    *, name: str | None = None, numerics: Numerics | None = None, idempotent: bool | None = None
) -> Callable[[Any], Any]: ...


@dataclass_transform(frozen_default=True)
def pass_(
    thing: Any = None,
    *,
    name: str | None = None,
    numerics: Numerics | None = None,
    idempotent: bool | None = None,
) -> Any:
    """Make a pass of a class with `run(self, graph, ctx) -> int`, or of a function `(graph, ctx)`.

    A class says `name` and `numerics`; its annotated fields are the options. A function has the
    pass's name, says `numerics` here, and its keyword-only parameters are the options. The pass is
    then known by its name: in recipes, in `-p`, in `dfc.compile(passes=[...])`.
    Raises:  DfcError Q040 with the line of what is wrong; Q003 when the name is taken.
    """
    frame = sys._getframe(1)
    facts = {"name": name, "numerics": numerics, "idempotent": idempotent}
    given = {k: v for k, v in facts.items() if v is not None}

    def make(it: Any) -> type[Pass]:
        made = _Definition(it, given, frame.f_locals).made()
        return made

    return make if thing is None else make(thing)


class _Definition:
    """One class or function on its way to a pass; collects everything that is wrong with it."""

    def __init__(self, thing: Any, facts: Mapping[str, Any], scope: Mapping[str, Any]) -> None:
        if not isinstance(thing, (type, types.FunctionType)):
            what = type(thing).__name__
            raise DfcError("Q040", f"`@dfc.pass_` takes a class or a function, not a {what}")
        self.thing, self.facts, self.scope = thing, dict(facts), scope
        self.origin: Origin = origin_of(thing)
        self.problems: list[Diagnostic] = []

    def say(self, message: str, at: str | None = None, help: str | None = None) -> None:
        self.problems.append(Diagnostic("Q040", message, self.origin.span(at), help))

    def made(self) -> type[Pass]:
        cls = self.thing if isinstance(self.thing, type) else self._of_function()
        if cls is not None:
            self._check_facts(cls)
            self._check_run(cls)
            self._check_fields(cls)
        if self.problems or cls is None:
            self.problems.sort(key=lambda d: d.span.line if d.span else 0)
            raise DfcError.of(self.problems)
        made = _finished(cls, self.facts, self.origin)
        PASSES.add(made.name, made, self.origin, cls.__module__)
        return made

    # A function

    def _of_function(self) -> type | None:
        """A class whose fields are the keyword-only parameters."""
        function = self.thing
        parameters = list(inspect.signature(function).parameters.values())
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        rest = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if len(rest) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in rest):
            help = f"def {function.__name__}(graph, ctx, *, limit: int = 3) -> int: ..."
            self.say(f"`{function.__name__}` takes something else than (graph, ctx)", None, help)
            return None
        names = [p.name for p in options]

        def run(self: Any, graph: Graph, ctx: Context) -> Any:
            return function(graph, ctx, **{n: getattr(self, n) for n in names})

        space: dict[str, Any] = {p.name: p.default for p in options if p.default is not p.empty}
        hints = {p.name: p.annotation for p in options if p.annotation is not p.empty}
        space |= {"__annotations__": hints, "__doc__": function.__doc__, "run": run}
        space |= {"__module__": function.__module__, "__qualname__": function.__qualname__}
        self.facts.setdefault("name", function.__name__)
        for p in options:
            if p.annotation is p.empty and p.default is p.empty:
                self.say(f"the option `{p.name}` has no type", p.name, f"write `{p.name}: int`")
        return type(function.__name__, (), space)

    # What every pass says

    def _check_facts(self, cls: type) -> None:
        own = vars(cls).get("__annotations__", {})
        for fact in _FACTS:
            if fact in own and "ClassVar" not in str(own[fact]):
                help = f"write it without a type: `{fact} = ...`"
                self.say(f"`{fact}` is what a pass says of itself, not an option", fact, help)
        name = self.facts.get("name", getattr(cls, "name", None))
        if name is None:
            snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__)
            help = f'write `name = "{snake.lstrip("_")}"`: recipes call it by this'
            self.say("the pass has no name", None, help)
        elif not isinstance(name, str) or not name.isidentifier() or not name.isascii():
            help = "letters, digits and _, as in `merge_heads`"
            self.say(f"{name!r} cannot be the name of a pass", "name", help)
        elif name in RESERVED:
            self.say(f"`{name}` is a word of recipes", "name", "choose another name")
        numerics = self.facts.get("numerics", vars(cls).get("numerics"))
        if numerics is None and not issubclass(cls, Pass):
            numerics = getattr(cls, "numerics", None)
        if numerics is None:
            help = "say what it promises: dfc.EXACT, dfc.close(1e-5) or dfc.CHANGES"
            self.say("the pass has no `numerics`", None, help)
        elif not isinstance(numerics, (Numerics, property)):
            help = "one of dfc.EXACT, dfc.close(1e-5), dfc.CHANGES"
            self.say(f"`numerics` is {numerics!r}", "numerics", help)

    def _check_run(self, cls: type) -> None:
        run = getattr(cls, "run", None)
        if run is None or run is Pass.run:
            help = "def run(self, graph, ctx) -> int: ... gives how many changes it made"
            self.say("the pass has no `run`", None, help)
            return
        if not callable(run):
            return  # told where the options are checked
        try:
            inspect.signature(run).bind(None, None, None)
        except TypeError:
            found = inspect.signature(run)
            self.say(f"`run{found}` does not take (self, graph, ctx)", "run")

    # Options

    def _check_fields(self, cls: type) -> None:
        own = vars(cls).get("__annotations__", {})
        names = [n for n in own if n not in _FACTS and "ClassVar" not in str(own[n])]
        for name, value in vars(cls).items():
            hidden = name.startswith("_") or callable(value) or name in _FACTS or name in own
            if not hidden and not isinstance(value, (property, classmethod, staticmethod)):
                self._untyped(name, value)
        hints = self._hints(cls, names)
        for name in names:
            value = vars(cls).get(name, dataclasses.MISSING)
            if isinstance(value, dataclasses.Field):
                value = value.default
            if name in ("run", "needs"):
                self.say(f"`{name}` cannot be an option: it is what a pass does", name)
            elif isinstance(value, (list, dict, set)):
                help = "a pass never changes: write a tuple" if isinstance(value, list) else None
                self.say(f"the default of `{name}` can change: {value!r}", name, help)
            elif name in hints and not _allowed(hints[name]):
                shown = getattr(hints[name], "__name__", str(hints[name]))
                self.say(f"an option cannot be a {shown}", name, f"one of {_TYPES}")
            elif name in hints and value is not dataclasses.MISSING:
                self._check_default(name, hints[name], value)

    def _untyped(self, name: str, value: Any) -> None:
        near = difflib.get_close_matches(name, _FACTS, n=1, cutoff=0.8)
        type_ = type(value).__name__ if isinstance(value, (bool, int, float, str)) else "TYPE"
        help = (
            f"did you mean `{near[0]}`?"
            if near
            else (f"write `{name}: {type_} = {value!r}`, or `_{name}` if it is no option")
        )
        self.say(f"the option `{name}` has no type", name, help)

    def _check_default(self, name: str, hint: Any, value: Any) -> None:
        from dfc.rewrite.pass_ import _fits

        if not _fits(value, hint):
            wanted = getattr(hint, "__name__", str(hint))
            self.say(f"`{name}` is {wanted}, its default {value!r}", name)

    def _hints(self, cls: type, names: list[str]) -> dict[str, Any]:
        """The options' types; from now on the class holds them resolved."""
        module = sys.modules.get(cls.__module__)
        space = {**vars(typing), **(vars(module) if module else {}), **self.scope}
        found: dict[str, Any] = {}
        own = vars(cls).get("__annotations__", {})
        for name in names:
            hint = own[name]
            try:
                found[name] = typing.get_type_hints(
                    types.SimpleNamespace(__annotations__={name: hint}), None, space
                )[name]
            except (NameError, AttributeError, TypeError, SyntaxError) as e:
                self.say(f"the type of `{name}` is not known: {e}", name)
        cls.__annotations__ = {**own, **found}
        return found


def _allowed(hint: Any) -> bool:
    inside = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return all(map(_allowed, inside))
    if origin is tuple:
        return len(inside) == 2 and inside[1] is Ellipsis and _allowed(inside[0])
    if origin is typing.Literal:
        return all(isinstance(i, str) for i in inside)
    return any(hint is p for p in _PLAIN)


def _finished(cls: type, facts: Mapping[str, Any], origin: Origin) -> type[Pass]:
    """The class as a frozen dataclass and a `Pass`, whose failures are the user's to read."""
    if not dataclasses.is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
    elif not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        span = origin.span()
        help = "write `@dataclass(frozen=True)`, or leave it out"
        raise DfcError("Q040", "the dataclass is not frozen", span=span, help=help)
    theirs: Callable[..., Any] = cls.run  # type: ignore[attr-defined]

    def run(self: Pass, graph: Graph, ctx: Context) -> int:
        try:
            changes = theirs(self, graph, ctx)
        except (DfcError, KeyboardInterrupt):
            raise
        except Exception as e:
            raise failure_of(e, f"the pass `{self.name}`", origin.file) from e
        if type(changes) is not int:
            span = origin.span("run")
            message = f"`run` of the pass `{self.name}` gave {changes!r}, not a number of changes"
            raise DfcError("K040", message, span=span, help="return how many changes it made")
        return changes

    space: dict[str, Any] = {
        **facts, "run": run, "origin": origin, "__module__": cls.__module__,
        "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__annotations__": {},
    }  # fmt: skip
    bases = (cls,) if issubclass(cls, Pass) else (cls, Pass)
    return dataclasses.dataclass(frozen=True)(type(cls.__name__, bases, space))
