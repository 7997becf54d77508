"""Calibration: values of a graph are watched while the user's batches stream through it.

One batch is in memory at a time, and of it what the interpreter still needs. With a journal, what
was observed survives a kill: the batches that were seen are read again and compared, not run. It
is written between batches only, so that no observer has seen half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dfc.compress.batches import Batches, batches_of
from dfc.counting import counted
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType
from dfc.rewrite.code_digest import code_of
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor


class Observer(Protocol):
    """Sees one value of the graph, batch by batch."""

    def update(self, x: Tensor) -> None:
        """One batch of the value; floats as float32, padded tokens left out."""

    def state(self) -> dict[str, Tensor]:
        """All that was seen so far."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""


def observe(
    graph: Graph,
    batches: Iterable[list[Tensor]],
    observers: Mapping[Value, Observer],
    ctx: Context,
    key: str,
) -> int:
    """Run every batch through the graph, as far as it is observed; how many there were.

    `key` says what the observers do besides their class: the options that decide their state.
    Needs:   values of `graph` or of graphs nested in it, inputs among them, no parameters.
    Keeps:   an observer's state after a kill and another run equals that of one run.
    Raises:  what reading `batches` raises (see Batches); K020 when a node fails.
    """
    if not observers:
        return 0
    run = _Run(graph, observers, ctx)
    entry = run.entry(batches, key) if ctx.journal is not None else None
    total = getattr(batches, "count", None) or 0
    skipped = entry.resume(batches) if entry else 0
    if skipped:
        seen = counted(skipped, "batch was", "batches were")
        ctx.log(f"calibration: {seen} seen in an earlier run: not run again")
    done = 0
    try:
        for done, batch in enumerate(batches, 1):
            if done > skipped:
                run.batch(batch)
                if entry:
                    entry.seen(batch, done)
            ctx.progress(done, total)
    except KeyboardInterrupt:
        if entry and entry.kept:
            kept = counted(entry.kept, "batch is", "batches are")
            ctx.log(f"calibration: {kept} kept: it will go on from there")
        raise
    if entry and done > skipped:
        entry.save(finished=True)
    return done


class _Stop(Exception):
    """Everything that is observed has been computed."""


class _Run:
    """Runs batches up to the last value that somebody observes."""

    def __init__(self, graph: Graph, observers: Mapping[Value, Observer], ctx: Context) -> None:
        wrong = [v.name for v in observers if isinstance(v, Parameter)]
        assert not wrong, f"parameters are constant: !{wrong[0]} is not observed"
        self.graph = graph
        self.observers = observers
        self.ctx = ctx
        self.mask = padding_mask(graph)
        self.last = _last_node(graph, observers)

    def batch(self, batch: Sequence[Any]) -> None:
        padding = None
        if self.mask is not None:
            padding = batch[self.graph.inputs.index(self.mask)] != 0
            padding = None if bool(padding.all()) else padding
        for v, x in zip(self.graph.inputs, batch, strict=True):
            self.see(v, x, padding)

        def watch(node: Node, results: Sequence[Any]) -> None:
            for v, x in zip(node.results, results, strict=True):
                self.see(v, x, padding)
            if node is self.last:
                raise _Stop

        if self.last is None:
            return
        with contextlib.suppress(_Stop):
            interpret(self.graph, batch, observe=watch)

    def see(self, v: Value, x: Any, padding: Tensor | None) -> None:
        observer = self.observers.get(v)
        if observer is None:
            return
        x = x.detach()
        if x.is_floating_point():
            x = x.float()
        if padding is not None and is_by_token(v, self.mask):
            x = x[padding]
        observer.update(x)

    def entry(self, batches: Any, key: str) -> _Entry:
        """The place in the journal for these observers, this graph and this data."""
        places = _places(self.graph)
        words = [self.graph.fingerprint(), str(getattr(batches, "name", "")), key]
        words += code_of(self.graph)
        words += [f"{places[v]} {type(o).__name__}" for v, o in self.observers.items()]
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
        assert self.ctx.journal is not None
        once = {id(o): (str(places[v]), o) for v, o in self.observers.items()}
        named = dict(once.values())  # an observer may see several values
        return _Entry(self.ctx.journal, digest, named)


def _places(graph: Graph) -> dict[Value, int]:
    """A number for each value that does not depend on its name."""
    found = list(graph.inputs)
    for node in graph.walk():
        found += node.results
        found += [v for g in node.graphs for v in g.inputs]
    return {v: i for i, v in enumerate(found)}


def _last_node(graph: Graph, observers: Mapping[Value, Observer]) -> Node | None:
    """The last node of the outer graph that must be run; None when only inputs are observed."""
    last = None
    for node in graph.nodes:
        inner = (r for g in node.graphs for n in g.walk() for r in n.results)
        if any(v in observers for v in (*node.results, *inner)):
            last = node
    return last


# Padding


def padding_mask(graph: Graph) -> Value | None:
    """The input that says which tokens are padding: `attention_mask`, 1 where there is a token."""
    for v in graph.inputs:
        named = v.name.endswith("attention_mask") and isinstance(v.type, TensorType)
        if named and v.tensor_type.rank == 2 and not v.tensor_type.dtype.is_float:
            return v
    return None


def is_by_token(v: Value, mask: Value | None) -> bool:
    """Whether the first two sizes of a value count the mask's sentences and tokens."""
    if mask is None or not isinstance(v.type, TensorType) or v is mask:
        return False
    return v.type.rank > 2 and v.type.shape[:2] == mask.tensor_type.shape


# The journal


class _Entry:
    """What was observed so far, and a digest of the batches that it was observed on."""

    def __init__(self, journal: Journal, key: str, observers: Mapping[str, Observer]) -> None:
        self.journal = journal
        self.key = key
        self.observers = observers
        self.batches = 0
        self.kept = 0  # of the batches, those that the journal has
        self.chain = ""

    def resume(self, batches: Iterable[Sequence[Any]]) -> int:
        """Load what was observed before on the same batches; how many those were."""
        found = self.journal.read(self.key)
        if found is None:
            return 0
        words, tensors = found
        wanted, chain = int(words["batches"]), ""
        for number, batch in enumerate(batches, 1):
            chain = _chained(chain, batch)
            if number == wanted:
                break
        if chain != words["chain"]:
            self.journal.drop(self.key)
            return 0
        for name, observer in self.observers.items():
            prefix = f"{name}/"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            observer.load(own)
        self.batches = self.kept = wanted
        self.chain = chain
        return wanted

    def seen(self, batch: Sequence[Any], number: int) -> None:
        self.batches, self.chain = number, _chained(self.chain, batch)
        if self.journal.is_due(self.key):
            self.save()

    def save(self, finished: bool = False) -> None:
        tensors = {
            f"{name}/{k}": t for name, o in self.observers.items() for k, t in o.state().items()
        }
        words = {"batches": str(self.batches), "chain": self.chain, "finished": str(finished)}
        self.journal.write(self.key, words, tensors)
        self.kept = self.batches


def _chained(chain: str, batch: Sequence[Any]) -> str:
    """The digest of a batch and of all before it."""
    import torch

    from dfc.ir.weights import tensor_sha256

    parts = [tensor_sha256(x) if isinstance(x, torch.Tensor) else repr(x) for x in batch]
    return hashlib.sha256("\n".join([chain, *parts]).encode()).hexdigest()


__all__ = ["Batches", "Observer", "batches_of", "observe"]
