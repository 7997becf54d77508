"""The graph: typed values, nodes in order, named parameters, and the only way to change them.

Nodes form a doubly linked list, so inserting and erasing are O(1) in graphs of any size; each
value knows its users. The graph's outputs are the operands of one hidden node, `graph.result`, so
that "used by an output" is an ordinary use. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.ir.attributes import NO_ATTRIBUTES, Attributes, attribute_key
from dfc.ir.expr import Scalar
from dfc.ir.node import Bind, HashOnly, Input, Loc, Node, Parameter, ParameterData, Value
from dfc.ir.tree import LEAF, Leaf, Seq, Tree
from dfc.ir.types import TensorType, Type

if TYPE_CHECKING:
    import networkx
    import torch

__all__ = [
    "RESULT", "Argument", "Attributes", "Bind", "Graph", "HashOnly", "Input", "Loc", "Mutation",
    "Node", "Parameter", "ParameterData", "Range", "Value", "attribute_key", "map_input",
]  # fmt: skip

RESULT = "dfc.return"
Range = tuple[int, int | None]
_UNFIT = re.compile(r"(?!^\.)[^A-Za-z0-9_]")  # in the name of a value, as text has it


@dataclass(frozen=True)
class Argument:
    """One argument of the call: its name and its structure."""

    name: str
    tree: Tree
    keyword_only: bool = False


@dataclass(frozen=True)
class Mutation:
    """A parameter or input whose final value is an extra output."""

    target: Value
    value: Value


@dataclass
class Graph:
    """A function from inputs and parameters to outputs.

    C1:  every operand is an input, a parameter, or a result of an earlier node.
    C2:  value names are unique; so are parameter names.
    C3:  every symbol is bound by an input's shape or by an earlier node, or, in a nested graph,
         by the graph around it.
    """

    name: str = "main"
    arguments: tuple[Argument, ...] = ()
    output_tree: Tree = field(default_factory=lambda: LEAF)
    ranges: dict[str, Range] = field(default_factory=dict)
    requires: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        self._inputs: list[Value] = []
        self._parameters: dict[str, Parameter] = {}
        self._first: Node | None = None
        self._last: Node | None = None
        self._count = 0
        self._names: set[str] = set()
        self._least: dict[str, int] = {}  # wish -> no smaller number is free behind it
        self._targets: tuple[Value, ...] = ()
        # What capture wants the user to know: restrictions, another way taken. No part of equality.
        self.notes: list[str] = []
        # What the captured code says of its gradients itself, and nodes do not. No part of text.
        self.own_gradients: tuple[str, ...] = ()
        # The model it was captured from, a `capture.original.Original`: its copies have none.
        self.original: Any = None
        self.result = Node(self, RESULT, (), NO_ATTRIBUTES)

    # reading

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(self._inputs)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    @property
    def nodes(self) -> Iterator[Node]:
        """The nodes in order. While iterating, the current one may be erased, others inserted."""
        node = self._first
        while node is not None:
            following = node._next
            yield node
            if node.graph is self:
                following = node._next
            while following is not None and following.graph is not self:
                following = following._next
            node = following

    @property
    def reversed_nodes(self) -> Iterator[Node]:
        """The nodes from last to first, under the same licence."""
        node = self._last
        while node is not None:
            previous = node._prev
            yield node
            if node.graph is self:
                previous = node._prev
            while previous is not None and previous.graph is not self:
                previous = previous._prev
            node = previous

    def __len__(self) -> int:
        return self._count

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The values of the output tree's leaves, in order."""
        return self.result.inputs[: len(self.result.inputs) - len(self._targets)]  # type: ignore[return-value]

    @property
    def mutations(self) -> tuple[Mutation, ...]:
        values = self.result.inputs[len(self.result.inputs) - len(self._targets) :]
        return tuple(
            Mutation(t, v)  # type: ignore[arg-type]
            for t, v in zip(self._targets, values, strict=True)
        )

    def walk(self) -> Iterator[Node]:
        """Every node, those of nested graphs too, outer before inner."""
        pending: list[Graph] = [self]
        while pending:
            graph = pending.pop()
            for node in graph.nodes:
                yield node
                pending.extend(node.graphs)

    def is_output(self, value: Value) -> bool:
        return self.result in value._users

    # building

    def fresh_name(self, wish: str | None = None) -> str:
        """A value name that is not taken: the wish, the wish with a number, or a number.

        Ensures:  text can hold it: a wish may come from a parameter, whose names have dots.
        """
        wish = _UNFIT.sub("_", wish or "")
        if wish and wish not in self._names:
            return wish
        prefix = f"{wish}_" if wish else ""
        n = self._least.get(prefix, 1 if wish else 0)
        while f"{prefix}{n}" in self._names:
            n += 1
        self._least[prefix] = n
        return f"{prefix}{n}"

    def _claim(self, name: str) -> str:
        assert name not in self._names, f"the name %{name} is taken"
        self._names.add(name)
        return name

    def _release(self, name: str) -> None:
        """Let a name be given again: names do not depend on what was there before."""
        self._names.discard(name)
        digits = len(name) - len(name.rstrip("0123456789"))
        if 0 < digits < 10:
            prefix, n = name[:-digits], int(name[-digits:])
            if n < self._least.get(prefix, 0) and (prefix or str(n) == name):
                self._least[prefix] = n

    def add_input(self, name: str, type: Type) -> Value:
        """Append an input; the caller sets `arguments` to match."""
        value = Value(self._claim(name), type)
        self._inputs.append(value)
        return value

    def add_parameter(
        self,
        name: str,
        type: TensorType,
        kind: str = "parameter",
        data: ParameterData | None = None,
        aliases: tuple[str, ...] = (),
    ) -> Parameter:
        assert name not in self._parameters, f"the parameter !{name} exists"
        self._parameters[name] = Parameter(name, type, kind, data, aliases)
        return self._parameters[name]

    def add_constant(self, wish: str, tensor: torch.Tensor) -> Parameter:
        """Append a parameter with these numbers, by the wished name or the next free one."""
        from dfc.ir.weights import TensorData

        name, n = wish, 1
        while name in self._parameters:
            name, n = f"{wish}.{n}", n + 1
        data = TensorData(name, tensor)
        return self.add_parameter(name, TensorType.of(tensor), "constant", data)

    def drop_parameter(self, name: str) -> None:
        """Forget a parameter that nothing reads."""
        assert not self._parameters[name]._users, f"!{name} is still used"
        del self._parameters[name]

    def add(
        self,
        op: str,
        inputs: Sequence[Input],
        attributes: Mapping[str, Any] | None = None,
        *,
        types: Sequence[Type] | None = None,
        names: Sequence[str | None] = (),
        before: Node | None = None,
        graphs: Sequence[Graph] = (),
        binds: Sequence[Bind] = (),
        stage: int | None = None,
        loc: Loc | None = None,
    ) -> Node:
        """Insert a node before another (default: at the end). Without `types` they are inferred.

        Raises:  DfcError V010 for an unknown op, V020 when the type rule refuses the operands.
        """
        frozen = tuple(tuple(x) if isinstance(x, (list, tuple)) else x for x in inputs)
        given = attributes if isinstance(attributes, Attributes) else Attributes(attributes or {})
        node = Node(self, op, frozen, given, tuple(graphs), tuple(binds), stage, loc)
        if types is None:
            from dfc.ir.verify import infer_types

            types = infer_types(node)
        values = []
        for i, type in enumerate(types):
            wish = names[i] if i < len(names) else None
            values.append(Value(self._claim(self.fresh_name(wish)), type, node, i))
        node.results = tuple(values)
        self._link(node, before)
        self._use(node)
        return node

    def _link(self, node: Node, before: Node | None) -> None:
        if before is None:
            node._prev = self._last
            if self._last is None:
                self._first = node
            else:
                self._last._next = node
            self._last = node
        else:
            assert before.graph is self, "the anchor is not in this graph"
            node._prev, node._next = before._prev, before
            if before._prev is None:
                self._first = node
            else:
                before._prev._next = node
            before._prev = node
        self._count += 1

    def _unlink(self, node: Node) -> None:
        if node._prev is None:
            self._first = node._next
        else:
            node._prev._next = node._next
        if node._next is None:
            self._last = node._prev
        else:
            node._next._prev = node._prev
        self._count -= 1

    @staticmethod
    def _use(node: Node) -> None:
        for v in node.operands:
            v._users[node] = v._users.get(node, 0) + 1

    @staticmethod
    def _unuse(node: Node) -> None:
        for v in node.operands:
            v._users[node] -= 1
            if not v._users[node]:
                del v._users[node]

    # changing

    def set_outputs(
        self,
        values: Sequence[Value],
        tree: Tree | None = None,
        mutations: Sequence[tuple[Value, Value]] = (),
    ) -> None:
        """Say what the graph returns. The default tree is the value alone, or a tuple of them."""
        self._unuse(self.result)
        self._targets = tuple(t for t, _ in mutations)
        self.result.inputs = (*values, *(v for _, v in mutations))
        self._use(self.result)
        if tree is None:
            tree = LEAF if len(values) == 1 else Seq("tuple", tuple(Leaf() for _ in values))
        self.output_tree = tree

    def set_inputs_of(self, node: Node, inputs: Sequence[Input]) -> None:
        """Give a node other operands."""
        self._unuse(node)
        node.inputs = tuple(tuple(x) if isinstance(x, (list, tuple)) else x for x in inputs)
        self._use(node)

    def set_attributes(self, node: Node, **changes: Any) -> None:
        node.attributes = node.attributes.with_(**changes)

    def set_stage(self, node: Node, stage: int | None) -> None:
        node.stage = stage

    def set_type(self, value: Value, type: Type) -> None:
        value.type = type

    def replace_uses(
        self, old: Value, new: Value, where: Callable[[Node], bool] | None = None
    ) -> int:
        """Let every user of one value read another instead; say how many nodes changed."""
        if old is new:
            return 0
        users = [u for u in old._users if where is None or where(u)]
        for user in users:
            count = old._users.pop(user)
            user.inputs = tuple(
                tuple(new if v is old else v for v in x)
                if isinstance(x, tuple)
                else new
                if x is old
                else x
                for x in user.inputs
            )
            new._users[user] = new._users.get(user, 0) + count
        return len(users)

    def replace(self, node: Node, by: Node | Value | Sequence[Value]) -> None:
        """Let the users of a node read another's results, or other values, and erase it."""
        values = by.results if isinstance(by, Node) else (by,) if isinstance(by, Value) else by
        for old, new in zip(node.results, values, strict=True):
            self.replace_uses(old, new)
        self.erase(node)

    def erase(self, node: Node) -> None:
        """Remove a node that nobody uses."""
        assert node.graph is self, f"{node} is not in this graph"
        used = [r for r in node.results if r._users]
        assert not used, f"{node} is still used: {used}"
        self._unuse(node)
        self._unlink(node)
        for r in node.results:
            self._release(r.name)
        node.graph = None

    def move_before(self, node: Node, anchor: Node) -> None:
        """Change a node's place in the order."""
        self._unlink(node)
        node._prev = node._next = None
        self._link(node, anchor)

    def rename(self, value: Value, name: str) -> None:
        if isinstance(value, Parameter):
            assert name not in self._parameters, name
            value.name = name
            self._parameters = {p.name: p for p in self._parameters.values()}
            return
        self._release(value.name)
        value.name = self._claim(name)

    def become(self, other: Graph) -> None:
        """Take over all that another graph is made of; the other is none any more."""
        nodes, inputs, result = list(other.nodes), other.result.inputs, self.result
        self._unuse(other.result)
        self.__dict__.update(other.__dict__)
        self.result = (
            result  # the same node as before: it stands for the outputs, whatever they are
        )
        result.inputs = inputs
        self._use(result)
        for node in nodes:
            node.graph = self

    def __deepcopy__(self, memo: object) -> Graph:
        """A copy; nodes are linked, and one after the other would be too deep for Python."""
        return self.copy()

    def copy(self) -> Graph:
        """An independent graph that shares the parameters' data."""
        other, _ = self.copy_with_map()
        return other

    def copy_with_map(self) -> tuple[Graph, dict[Value, Value]]:
        """A copy, and which value of it stands for which of ours."""
        other = Graph(self.name, self.arguments, self.output_tree, dict(self.ranges), self.requires)
        other.notes += self.notes
        other.own_gradients = self.own_gradients
        twin: dict[Value, Value] = {}
        for v in self._inputs:
            twin[v] = other.add_input(v.name, v.type)
        for p in self._parameters.values():
            twin[p] = other.add_parameter(p.name, p.type, p.kind, p.data, p.aliases)  # type: ignore[arg-type]
        for node in self.nodes:
            copied = other.add(
                node.op,
                [map_input(x, twin) for x in node.inputs],
                node.attributes,
                types=[r.type for r in node.results],
                names=[r.name for r in node.results],
                graphs=[g.copy() for g in node.graphs],
                binds=node.binds,
                stage=node.stage,
                loc=node.loc,
            )
            twin.update(zip(node.results, copied.results, strict=True))
        other.set_outputs(
            [twin[v] for v in self.outputs],
            self.output_tree,
            [(twin[m.target], twin[m.value]) for m in self.mutations],
        )
        return other, twin

    # identity and views

    def __eq__(self, other: object) -> bool:
        """Same structure, types, attributes and weights; value names and locations do not count."""
        from dfc.ir.printer import canonical_text

        return isinstance(other, Graph) and (
            self is other or canonical_text(self) == canonical_text(other)
        )

    __hash__ = None  # type: ignore[assignment]

    def fingerprint(self) -> str:
        """sha256 of the canonical text: equal graphs have equal fingerprints."""
        import hashlib

        from dfc.ir.printer import canonical_text

        return hashlib.sha256(canonical_text(self).encode()).hexdigest()

    def __str__(self) -> str:
        from dfc.ir.printer import print_graph

        return print_graph(self)

    def __repr__(self) -> str:
        inputs = counted(len(self._inputs), "input")
        return f"<graph @{self.name}: {inputs}, {counted(self._count, 'node')}>"

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The analysis view: nodes are `Node` objects, edges carry the `value` that flows.

        The hidden result node is in it; inputs and parameters are not (they have no node).
        """
        import networkx

        view = networkx.MultiDiGraph()
        view.add_nodes_from(self.nodes)
        view.add_node(self.result)
        for value in (r for n in self.nodes for r in n.results):
            for user, count in value._users.items():
                for _ in range(count):
                    view.add_edge(value.node, user, value=value)
        return view


def map_input(x: Input, twin: Mapping[Value, Value]) -> Input:
    """An operand with its values replaced."""
    if isinstance(x, tuple):
        return tuple(None if v is None else twin[v] for v in x)
    return None if x is None else twin[x]
