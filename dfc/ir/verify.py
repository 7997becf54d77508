"""Whether a graph is valid: structure always, types where something changed.

Structure (order, names, uses, symbols) is one cheap walk. Types are checked by running each op's
type rule with the symbols bound to sample numbers, which is independent of symbolic inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dfc.errors import DfcError, Diagnostic
from dfc.ir.expr import Expr, evaluate, symbols
from dfc.ir.graph import RESULT, Graph, Node, Parameter, Value
from dfc.ir.op import OpInfo, OpRefused, lookup
from dfc.ir.tree import leaf_count
from dfc.ir.types import ScalarType, TensorType, Type

_MAX_REPORTED = 20
# What type rules and PyTorch's fake kernels raise for operands that do not fit.
_REFUSALS = (
    OpRefused, RuntimeError, TypeError, ValueError, IndexError, AssertionError, ArithmeticError,
)  # fmt: skip


def infer_types(node: Node) -> tuple[Type, ...]:
    """The node's result types by its op's type rule.

    Raises:  DfcError V010 for an unknown op, V020 when the rule refuses the operands.
    """
    info = lookup(node.op)
    try:
        return info.infer(node)
    except _REFUSALS as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        shown = ", ".join(str(v.type) for v in node.operands)
        raise DfcError(
            "V020",
            f"`{node.op}` refuses ({shown}): {reason}",
            notes=(f"traced from {node.loc}",) if node.loc else (),
        ) from e


def verify(graph: Graph, *, types: bool | Iterable[Node] = True) -> None:
    """Check a graph; with `types`, check the type rule of every node, or of those given.

    Raises:  DfcError V001..V009 for structure, V010..V021 for ops and types; every error at once.
    """
    found: list[Diagnostic] = []
    for problem in _structure(graph, frozenset()):
        found.append(problem)
        if len(found) >= _MAX_REPORTED:
            break
    if not found and types is not False:
        nodes = graph.walk() if types is True else types
        for problem in _types(nodes, sample_bindings(graph), _decided_by_data(graph)):
            found.append(problem)
            if len(found) >= _MAX_REPORTED:
                break
    if found:
        raise DfcError.of(found)


def _problem(code: str, node: Node | None, message: str, help: str | None = None) -> Diagnostic:
    if node is None:
        return Diagnostic(code, message)
    name = node.results[0].name if node.results else node.op
    notes = (f"node %{name}, traced from {node.loc}",) if node.loc else (f"node %{name}",)
    return Diagnostic(code, f"`{node.op}`: {message}", help=help, notes=notes)


def _structure(graph: Graph, outer: frozenset[str]) -> Iterator[Diagnostic]:
    defined: set[Value] = set(graph.inputs)
    defined.update(graph.parameters.values())
    names: set[str] = set()
    bound = set(outer)
    for v in graph.inputs:
        if v.name in names:
            yield _problem("V002", None, f"two values are called %{v.name}")
        names.add(v.name)
        bound |= v.type.symbols
        if isinstance(v.type, ScalarType):
            bound.add(v.name)
    for p in graph.parameters.values():
        bound |= p.type.symbols
    nested: set[str] = set()
    count = 0
    for node in graph.nodes:
        count += 1
        if node.graph is not graph:
            yield _problem("V003", node, "the node belongs to another graph")
        yield from _operands(node, defined)
        free = node.symbols - bound
        if free:
            yield _problem("V005", node, f"the size `{min(free)}` is used before it is bound")
        bound.update(b.symbol for b in node.binds)
        for r in node.results:
            if r.node is not node:
                yield _problem("V003", node, f"%{r.name} says it is the result of {r.node}")
            if r.name in names:
                yield _problem("V002", node, f"two values are called %{r.name}")
            names.add(r.name)
            free = r.type.symbols - bound
            if free:
                yield _problem("V005", node, f"%{r.name} has the size `{min(free)}`, never bound")
            defined.add(r)
        if node.stage is not None and node.stage < 0:
            yield _problem("V006", node, f"stage {node.stage} is negative")
        for inner in node.graphs:
            if inner.name in nested:
                yield _problem("V002", node, f"two nested graphs are called @{inner.name}")
            nested.add(inner.name)
            yield from _structure(inner, frozenset(bound))
    if count != len(graph):
        yield _problem("V003", None, f"the graph says {len(graph)} nodes and holds {count}")
    yield from _operands(graph.result, defined)
    if leaf_count(graph.output_tree) != len(graph.outputs):
        yield _problem("V007", None, f"the outputs do not fit their structure in @{graph.name}")
    if graph.arguments and sum(leaf_count(a.tree) for a in graph.arguments) != len(graph.inputs):
        yield _problem("V007", None, f"the inputs do not fit the arguments of @{graph.name}")
    for m in graph.mutations:
        if not isinstance(m.target, Parameter) and m.target not in graph.inputs:
            yield _problem("V008", None, f"%{m.target.name} is mutated and is no input")
        if m.target.type != m.value.type and not _same_at_samples(m.target.type, m.value.type):
            yield _problem(
                "V008", None, f"{m.target!r} is mutated by a value of another type, {m.value!r}"
            )


def _operands(node: Node, defined: set[Value]) -> Iterator[Diagnostic]:
    seen: dict[Value, int] = {}
    for v in node.operands:
        seen[v] = seen.get(v, 0) + 1
        if v not in defined:
            what = "the outputs read" if node.op == RESULT else "the node reads"
            yield _problem("V001", node, f"{what} %{v.name} before it is computed")
    for v, n in seen.items():
        if v._users.get(node) != n:
            yield _problem("V004", node, f"%{v.name} counts its uses wrongly")


def sample_bindings(graph: Graph) -> dict[str, int]:
    """A number for each symbol of the graph and of its nested graphs."""
    from dfc.ops.symbolic import sample_sizes

    ranges = dict(graph.ranges)
    for node in graph.walk():
        for b in node.binds:
            ranges[b.symbol] = (b.low or 0, b.high)
        for inner in node.graphs:
            for name, bounds in inner.ranges.items():
                ranges.setdefault(name, bounds)
            for v in inner.inputs:
                for name in v.type.symbols:
                    ranges.setdefault(name, (0, None))
    for v in graph.inputs:
        for name in v.type.symbols:
            ranges.setdefault(name, (0, None))
    types = [v.type for v in (*graph.inputs, *graph.parameters.values())]
    fixed = {n for t in types if isinstance(t, TensorType) for n in t.shape if isinstance(n, int)}
    return sample_sizes(ranges, graph.requires, fixed)


def _same_at_samples(a: Type, b: Type) -> bool:
    if not isinstance(a, TensorType) or not isinstance(b, TensorType):
        return a == b
    names = {s: (2, None) for s in a.symbols | b.symbols}
    from dfc.ops.symbolic import sample_sizes

    sizes = sample_sizes(names)
    return a.substitute(sizes) == b.substitute(sizes)


def _decided_by_data(graph: Graph) -> frozenset[str]:
    """Symbols that nodes bind: sample numbers for them would break what ties them together."""
    found = {b.symbol for node in graph.walk() for b in node.binds}
    for node in graph.walk():
        for inner in node.graphs:
            found.update(v.name for v in inner.inputs if isinstance(v.type, ScalarType))
    return frozenset(found)


def _types(
    nodes: Iterable[Node], bindings: Mapping[str, int], unknown: frozenset[str]
) -> Iterator[Diagnostic]:
    from dfc.ops.aten_types import sample_types, waits_for_data

    nodes, told = list(nodes), set[str]()
    for node in nodes:
        try:
            info = lookup(node.op)
        except DfcError as e:
            if node.op not in told:
                told.add(node.op)
                yield _unknown(node, e, sum(n.op == node.op for n in nodes) - 1)
            continue
        if unknown and not unknown.isdisjoint(_symbols(node)):
            continue
        try:
            problem = _form(node, info)
            if problem is not None:
                yield problem
                continue
            found = sample_types(node, bindings) if node.op.startswith("aten.") else None
            if found is None:
                if node.binds or not node.results or node.graphs:
                    continue
                found = tuple(t.substitute(bindings) for t in info.infer(node))
        except DfcError as e:
            yield _problem(e.code, node, e.message, e.diagnostics[0].help)
            continue
        except _REFUSALS as e:
            if waits_for_data(e):
                continue  # what is declared stands
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            shown = ", ".join(str(v.type) for v in node.operands)
            yield _problem("V020", node, f"refuses ({shown}): {reason}")
            continue
        declared = tuple(r.type.substitute(bindings) for r in node.results)
        if len(found) != len(declared):
            yield _problem(
                "V021", node, f"gives {len(found)} results, the graph says {len(declared)}"
            )
            continue
        for r, t, d in zip(node.results, found, declared, strict=True):
            if not _fits(t, d):
                yield _problem("V021", node, f"%{r.name} is {r.type}, its op gives {t}")


def _unknown(node: Node, error: DfcError, others: int) -> Diagnostic:
    """An op that there is not, told once for all nodes that have it."""
    found = _problem(error.code, node, error.message, error.diagnostics[0].help)
    if not others:
        return found
    more = f"{others} more node{'s have' if others > 1 else ' has'} it"
    return replace(found, notes=(*found.notes, more))


def _symbols(node: Node) -> frozenset[str]:
    values = (*node.operands, *node.results)
    return node.symbols.union(*(v.type.symbols for v in values))


def _form(node: Node, info: OpInfo) -> Diagnostic | None:
    """Whether the node has the operands and attributes that its op names, and no others."""
    operands = info.operands
    if len(node.inputs) != len(operands):
        reason = f"takes {len(operands)} operands, got {len(node.inputs)}"
        return _problem("V012", node, f"{reason}; one that is left out is written `None`")
    for o, x in zip(operands, node.inputs, strict=True):
        if x is None and not o.optional and o.name not in node.attributes:
            return _problem("V012", node, f"needs the operand `{o.name}`")
        if isinstance(x, tuple) != o.variadic and x is not None:
            kind = "a list" if o.variadic else "one value"
            return _problem("V012", node, f"the operand `{o.name}` is {kind}")
    numbers = {o.name for o in operands}  # a Python number may stand for an operand
    known = {a.name for a in info.attributes}
    for name in node.attributes:
        if name not in known and name not in numbers:
            return _problem("V011", node, f"has no attribute `{name}`")
    for name in known - set(node.attributes):
        return _problem("V011", node, f"needs the attribute `{name}`")
    return None


def _fits(found: Type, declared: Type) -> bool:
    """Equal, where sizes that still hold symbols are taken to agree."""
    if not isinstance(found, TensorType) or not isinstance(declared, TensorType):
        return found == declared
    if found.dtype != declared.dtype or found.rank != declared.rank:
        return False
    return all(
        a == b or isinstance(a, Expr) or isinstance(b, Expr)
        for a, b in zip(found.shape, declared.shape, strict=True)
    )


__all__ = ["evaluate", "infer_types", "sample_bindings", "symbols", "verify"]
