"""A batch as microbatches and back, for arrays and tensors alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dfc.calling import allowed
from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph, Value
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType

if TYPE_CHECKING:
    import torch

K = TypeVar("K")


def batch_of(graph: Graph) -> str | None:
    """The batch: the one symbol that is the first dimension of inputs and outputs."""
    first = {
        getattr(v.type.shape[0], "symbol", None)
        for v in (*graph.inputs, *graph.outputs)
        if isinstance(v.type, TensorType) and v.type.rank
    } - {None}
    return first.pop() if len(first) == 1 else None


def checked_batch(graph: Graph, given: str | None) -> str | None:
    """The batch that is given, else the one that is found.

    Raises:  DfcError N051 for a symbol that no input has.
    """
    if given is None:
        return batch_of(graph)
    known = sorted({s for v in graph.inputs for s in v.type.symbols})
    if given not in known:
        have = f"they have {', '.join(known)}" if known else "all of their sizes are fixed"
        raise DfcError("N051", f"no input has the batch `{given}`: {have}", status=2)
    return given


def no_batch(graph: Graph, microbatches: int) -> DfcError:
    """The error for microbatches of what has no batch, or several sizes that could be it."""
    known = sorted({s for v in graph.inputs for s in v.type.symbols})
    if known:
        have, help = f"inputs have {', '.join(known)}", f'say which it is: batch="{known[0]}"'
    else:
        have = "all sizes of the inputs are fixed"
        help = 'trace it with dynamic_shapes=({0: torch.export.Dim("B")}, ...), or microbatches=1'
    message = f"there is no batch to be cut into {microbatches} microbatches: {have}"
    return DfcError("N051", message, help=help, status=2)


def batch_dim(value: Value, batch: str | None) -> int | None:
    """Which dimension of a value is the batch, None for a value that every item shares.

    Raises:  DfcError N051 for a size that the batch is only a part of, and for several of them.
    """
    if batch is None or not isinstance(value.type, TensorType):
        return None
    shape = value.type.shape
    held = [i for i, s in enumerate(shape) if isinstance(s, Expr) and batch in s.symbols]
    if not held:
        return None
    if len(held) == 1 and getattr(shape[held[0]], "symbol", None) == batch:
        return held[0]
    what = f"a size of which the batch `{batch}` is a part"
    if held[1:]:
        what = f"the batch `{batch}` in {len(held)} of its sizes"
    raise DfcError(
        "N051",
        f"%{value.name} {value.type} has {what}: it cannot be cut into microbatches",
        help="run it with microbatches=1",
    )


def batch_dims(graph: Graph, batch: str | None, microbatches: int) -> dict[Value, int | None]:
    """Where inputs are cut; one microbatch is whole.

    Raises:  DfcError N051 as `batch_dim`.
    """
    return {v: None if microbatches == 1 else batch_dim(v, batch) for v in graph.inputs}


def least_of(graph: Graph, batch: str | None) -> int:
    """How many items a microbatch has at least: the graph is true for sizes in their range only."""
    return max(1, graph.ranges[batch][0]) if batch in graph.ranges else 1


def cut(
    inputs: Mapping[K, Any], dims: Mapping[K, int | None], count: int, least: int = 1
) -> list[dict[K, Any]]:
    """At most `count` microbatches, whose sizes differ by one item at most, the larger first.

    Each has `least` items, so they may be fewer. What has no batch goes to each of them whole.
    """
    sizes = {inputs[k].shape[d] for k, d in dims.items() if d is not None}
    if not sizes:
        return [dict(inputs)]
    size = max(sizes)
    parts = max(1, min(count, size // least))
    found, start = [], 0
    for i in range(parts):
        stop = start + size // parts + (i < size % parts)
        found.append({k: _part(x, dims[k], start, stop) for k, x in inputs.items()})
        start = stop
    return found


def parts_of(
    graph: Graph, batch: str | None, inputs: Sequence[Any], dims: Mapping[Value, int | None],
    count: int,
) -> list[dict[Value, Any]]:  # fmt: skip
    """A graph's inputs as at most `count` microbatches, as `cut`: as many as have sizes that the
    graph is true for."""
    given, least = dict(zip(graph.inputs, inputs, strict=True)), least_of(graph, batch)
    for n in range(count, 1, -1):
        parts = cut(given, dims, n, least)
        if all(allowed(graph, bind_inputs(graph, part.values())) for part in parts):
            return parts
    return cut(given, dims, 1, least)


def _part(x: Any, dim: int | None, start: int, stop: int) -> Any:
    return x if dim is None else x[(slice(None),) * dim + (slice(start, stop),)]


def joined(pieces: Sequence[Any], dim: int | None) -> Any:
    """The pieces of an output, in order, as one."""
    if len(pieces) == 1 or dim is None:
        return pieces[0]
    if hasattr(pieces[0], "data_ptr"):
        return _of_tensors(list(pieces), dim)
    import numpy as np

    return np.concatenate(list(pieces), axis=dim)


def _of_tensors(pieces: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Tensors as one, put together by this thread alone.

    Why:  PyTorch shares the copy among threads, whose cores the ranks of a pipeline use: where one
          is late the others spin for it (50 ms of a processor for 4 MB on a busy machine).
    """
    import numpy as np
    import torch

    plain = all(x.is_contiguous() and x.is_cpu and not x.is_complex() for x in pieces)
    if not plain:
        return torch.cat(pieces, dim=dim)
    shape = list(pieces[0].shape)
    shape[dim] = sum(x.shape[dim] for x in pieces)
    made = torch.empty(shape, dtype=pieces[0].dtype)
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[made.itemsize]
    parts = [x.detach().view(number).numpy() for x in pieces]
    np.concatenate(parts, axis=dim, out=made.view(number).numpy())
    return made
