"""Which column feeds which input of a model, and which column each result becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.emit.onnx_values import input_names, output_names
from dfc.errors import DfcError, did_you_mean
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.rows.arrays import written_type


@dataclass(frozen=True)
class Feed:
    """An input and the column that it is read from; `pad` fills rows that are shorter."""

    input: str
    column: str
    pad: Any = None


@dataclass(frozen=True)
class Result:
    """An output, by its place among them, and the column that it becomes, of an Arrow type."""

    index: int
    column: str
    type: Any


def bind_feeds(
    graph: Graph, found: Sequence[str], columns: Mapping[str, str], pad: Mapping[str, Any]
) -> tuple[Feed, ...]:
    """A column for each input: the one that is said, or that is called like it.

    Raises:  DfcError D100 for a model that is no function of rows, D101 for what is not there.
    """
    names = input_names(graph)
    for given, what in ((columns, "columns"), (pad, "pad")):
        for name in given:
            if name not in names:
                help = did_you_mean(name, names) or f"its inputs are {', '.join(names)}"
                message = f"the model has no input `{name}`, which `{what}` names"
                raise DfcError("D101", message, help=help, status=2)
    if graph.mutations:
        message = "the model keeps a state between calls: what a row gives depends on those before"
        raise DfcError("D100", message, help="compile it without buffers it writes to", status=2)
    batch_of(graph)
    feeds = []
    for name in names:
        column = columns.get(name, name)
        if column not in found:
            help = did_you_mean(column, found) or f"its columns are {', '.join(found)}"
            if name not in columns:
                help += f'; say which one it is: columns={{"{name}": COLUMN}}'
            message = f"the table has no column `{column}` for the input `{name}`"
            raise DfcError("D101", message, help=help, status=2)
        feeds.append(Feed(name, column, pad.get(name)))
    return tuple(feeds)


def batch_of(graph: Graph) -> str | int:
    """The first dimension of all inputs: a symbol's name, or a number.

    Raises:  DfcError D100 where they have none in common.
    """
    sizes: dict[str | int, str] = {}
    for name, v in zip(input_names(graph), graph.inputs, strict=True):
        first = v.type.shape[0] if isinstance(v.type, TensorType) and v.type.shape else None
        size = first.symbol if isinstance(first, Expr) else first
        if size is None:
            message = f"the input `{name}` ({v.type}) has no dimension of rows"
            help = "each input's first dimension must be the batch, of a size that may vary"
            raise DfcError("D100", message, help=help, status=2)
        sizes[size] = name
    if len(sizes) != 1:
        shown = " and ".join(f"`{name}` of {size}" for size, name in list(sizes.items())[:2])
        message = f"the inputs do not share their first dimension: {shown}" if sizes else (
            "the model has no inputs")  # fmt: skip
        raise DfcError("D100", message, help="each must begin with the batch", status=2)
    return next(iter(sizes))


def bind_results(
    graph: Graph, found: Sequence[str], outputs: Mapping[str, str] | Sequence[str] | None
) -> tuple[Result, ...]:
    """A column for each output that is wanted: all of them, unless it is said.

    Raises:  DfcError D101 for an output that is not there, or a column that is; D100 for one that
             is not of rows.
    """
    names = output_names(graph)[: len(graph.outputs)]
    wanted = outputs if isinstance(outputs, Mapping) else {n: n for n in outputs or names}
    batch = batch_of(graph)
    results: list[Result] = []
    for name, column in wanted.items():
        if name not in names:
            help = did_you_mean(name, names) or f"its outputs are {', '.join(names)}"
            raise DfcError("D101", f"the model has no output `{name}`", help=help, status=2)
        if column in found or column in [r.column for r in results]:
            message = f"there is a column `{column}` already"
            help = f'call the result otherwise: outputs={{"{name}": "scores"}}'
            raise DfcError("D101", message, help=help, status=2)
        index = names.index(name)
        type = graph.outputs[index].type
        first = type.shape[0] if isinstance(type, TensorType) and type.shape else None
        if (first.symbol if isinstance(first, Expr) else first) != batch:
            message = f"the output `{name}` ({type}) has no dimension of rows"
            help = f"leave it out: outputs={[n for n in names if n != name]}"
            raise DfcError("D100", message, help=help, status=2)
        assert isinstance(type, TensorType)
        written = written_type(type.dtype, type.rank)
        if written is None:
            message = f"the output `{name}` is {type.dtype}, of which a table has no columns"
            raise DfcError("D100", message, help="leave it out, or cast it in the model", status=2)
        results.append(Result(index, column, written))
    return tuple(results)
