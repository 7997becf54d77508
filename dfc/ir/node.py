"""What a graph consists of: typed values, which know their users, and the nodes that make them.

Nothing here changes anything: `Graph` alone does. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.attributes import Attributes
from dfc.ir.op import OpInfo, lookup
from dfc.ir.types import TensorType, Type

if TYPE_CHECKING:
    import torch

    from dfc.ir.graph import Graph


@dataclass(frozen=True)
class Loc:
    """Where a node comes from: Python file and line, and the module path. No part of equality."""

    file: str = ""
    line: int = 0
    module: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown place"
        return f"{place} ({self.module})" if self.module else place


@dataclass(frozen=True)
class Bind:
    """A symbol that a node gives a value to, and the range the value lies in (None: unbounded)."""

    symbol: str
    low: int | None = None
    high: int | None = None


class Value:
    """A typed result of a node, an input, or a parameter. Its users are kept by the graph."""

    __slots__ = ("_users", "index", "name", "node", "type")

    def __init__(self, name: str, type: Type, node: Node | None = None, index: int = 0) -> None:
        self.name = name
        self.type = type
        self.node = node
        self.index = index
        self._users: dict[Node, int] = {}

    @property
    def users(self) -> tuple[Node, ...]:
        """The nodes that read the value, each once, in the order of first use."""
        return tuple(self._users)

    @property
    def use_count(self) -> int:
        """How often the value is read, counting each operand."""
        return sum(self._users.values())

    @property
    def tensor_type(self) -> TensorType:
        """The type, for a value that is known to be a tensor."""
        assert isinstance(self.type, TensorType), f"%{self.name} is {self.type}, not a tensor"
        return self.type

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Parameter(Value):
    """A named tensor that the model owns: a parameter, a buffer, or a lifted constant.

    A parameter that asks for no gradient (`requires_grad_(False)`) is of the kind "frozen".
    `data` is anything with `tensor()` and `sha256()`, or None for a model without weights.
    """

    __slots__ = ("aliases", "data", "kind")

    def __init__(
        self,
        name: str,
        type: TensorType,
        kind: str = "parameter",
        data: ParameterData | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name, type)
        self.kind = kind
        self.data = data
        self.aliases = aliases

    def __repr__(self) -> str:
        return f"!{self.name}: {self.type}"


class ParameterData:
    """Where a parameter's numbers are."""

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    def sha256(self) -> str:
        """The digest of dtype, shape and bytes: 64 hex digits."""
        raise NotImplementedError


@dataclass(frozen=True)
class HashOnly(ParameterData):
    """Data that is known by its digest alone: a graph read from text."""

    digest: str

    def tensor(self) -> torch.Tensor:
        from dfc.errors import DfcError

        raise DfcError(
            "D001",
            "the graph was read from text and has no weights",
            help="load the package that it came from",
        )

    def sha256(self) -> str:
        return self.digest


Input = Value | None | tuple[Value | None, ...]


class Node:
    """One application of an op. Everything is read-only; change it through the graph."""

    __slots__ = (
        "_next", "_prev", "attributes", "binds", "graph", "graphs",
        "inputs", "loc", "op", "results", "stage",
    )  # fmt: skip

    def __init__(
        self,
        graph: Graph,
        op: str,
        inputs: tuple[Input, ...],
        attributes: Attributes,
        graphs: tuple[Graph, ...] = (),
        binds: tuple[Bind, ...] = (),
        stage: int | None = None,
        loc: Loc | None = None,
    ) -> None:
        self.graph: Graph | None = graph
        self.op = op
        self.inputs = inputs
        self.attributes = attributes
        self.graphs = graphs
        self.binds = binds
        self.stage = stage
        self.loc = loc
        self.results: tuple[Value, ...] = ()
        self._prev: Node | None = None
        self._next: Node | None = None

    @property
    def info(self) -> OpInfo:
        return lookup(self.op)

    @property
    def pure(self) -> bool:
        """Equal inputs give equal results: twins may be merged, constant ones folded."""
        return lookup(self.op).is_pure(self.attributes)

    @property
    def effect(self) -> bool:
        """The node must stay, in its order, even when nobody reads its results."""
        if self.graphs:
            return any(node.effect for g in self.graphs for node in g.walk() if not node.graphs)
        return lookup(self.op).has_effect(self.attributes)

    @property
    def operands(self) -> Iterator[Value]:
        """Every value that is read, lists flattened, None left out."""
        for x in self.inputs:
            if isinstance(x, tuple):
                yield from (v for v in x if v is not None)
            elif x is not None:
                yield x

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def users(self) -> tuple[Node, ...]:
        """The nodes that read any result, each once."""
        return tuple(dict.fromkeys(u for r in self.results for u in r._users))

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols that the attributes mention."""
        return self.attributes.symbols

    def __repr__(self) -> str:
        names = ", ".join(f"%{r.name}" for r in self.results)
        return f"<{names} = {self.op}>" if names else f"<{self.op}>"
