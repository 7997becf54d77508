"""A batch of rows as a model's inputs, and its outputs as columns of these rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfc.calling import flat_checked
from dfc.errors import DfcError
from dfc.ir.expr import Expr, Size
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.rows.arrays import as_array, as_tensor, dense, fitted
from dfc.rows.bound import Feed, Result, batch_of

# How long each row is in a dimension of the model's, by the name of its size.
Lengths = dict[str, np.ndarray]


def read_batch(graph: Graph, rows: Any, feeds: Sequence[Feed]) -> tuple[list[Any], Lengths]:
    """The model's inputs of an Arrow table of at most a batch of rows.

    Where the model takes no fewer rows, the table's last one is taken again.
    Raises:  DfcError D102..D106 for numbers that the model cannot take, K013..K016 for sizes.
    """
    arrays, lengths = [], Lengths()
    for feed, type in zip(feeds, _types(graph), strict=True):
        column = rows.column(feed.column).combine_chunks()
        array, found = dense(column, type.rank, feed.pad, feed.column)
        arrays.append(array)
        for size, length in zip(type.shape[1:], found, strict=True):
            if isinstance(size, Expr) and size.symbol is not None:
                _same(lengths.setdefault(size.symbol, length), length, size, feed)
    sizes = {name: max(int(x.max(initial=0)), graph.ranges.get(name, (0, None))[0])
             for name, x in lengths.items()}  # fmt: skip
    least = batch_of(graph)
    least = graph.ranges.get(least, (0, None))[0] if isinstance(least, str) else least
    inputs = []
    for feed, type, array in zip(feeds, _types(graph), arrays, strict=True):
        if len(array) < least:
            array = np.concatenate([array, np.repeat(array[-1:], least - len(array), axis=0)])
        shape = [_wanted(size, sizes, have)
                 for size, have in zip(type.shape[1:], array.shape[1:], strict=True)]  # fmt: skip
        for want, have in zip(shape, array.shape[1:], strict=True):
            if have != want and (have > want or feed.pad is None):
                message = f"rows of `{feed.column}` have {have} values where the model takes {want}"
                help = f"cut or fill the rows first: `{feed.input}` is {type}"
                raise DfcError("D106", message, help=help, status=2)
        inputs.append(as_tensor(fitted(array, shape, feed.pad), type.dtype, feed.column))
    return flat_checked(graph, inputs), lengths


def write_batch(
    graph: Graph, outputs: Sequence[Any], results: Sequence[Result], count: int, lengths: Lengths
) -> list[Any]:
    """Arrow arrays of the first `count` rows of what is wanted, each as long as its row."""
    found = []
    for result in results:
        type = graph.outputs[result.index].type
        assert isinstance(type, TensorType)
        cut = [lengths.get(size.symbol or "") if isinstance(size, Expr) else None
               for size in type.shape[1:]]  # fmt: skip
        found.append(as_array(outputs[result.index][:count], result.type, cut))
    return found


def _types(graph: Graph) -> list[TensorType]:
    return [v.type for v in graph.inputs if isinstance(v.type, TensorType)]


def _wanted(size: Size, sizes: Mapping[str, int], have: int) -> int:
    """What a dimension is to be: the longest row's, the model's own number, or as it is."""
    if isinstance(size, int):
        return size
    return sizes.get(size.symbol or "", have)


def _same(before: np.ndarray, now: np.ndarray, size: Expr, feed: Feed) -> None:
    if np.array_equal(before, now):
        return
    row = int(np.flatnonzero(before != now)[0])
    message = f"a row has {now[row]} values in `{feed.column}` and {before[row]} in another column"
    raise DfcError("D106", message, help=f"both are {size} of the model's sizes", status=2)
