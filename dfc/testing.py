"""For those who write passes and ops: one call that holds a pass, or an op, to what it says.

check_op(SwiGlu)                                # in a test of yours; raises AssertionError
check_pass(MergeHeads(limit=3), model, args)    # gives how many changes it made
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.op import DeclaredOp, Op, OpRefused, full_name, lookup
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType

if TYPE_CHECKING:
    import torch

    from dfc.rewrite.pass_ import Pass

SIZES = {"B": 2, "S": 3, "K": 64, "D": 8}  # what symbolic sizes of cases are, when they are run


# Cases of ops


class Case:
    """`x=f32[3,64] packed=u8[16,32] group=32`: operand types in order, and attributes."""

    def __init__(self, info: DeclaredOp, text: str, label: str = "") -> None:
        self.info, self.text, self.label = info, text, label
        given = dict(word.split("=", 1) for word in text.split())
        self.names = [o.name for o in info.operands]
        self.types = [parse_type(given.pop(n)) if n in given else None for n in self.names]
        self.attributes = {a.name: a.default for a in info.attributes}
        for name, value in given.items():
            assert name in self.attributes, f"{info.name} has neither operand nor attribute {name}"
            self.attributes[name] = ast.literal_eval(value)

    def __str__(self) -> str:
        return f"{self.info.name} {self.label} {self.text}"

    @property
    def op(self) -> Any:
        return self.info.instance(self.attributes)

    @property
    def symbols(self) -> set[str]:
        return {s for t in self.types if t for s in t.symbols}

    @property
    def static(self) -> list[TensorType | None]:
        return [t and t.substitute(SIZES) for t in self.types]

    def arrays(self, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor | None]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        made = [random_tensor(t, generator, scale) if t else None for t in self.static]
        ascend = (n == "ends" for n in self.names)  # of runs of rows
        return [t.sort().values if a and t is not None else t
                for t, a in zip(made, ascend, strict=True)]  # fmt: skip

    def graph(self) -> Graph:
        """A graph that is the op alone; absent operands in the middle are None."""
        graph = Graph("op", ranges={s: (1, None) for s in sorted(self.symbols)})
        given = zip(self.names, self.types, strict=True)
        values = [graph.add_input(n, t) if t else None for n, t in given]
        graph.arguments = tuple(Argument(v.name, LEAF) for v in graph.inputs)
        node = graph.add(self.info.name, values, self.attributes)
        graph.set_outputs(node.results)
        return graph


def parse_type(text: str) -> TensorType:
    """`f32[B, 2*S]`, without the blank."""
    found = re.fullmatch(r"(\w+)\[(.*)\]", text)
    assert found and found[1] in DTYPES, f"`{text}` is no type such as f32[2,3]"
    sizes = [_size(s) for s in found[2].split(",")] if found[2] else []
    return TensorType(DTYPES[found[1]], tuple(sizes))


def _size(text: str) -> Any:
    """`7`, `B`, `2*S` or `S+1`."""
    if text.isdigit():
        return int(text)
    factor, _, name = text.rpartition("*")
    name, _, more = name.partition("+")
    return symbol(name) * int(factor or 1) + int(more or 0)


def random_tensor(t: TensorType, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    import torch

    shape = [int(s) for s in t.shape]  # type: ignore[arg-type]
    if t.dtype.is_float:
        return (torch.randn(shape, generator=generator) * scale).to(t.dtype.to_torch())
    high = 256 if t.dtype.name == "u8" else 4  # positions: the caches of the cases have more rows
    return torch.randint(0, high, shape, generator=generator).to(t.dtype.to_torch())


# An op


def check_op(op: type[Op], *, onnx: bool = True) -> None:
    """Hold an op to its declaration: constraints, type rule, meaning, decomposition, text, ONNX.

    Needs:   `cases`; and for each constraint `C1`, `C2`, ... of the docstring a `require` with that
             label and an entry of `rejects` that begins with it.
    Raises:  AssertionError that names the case and what differs. `onnx=False` is for an op that
             ONNX cannot express.
    """
    info = lookup(full_name(op))
    assert isinstance(info, DeclaredOp), f"`{full_name(op)}` is not declared: use `@dfc.op`"
    _labels(info)
    for text in info.cls.rejects:
        label, _, rest = text.partition(" ")
        _refuses(Case(info, rest, label))
    assert info.cls.cases, f'{info.name} has no cases: write cases = ("x=f32[2,3]",)'
    for text in info.cls.cases:
        case = Case(info, text)
        for check in (_types, _text, _decomposed, *((_in_onnx,) if onnx else ())):
            check(case)


def _labels(info: DeclaredOp) -> None:
    said = re.findall(r"^\s*(C\d+):", info.cls.__doc__ or "", re.MULTILINE)
    source = "".join(inspect.getsource(c) for c in info.cls.__mro__ if _is_theirs(c))
    required = re.findall(r'require\(\s*["\'](C\d+)["\']', source)
    refused = [text.split()[0] for text in info.cls.rejects]
    for label in sorted({*said, *required, *refused}):
        for where, labels in (("the docstring", said), ("a `require`", required),
                              ("`rejects`", refused)):  # fmt: skip
            assert label in labels, f"{info.name}: {label} is missing from {where}"


def _is_theirs(cls: type) -> bool:
    return cls not in (Op, object) and cls.__module__ != "dataclasses"


def _refuses(case: Case) -> None:
    try:
        case.op.infer(*case.types)
    except OpRefused as e:
        assert e.label == case.label, f"{case}: refused by {e.label} instead: {e}"
    else:
        raise AssertionError(f"{case}: not refused")


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _types(case: Case) -> None:
    """What `reference` gives has the types that `infer` says, for the symbolic sizes too."""
    results = _tuple(case.op.reference(*case.arrays()))
    for types in (case.static, case.types):
        said = [t.substitute(SIZES) for t in _tuple(case.op.infer(*types))]
        found = [TensorType.of(x) for x in results]
        assert said == found, f"{case}: `infer` says {said}, `reference` gives {found}"


def _text(case: Case) -> None:
    from dfc.lang.graph_parser import parse_graph

    graph = case.graph()
    assert parse_graph(str(graph)) == graph, f"{case}: the text reads back differently"


def _runs(case: Case) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """Inputs, the op's results and its witness's."""
    from dfc.ir.interpret import interpret

    graph = case.graph()
    for seed in range(3):
        arrays = [a for a in case.arrays(seed) if a is not None]
        yield arrays, interpret(graph, arrays), interpret(graph, arrays, double=True)


def _agree(case: Case, what: str, run: Callable[[list[Any]], Sequence[Any]]) -> None:
    from dfc.rewrite.agree import judge

    for arrays, original, witness in _runs(case):
        verdict = judge(list(run(arrays)), original, witness, rtol=1e-6)
        assert verdict.agrees, f"{case}: {what} differs from `reference`: {verdict.difference}"


def _decomposed(case: Case) -> None:
    from dfc.ir.interpret import interpret
    from dfc.ops.builder import decomposable
    from dfc.rewrite.pass_ import Context, find_pass

    if not decomposable(case.info.name):
        return
    graph = case.graph()
    find_pass("decompose").run(graph, Context())
    said, made = [[v.type for v in g.outputs] for g in (case.graph(), graph)]
    assert said == made, f"{case}: `infer` says {said}, `decompose` makes {made}"
    _agree(case, "`decompose`", lambda arrays: interpret(graph, arrays))


def _in_onnx(case: Case) -> None:
    from dfc.emit.onnx import build_onnx
    from dfc.emit.onnx_run import Session

    graph = case.graph()
    try:
        session = Session(build_onnx(graph), graph, threads=1)
    except DfcError as e:
        raise AssertionError(f"{case}: ONNX: {e.message}") from e
    _agree(case, "ONNX", session.run)


# A pass


def check_pass(
    p: Pass | str | type[Pass],
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    changes: int | None = None,
) -> int:
    """Hold a pass to its promises on a model: valid, proved on probes, deterministic, idempotent.

    Gives how many changes it made: `changes`, or at least one.
    Raises:  AssertionError; DfcError when the pass itself fails.
    """
    import dfc.api as api
    from dfc.rewrite.pass_ import Context, as_pass

    chosen = as_pass(p)
    graph = api.trace(model, args, kwargs, dynamic_shapes)
    once, twice = graph.copy(), graph.copy()
    made = chosen.run(once, Context())
    wanted = f"{changes}" if changes is not None else "at least 1"
    right = made == changes if changes is not None else made > 0
    assert right, f"`{chosen}` made {counted(made, 'change')} to the model, not {wanted}"
    assert chosen.run(twice, Context()) == made and str(once) == str(twice), (
        f"`{chosen}` is not deterministic: a second run on the same graph differs"
    )
    if chosen.idempotent:
        more = chosen.run(twice, Context())
        assert not more, f"`{chosen}` finds {more} more to do: say `idempotent = False` if it may"
    if not made:
        return 0
    try:
        api.compile(
            model, args, kwargs, dynamic_shapes, passes=[chosen], engine="eager", strict=True
        )
    except DfcError as e:
        if e.code[0] != "V":
            raise
        raise AssertionError(f"`{chosen}`: {e.message}") from e
    return made
