"""Arrow arrays as tensors and back: nested lists are dimensions, and short ones are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfc.errors import DfcError
from dfc.ir.types import DType

if TYPE_CHECKING:
    import torch

# Spark has no unsigned numbers and no halves: they become the next type that holds them all.
_WRITTEN = {"f16": "float32", "bf16": "float32", "f32": "float32", "f64": "float64",
            "u8": "int16", "u16": "int32", "u32": "int64", "i8": "int8", "i16": "int16",
            "i32": "int32", "i64": "int64", "bool": "bool"}  # fmt: skip


def dense(array: Any, dims: int, pad: Any, column: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The numbers of an array of rows, and how long rows are in each dimension but the first.

    array:    an Arrow array whose values are numbers, or lists in lists of them, `dims - 1` deep
    pad:      what fills lists that are shorter than the longest; None where all must be as long
    Returns:  an array of `dims` dimensions; lengths of the rows, one array [rows] a dimension,
              of lists within lists the longest of each row.
    Raises:   DfcError D102 for missing values, D103 for another depth, D104 for ragged lists.
    """
    import pyarrow as pa

    if isinstance(array.type, pa.BaseExtensionType) and hasattr(array.type, "shape"):
        return _of_tensors(array, dims, column)
    if array.null_count:
        message = f"the column `{column}` has {array.null_count} missing values in a batch"
        raise DfcError("D102", message, help="fill or drop these rows first", status=2)
    nested = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    nested = nested or pa.types.is_fixed_size_list(array.type)
    if nested != (dims > 1):
        is_a = "lists" if nested else "plain values"
        message = f"the column `{column}` holds {is_a} where the model has {dims} dimensions"
        help = "a row is a list for each dimension but the batch: list<float> for f32[B, S]"
        raise DfcError("D103", message, help=help, status=2)
    if dims == 1:
        return array.to_numpy(zero_copy_only=False), []
    count = len(array)
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(count, array.type.list_size, dtype=np.int64)
    else:
        lengths = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    inner, below = dense(array.flatten(), dims - 1, pad, column)
    longest = int(lengths.max(initial=0))
    ragged = bool(count) and int(lengths.min()) != longest
    if ragged and pad is None:
        message = f"rows of the column `{column}` are {lengths.min()} to {longest} long"
        help = "say what fills the shorter ones: pad={INPUT: 0}, and what is masked with it"
        raise DfcError("D104", message, help=help, status=2)
    if not ragged:
        whole = inner.reshape(count, longest, *inner.shape[1:])
    else:
        whole = np.full((count, longest, *inner.shape[1:]), pad, dtype=inner.dtype)
        whole[np.arange(longest) < lengths[:, None]] = inner
    ends = np.cumsum(lengths)
    most = [np.array([_most(x, end - n, end) for n, end in zip(lengths, ends, strict=True)],
                     dtype=np.int64) for x in below]  # fmt: skip
    return whole, [lengths, *most]


def _most(lengths: np.ndarray, begin: int, end: int) -> int:
    return int(lengths[begin:end].max(initial=0))


def _of_tensors(array: Any, dims: int, column: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Arrow's arrays of tensors of one shape, and Ray's: their storage is lists of all numbers."""
    shape = tuple(array.type.shape)
    if len(shape) != dims - 1:
        message = f"the column `{column}` holds tensors of {len(shape)} dimensions"
        raise DfcError("D103", message, help=f"the model has {dims} with the batch", status=2)
    if array.null_count:
        message = f"the column `{column}` has {array.null_count} missing values in a batch"
        raise DfcError("D102", message, help="fill or drop these rows first", status=2)
    values = array.storage.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), *shape), [np.full(len(array), n) for n in shape]


def fitted(array: np.ndarray, sizes: Sequence[int], pad: Any) -> np.ndarray:
    """The array, filled up to these sizes of its dimensions after the first."""
    if array.shape[1:] == tuple(sizes):
        return array
    found = np.full((len(array), *sizes), 0 if pad is None else pad, dtype=array.dtype)
    found[tuple(slice(n) for n in array.shape)] = array
    return found


def as_tensor(array: np.ndarray, dtype: DType, column: str) -> torch.Tensor:
    """The numbers in the model's own type. Floats are rounded; whole numbers must fit.

    Raises:  DfcError D105 for numbers that the type cannot hold.
    """
    import torch

    kinds = {"b": "bool", "i": "int", "u": "int", "f": "float"}
    kind, wanted = kinds.get(array.dtype.kind), dtype.kind.replace("uint", "int")
    order = ["bool", "int", "float"]
    message = ""
    if kind is None or order.index(kind) > order.index(wanted):
        message = f"the column `{column}` holds {array.dtype}, the model's input is {dtype}"
    elif wanted == "int" and array.size and kind == "int":
        info = torch.iinfo(dtype.to_torch())
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            beyond = low if low < info.min else high
            message = f"the column `{column}` has {beyond}, which {dtype} cannot hold"
    if message:
        raise DfcError("D105", message, help="cast the column first", status=2)
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(dtype.to_torch())


def written_type(dtype: DType, dims: int) -> Any:
    """The Arrow type of a column of results with so many dimensions, the batch's too; or None."""
    import pyarrow as pa

    name = _WRITTEN.get(dtype.name)
    if name is None:
        return None
    found = pa.bool_() if name == "bool" else getattr(pa, name)()
    for _ in range(dims - 1):
        found = pa.list_(found)
    return found


def as_array(tensor: torch.Tensor, type: Any, lengths: Sequence[np.ndarray | None]) -> Any:
    """A result as an Arrow array of lists; `lengths` cut rows in a dimension to what was there.

    lengths:  for each dimension but the first an array [rows], or None for all of it.
    """
    import pyarrow as pa

    inner = type
    for _ in range(tensor.dim() - 1):
        inner = inner.value_type
    whole = tensor.detach().cpu().to(_torch_type(inner)).numpy()
    rows = whole.shape[0]
    kept = np.ones(whole.shape, dtype=bool)
    for axis, cut in enumerate(lengths, start=1):
        if cut is not None:
            inside = np.arange(whole.shape[axis]) < cut[:, None]
            kept &= inside.reshape(rows, *(whole.shape[i] if i == axis else 1
                                           for i in range(1, whole.ndim)))  # fmt: skip
    found = pa.array(whole[kept], inner)
    return _listed(found, whole.shape, lengths) if whole.ndim > 1 else found


def _listed(values: Any, shape: tuple[int, ...], lengths: Sequence[np.ndarray | None]) -> Any:
    """Flat values as lists in lists: from the innermost dimension out."""
    import pyarrow as pa

    rows = shape[0]
    sizes = [np.full(rows, n) if cut is None else cut
             for n, cut in zip(shape[1:], lengths, strict=True)]  # fmt: skip
    for axis in range(len(sizes) - 1, -1, -1):
        lists = np.ones(rows, dtype=np.int64)  # of each row, how many there are at this depth
        for outer in sizes[:axis]:
            lists = lists * outer
        each = np.repeat(sizes[axis], lists)
        ends = np.concatenate([[0], np.cumsum(each)])
        values = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)  # refuses too many
    return values


def _torch_type(type: Any) -> Any:
    import torch

    names = {"float": "float32", "double": "float64", "bool": "bool"}
    return getattr(torch, names.get(str(type), str(type)))
