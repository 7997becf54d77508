"""The user's calibration data: read more than once, and each batch checked before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dfc.calling import flat_inputs
from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph
from dfc.origin import failure_of
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

_FORMS = "a batch is what the model is called with: a tensor, or a tuple or dict of arguments"


class Batches:
    """Batches of a graph's inputs, in the order of `graph.inputs`.

    The data is any iterable that can be read more than once; a batch is a tensor, a tuple or list
    of arguments, or a dict of keyword arguments.
    Raises:  while they are read, DfcError D080 for no batch at all, D081 for one that the model
             cannot be called with, D082 for numbers that are none, D083 for data that gives
             another number of batches when it is read again; K040 when the user's own code raises.
    """

    def __init__(self, name: str, data: Any, graph: Graph) -> None:
        self.name = name
        self._data = data
        self._graph = graph
        self._seen: int | None = None  # batches when it was read to its end

    @property
    def count(self) -> int | None:
        """How many there are, where that is known before they are read."""
        try:
            return len(self._data)
        except TypeError:
            return self._seen

    def __iter__(self) -> Iterator[list[Tensor]]:
        number = 0
        for number, batch in enumerate(self._raw(), 1):
            yield self._checked(batch, number)
        if number == 0:
            again = f", but {self._seen} when it was read before" if self._seen else ""
            help = "it must be readable more than once: a list or a DataLoader, not a generator"
            if self.count == 0:
                help = "it is empty: a batch is what the model is called with"
            code = "D083" if self._seen else "D080"
            raise DfcError(code, f"data `{self.name}` gave no batch{again}", help=help)
        if self._seen not in (None, number):
            gave = counted(number, "batch")
            message = f"data `{self.name}` gave {gave}, but {self._seen} the first time"
            raise DfcError("D083", message, help="calibration reads the same data several times")
        self._seen = number

    def _raw(self) -> Iterator[Any]:
        """What the user's own code gives."""
        try:
            yield from self._data
        except (DfcError, GeneratorExit):
            raise
        except Exception as e:
            raise failure_of(e, f"data `{self.name}`") from e

    def _checked(self, batch: Any, number: int) -> list[Any]:
        args, kwargs = _as_call(batch)
        try:
            leaves = flat_inputs(self._graph, args, kwargs)
        except DfcError as e:
            raise self._refuse("D081", number, e.message, self._remedy(e, args)) from e
        for v, x in zip(self._graph.inputs, leaves, strict=True):
            problem = _not_finite(x)
            if problem:
                raise self._refuse("D082", number, f"`{v.name}` {problem}", None)
        return leaves

    def _remedy(self, e: DfcError, args: tuple[Any, ...]) -> str:
        """What to try for a batch that does not fit."""
        from torch import Tensor

        takes = sum(not a.keyword_only for a in self._graph.arguments)
        if isinstance(self._data, Tensor):
            return "it is one tensor, whose rows are taken for batches: put it into a list"
        if e.code == "K012" and len(args) > takes:
            return "give the inputs without labels: [x for x, _ in loader]"
        if e.code == "K014":
            return "give batches of the traced shape, or trace with dynamic_shapes"
        return e.diagnostics[0].help or _FORMS

    def _refuse(self, code: str, number: int, problem: str, help: str | None) -> DfcError:
        return DfcError(code, f"batch {number} of data `{self.name}`: {problem}", help=help)


def batches_of(ctx: Context, name: str, graph: Graph) -> Batches:
    """The data that a step names, as batches of the graph's inputs.

    Raises:  DfcError D084 when no such data was passed, D083 when it can be read only once.
    """
    if name not in ctx.data:
        help = did_you_mean(name, list(ctx.data)) or (
            f'pass data={{"{name}": batches}} to dfc.compile, '
            f"or --data {name}=FILE.py:FUNCTION to `dfc compile`"
        )
        raise DfcError("D084", f"data `{name}` is not passed", help=help)
    data = ctx.data[name]
    kind = type(data).__name__
    if isinstance(data, Iterator):
        help = "pass a list, a DataLoader, or anything else that can be iterated again"
        message = f"data `{name}` can be read only once: it is a {kind}"
        raise DfcError("D083", message, help=help)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        message = f"data `{name}` is of type {kind}, which holds no batches"
        raise DfcError("D084", message, help=_FORMS)
    return Batches(name, data, graph)


def _as_call(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _not_finite(x: Any) -> str | None:
    """What is wrong with the numbers; -inf beside nothing but zeros is a mask."""
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return None
    finite = torch.isfinite(x)
    if bool(finite.all()) or (bool((x[~finite] == -torch.inf).all()) and not x[finite].any()):
        return None
    where = [int(i) for i in (~finite).nonzero()[0]]
    bad = int((~finite).sum())
    words = "1 number that is" if bad == 1 else f"{bad} numbers that are"
    return f"has {words} NaN or infinite, the first at {where}"
