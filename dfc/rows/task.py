"""What a worker does: loads a package once, and adds to batches of rows what it gives for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.rows.batches import read_batch, write_batch
from dfc.rows.bound import Feed, Result

if TYPE_CHECKING:
    from dfc.compiled import Compiled


@dataclass(frozen=True)
class RowTask:
    """Batches of Arrow to batches of Arrow, by a package; plain data, sent to workers as it is.

    digest:   of the package: a worker that finds another one at its path refuses it
    threads:  that a worker computes with; None leaves them as they are
    """

    package: str
    digest: str
    engine: str | None
    threads: int | None
    batch: int
    feeds: tuple[Feed, ...]
    results: tuple[Result, ...]

    def __call__(self, table: Any) -> Any:
        """An Arrow table of any number of rows, with the results as columns behind its own."""
        import pyarrow as pa

        parts = [self._run(table.slice(i, self.batch)) for i in range(0, len(table), self.batch)]
        for i, result in enumerate(self.results):
            column = pa.chunked_array([part[i] for part in parts], type=result.type)
            table = table.append_column(result.column, column)
        return table

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same of record batches, one after another, as Spark's mapInArrow hands them."""
        import pyarrow as pa

        for batch in batches:
            yield from self(pa.Table.from_batches([batch])).combine_chunks().to_batches()

    def _run(self, rows: Any) -> list[Any]:
        compiled = loaded(self.package, self.digest, self.engine, self.threads)
        inputs, lengths = read_batch(compiled.graph, rows, self.feeds)
        outputs = compiled.run_flat(inputs)
        return write_batch(compiled.graph, outputs, self.results, len(rows), lengths)


@lru_cache(maxsize=2)
def loaded(package: str, digest: str, engine: str | None, threads: int | None) -> Compiled:
    """A package in this process, read and built once.

    Raises:  DfcError D022 where it is not the one that was meant, others of `dfc.load`.
    """
    import torch

    from dfc.api import load
    from dfc.manifest import read_manifest

    found = read_manifest(package)["self_sha256"]
    if found != digest:
        message = f"`{package}` is another package on this machine: {found[:12]}, not {digest[:12]}"
        help = "put it where all workers read the same files, under a name of its own"
        raise DfcError("D022", message, help=help, status=2)
    if threads is not None:
        torch.set_num_threads(threads)
    return load(package, engine=engine)
