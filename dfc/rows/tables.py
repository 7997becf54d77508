"""`dfc.map_rows`: a package over an Arrow table, a Ray dataset or a Spark data frame."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rows.bound import batch_of, bind_feeds, bind_results
from dfc.rows.task import RowTask

_KINDS = "a pyarrow Table or RecordBatchReader, a Ray Dataset, or a Spark DataFrame"


def map_rows(
    table: Any,
    package: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | Sequence[str] | None = None,
    pad: Mapping[str, Any] | None = None,
    batch: int = 32,
    engine: str | None = None,
    threads: int | None = None,
) -> Any:
    """Run a package on each row of a table, a batch at a time, and add its outputs as columns.

    The model's inputs must share their first dimension, which rows fill; its other dimensions are
    lists in a row. What comes out is cut to a row's own length where it was filled up. Numbers of
    16 bits and bfloat16 become float32 columns, unsigned ones the next signed type.

    table:    a pyarrow Table or RecordBatchReader, a Ray Dataset or a Spark DataFrame; the result
              is of the same kind, and as lazy. Ray's and Spark's workers load the package once
              each: all of them must find the same one at its path.
    columns:  {input: column}, for inputs that are not called as their columns are
    outputs:  {output: column}, or names of those that are wanted; all of them by default
    pad:      {input: value}, what fills rows that are shorter than the longest of a batch
    batch:    rows of a call, at most as many as the model takes
    engine:   another one than the package's
    threads:  of each of Ray's and Spark's workers: by default what a task is given (1 in Ray,
              `spark.task.cpus`)
    Raises:   DfcError D100 for a model that is no function of rows, D101 for names that are not
              there; D102..D106 and K013..K016 for rows that do not fit, when they are read.
    """
    kind = type(table).__module__.partition(".")[0]
    runs = {"pyarrow": _arrow, "ray": _ray, "pyspark": _spark}.get(kind)
    names = _names(table, kind)
    if runs is None or names is None:
        message = f"`table` is {_KINDS}, got {type(table).__name__}"
        help = 'pyarrow.Table.from_pandas(frame), or pyarrow.table({"ids": [[1, 2]]})'
        raise DfcError("Q055", message, help=help, status=2)
    if not isinstance(batch, int) or batch < 1:
        raise DfcError("Q055", f"`batch` is a number of rows, got {batch!r}", status=2)
    graph, digest = _opened(Path(package))
    listed = list(outputs) if isinstance(outputs, (tuple, list)) else outputs
    task = RowTask(
        str(Path(package).absolute()), digest, engine, threads, _at_most(graph, batch),
        bind_feeds(graph, names, columns or {}, pad or {}), bind_results(graph, names, listed),
    )  # fmt: skip
    return runs(table, task)


def _opened(package: Path) -> tuple[Graph, str]:
    from dfc.manifest import read_manifest
    from dfc.package import read_package

    return read_package(package).graph, read_manifest(package)["self_sha256"]


def _at_most(graph: Graph, batch: int) -> int:
    """As many rows as the model takes at once: all that it has, where their number is fixed."""
    size = batch_of(graph)
    if isinstance(size, int):
        return size
    most = graph.ranges.get(size, (0, None))[1]
    return batch if most is None else min(batch, most)


def _names(table: Any, kind: str) -> list[str] | None:
    if kind == "pyarrow":
        schema = getattr(table, "schema", None)
        return list(schema.names) if schema is not None else None
    if kind == "ray":
        return list(table.columns() or []) if hasattr(table, "map_batches") else None
    if kind == "pyspark":
        return list(table.columns) if hasattr(table, "mapInArrow") else None
    return None


def _arrow(table: Any, task: RowTask) -> Any:
    import pyarrow as pa

    if task.threads is not None:
        message = "`threads` are those of Ray's and Spark's workers"
        help = "call torch.set_num_threads for a table of this process"
        raise DfcError("Q055", message, help=help, status=2)
    if isinstance(table, pa.Table):
        return task(table)
    schema = table.schema
    for result in task.results:
        schema = schema.append(pa.field(result.column, result.type))
    return pa.RecordBatchReader.from_batches(schema, task.stream(table))


def _ray(dataset: Any, task: RowTask) -> Any:
    from dataclasses import replace

    task = replace(task, threads=task.threads or 1)
    return dataset.map_batches(
        task, batch_format="pyarrow", batch_size=task.batch, num_cpus=task.threads
    )


def _spark(frame: Any, task: RowTask) -> Any:
    from dataclasses import replace

    from pyspark.sql.types import StructType

    cores = int(frame.sparkSession.conf.get("spark.task.cpus", "1"))
    schema = StructType(list(frame.schema.fields))
    for result in task.results:
        schema = schema.add(result.column, _spark_type(result.type))
    return frame.mapInArrow(replace(task, threads=task.threads or cores).stream, schema)


def _spark_type(type: Any) -> Any:
    import pyarrow as pa
    from pyspark.sql import types

    if pa.types.is_list(type):
        return types.ArrayType(_spark_type(type.value_type))
    found = {
        "float": types.FloatType, "double": types.DoubleType, "int8": types.ByteType,
        "int16": types.ShortType, "int32": types.IntegerType, "int64": types.LongType,
        "bool": types.BooleanType,
    }  # fmt: skip
    return found[str(type)]()
