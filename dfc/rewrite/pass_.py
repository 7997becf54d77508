"""What a pass is: a frozen dataclass whose fields are its options, found by file name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NewType

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.ir.graph import Graph, Loc, Node, Parameter, Value
from dfc.lang.wording import value_text
from dfc.origin import Origin
from dfc.registry import Plugin, Registry
from dfc.rewrite.journal import Journal

Data = NewType("Data", str)  # an option that names data which the caller passes


@dataclass(frozen=True)
class Numerics:
    """What a pass promises about results.

    EXACT changes no bit; `close(rtol)` reorders arithmetic; CHANGES is judged by a metric instead.
    """

    kind: str
    rtol: float = 0.0

    def __str__(self) -> str:
        return f"close({self.rtol:g})" if self.kind == "close" else self.kind

    @property
    def is_lossy(self) -> bool:
        """Whether results change by more than rounding, on purpose."""
        return self.kind == "changes" or self.rtol >= _LOSSY_RTOL


EXACT = Numerics("exact")
CHANGES = Numerics("changes")
_LOSSY_RTOL = 1e-3


def close(rtol: float) -> Numerics:
    """Results may differ by rounding; the driver's agreement rule bounds by how much."""
    return Numerics("close", rtol)


@dataclass(frozen=True)
class Decision:
    """What a pass did with a node, or why it left it; `into` is the value that took its place."""

    value: str  # `%name`, or `!name` of a parameter
    op: str
    outcome: str  # one word: folded, merged, dropped, rewritten, ...; "kept" when nothing was done
    reason: str = ""
    into: str = ""
    loc: Loc | None = None

    @property
    def changed(self) -> bool:
        return self.outcome != KEPT


KEPT = "kept"


@dataclass(frozen=True)
class Context:
    """What a pass is handed that is not an option.

    `progress(done, total)` reports long work, of 0 where the total is not known; `products` takes
    what is made besides the graph; `decisions` is a list when somebody wants to know why (`dfc
    explain`); `journal`, where there is one, keeps what long work has done so far.
    """

    target: object | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[int, int], None] = lambda done, total: None
    products: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] | None = None
    journal: Journal | None = None
    examples: Sequence[Sequence[Any]] = ()  # flat inputs: what there is where no data is named
    say: Callable[[str], None] = lambda what: None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the caller's own

    @property
    def asked(self) -> bool:
        """Whether anybody wants to know: reasons that cost something are built only then."""
        return self.decisions is not None

    def log(self, text: str) -> None:
        """Say something in a line that stays, where `say` has such."""
        getattr(self.say, "log", self.say)(text)

    def tell(self, text: str) -> None:
        """Log what is worth knowing before the run is over, and leave it to the report."""
        self.log(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Leave something to the report alone."""
        self.products.setdefault("notes", []).append(text)

    def decided(
        self, what: Node | Value, outcome: str, reason: str = "", into: Value | None = None
    ) -> None:
        """Note what becomes of a node or a parameter, before it is erased; else `KEPT` and why."""
        if self.decisions is None:
            return
        node = what if isinstance(what, Node) else what.node
        value = what if isinstance(what, Value) else next(iter(what.results), None)
        name = named(value) if value is not None else ""
        self.decisions.append(
            Decision(
                name, node.op if node else "parameter", outcome, reason,
                named(into) if into is not None else "", node.loc if node else None,
            )
        )  # fmt: skip


def named(value: Value) -> str:
    """`%name` of a value, `!name` of a parameter: as graph text writes it."""
    return f"{'!' if isinstance(value, Parameter) else '%'}{value.name}"


def check_quota(limit: int | None, skip: tuple[int, ...]) -> None:
    """Raises:  DfcError Q012 for a number of changes, or of one of them, below zero."""
    if limit is not None and limit < 0:
        message = f"`limit` counts changes: it is 0 or more, got {limit}"
        raise DfcError("Q012", message, status=2)
    if skip and min(skip) < 0:
        message = f"`skip` names changes by number, from 0: got {min(skip)}"
        raise DfcError("Q012", message, status=2)


class Quota:
    """Which of a pass's changes are made: at most `limit` of them, and none of those in `skip`.

    Changes are numbered from 0 in the order in which they are asked for, those left out included:
    so a wrong one can be found by `limit`, and left out by `skip`.
    """

    def __init__(self, limit: int | None, skip: tuple[int, ...]) -> None:
        check_quota(limit, skip)
        self.limit, self.skip = limit, skip
        self.number = self.done = 0
        self._left: set[Node] = set()

    def allows(self, node: Node) -> bool:
        """Whether the change at this node is made, which then counts."""
        if node in self._left or self.done == self.limit:
            return False
        self.number += 1
        if self.number - 1 in self.skip:
            self._left.add(node)
            return False
        self.done += 1
        return True

    def failed(self, node: Node) -> None:
        """The change that was allowed could not be made: it is not asked for again."""
        self.done -= 1
        self._left.add(node)


class Pass:
    """Graph to graph. `run` changes the graph in place and says how many changes it made.

    C1:  0 means that the graph is untouched.
    C2:  deterministic and stateless; a valid graph stays valid.
    C3:  running it again finds nothing to do, unless `idempotent` is False.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = EXACT
    idempotent: ClassVar[bool] = True
    # How a recipe's sentence fills the fields: "" the operands, "except" what follows `except`.
    phrases: ClassVar[Mapping[str, str]] = {}
    # What `auto` tries for a field.
    auto: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # Whether results are remembered by content: for passes that take long (dfc.rewrite.cache).
    cached: ClassVar[bool] = False
    # Passes that must not have run before this one.
    not_after: ClassVar[tuple[str, ...]] = ()
    # Passes that it prepares: without one of them behind it, it does nothing.
    serves: ClassVar[tuple[str, ...]] = ()
    # Where a pass that dfc does not ship is defined (dfc.rewrite.custom).
    origin: ClassVar[Origin | None] = None

    def run(self, graph: Graph, ctx: Context) -> int:
        raise NotImplementedError

    def needs(self, target: Any) -> str | None:
        """What a target (dfc.recipe.plan.Target) lacks for this pass, None when nothing."""
        return None

    def __str__(self) -> str:
        """The pass as a step of a pipeline: `cse{limit=3}`; defaults are left out."""
        changed = [
            f"{f.name}={value_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{', '.join(changed)}}}" if changed else "")


# The order in which the shipped passes run when the user names none.
DEFAULT = (
    "canonicalize",
    "remove_noops",
    "fold_constants",
    "fold_batch_norm",
    "remove_noops",
    "cse",
    "dce",
)


@cache
def _shipped() -> Mapping[str, type[Pass]]:
    """The passes of the files in `dfc/passes`."""
    import dfc.passes

    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(dfc.passes.__path__):
        loaded = importlib.import_module(f"dfc.passes.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Pass) and "name" in vars(value):
                found[value.name] = value
    return found


def _of_package(plugin: Plugin, loaded: Any) -> type[Pass]:
    """What an entry point gave, if it is a pass of the entry point's name."""
    wrong = None
    if not isinstance(loaded, type) or not issubclass(loaded, Pass):
        wrong = f"is no pass but {loaded!r}"
    elif loaded.name != plugin.name:
        wrong = f"calls itself `{loaded.name}`"
    if wrong:
        help = "an entry point names a class made by `@dfc.pass_`, and has the pass's own name"
        raise DfcError("Q041", f"`{plugin.name}` of {plugin} {wrong}", help=help, status=7)
    return loaded  # type: ignore[no-any-return]


PASSES: Registry[type[Pass]] = Registry("pass", "dfc.passes", lambda: _shipped(), _of_package)


class _Classes(Mapping[str, "type[Pass]"]):
    """Every pass by name; what another package brings is loaded when it is asked for."""

    def __getitem__(self, name: str) -> type[Pass]:
        found = PASSES.get(name) or _shipped().get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*_shipped(), *PASSES.names())))

    def __len__(self) -> int:
        return len({*_shipped(), *PASSES.names()})

    def __contains__(self, name: object) -> bool:
        return name in set(self)


def pass_classes() -> Mapping[str, type[Pass]]:
    """Every pass by name: files in `dfc/passes`, those that `@dfc.pass_` made, and the entry
    points of the group `dfc.passes`. Looking one up, not listing the names, loads its package.

    Raises:  DfcError Q003 when two bring a pass of the name, Q041 when its package does not load.
    """
    return _Classes()


def find_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with its options.

    Raises:  DfcError Q001 for an unknown pass, Q002 for an unknown option or a wrong type.
    """
    classes = pass_classes()
    cls = classes.get(name)
    if cls is None:
        help = did_you_mean(name, list(classes)) or "yours is brought by `--use FILE.py`"
        raise DfcError("Q001", f"unknown pass `{name}`", help=help)
    given = dict(options or {})
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for option in given:
        if option not in fields:
            raise DfcError(
                "Q002",
                f"pass `{name}` has no option `{option}`",
                help=did_you_mean(option, list(fields))
                or (f"it has {', '.join(fields)}" if fields else "it has no options"),
            )
    hints = typing.get_type_hints(cls)
    for option, value in given.items():
        if not _fits(value, hints[option]):
            wanted = _type_name(fields[option].type)
            raise DfcError("Q002", f"`{option}` of pass `{name}` is {wanted}, got {value!r}")
    if missing := missing_options(cls, given):
        raise DfcError.of(missing)
    return cls(**given)


def missing_options(cls: type[Pass], given: Container[str]) -> list[Diagnostic]:
    """An error Q002 for each option that has no default and is not given."""
    found = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name in given or f.default is not dataclasses.MISSING:
            continue
        phrase = next((w for w, o in cls.phrases.items() if o == f.name), None)
        words = f"{cls.name} with {f.name}=..."
        if phrase is not None:
            words = " ".join(w for w in (cls.name, phrase, "NAME") if w)
        message = f"pass `{cls.name}` needs `{f.name}`: it has no default"
        found.append(Diagnostic("Q002", message, None, f"`{words}`"))
    return found


def as_pass(x: str | Pass | type[Pass]) -> Pass:
    """A pass as the caller names it: by name, as a class, or with its options.

    Raises:  DfcError Q001, Q002.
    """
    if isinstance(x, Pass) and dataclasses.is_dataclass(x):
        return x
    if isinstance(x, type) and issubclass(x, Pass) and hasattr(x, "name"):
        return find_pass(x.name) if pass_classes().get(x.name) is x else x()
    if isinstance(x, str):
        return find_pass(x)
    help = "make it one with `@dfc.pass_`, or name it"
    raise DfcError("Q001", f"`{getattr(x, '__name__', x)}` is no pass", help=help)


def _type_name(type_: Any) -> str:
    return type_ if isinstance(type_, str) else getattr(type_, "__name__", str(type_))


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an option's type: numbers, text, tuples, unions of those."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in inside)
    if origin is typing.Literal:
        return value in inside and type(value) in {type(i) for i in inside}
    if hint is Data:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inside[0]) for v in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)
