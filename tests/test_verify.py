"""Every way in which a graph can be broken is found, and named with node and source line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import dfc
import dfc.ops
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph, Loc, Node, Value
from dfc.ir.tree import LEAF, Seq
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from tests.random_graphs import random_graph

F32 = TensorType(DTYPES["f32"], (2, 3))
PLACE = Loc("net.py", 31, "blocks.0.mlp")
BREAKERS: list[tuple[str, str, Callable[[Graph], None]]] = []


def sound() -> Graph:
    graph = Graph(ranges={"B": (1, 8)})
    x = graph.add_input("x", F32)
    y = graph.add_input("y", TensorType(DTYPES["f32"], (symbol("B"), 3)))
    graph.arguments = (Argument("x", LEAF), Argument("y", LEAF))
    w = graph.add_parameter("w", F32, "buffer")
    given = {"dim": -1, "dtype": None}
    a = graph.add("aten.softmax.int", [x], given, names=["a"], loc=PLACE)
    b = graph.add("aten.add.Tensor", [a.result, w], {"alpha": 1}, names=["b"], loc=PLACE)
    graph.add("aten.neg.default", [y], names=["c"], loc=PLACE)
    graph.set_outputs([b.result], None, [(w, b.result)])
    return graph


def node(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if any(r.name == name for r in n.results))


def breaks(code: str, named: str) -> Callable[[Callable[[Graph], None]], Callable[[Graph], None]]:
    """Register what breaks a sound graph, the code it gives and what the message names."""

    def register(function: Callable[[Graph], None]) -> Callable[[Graph], None]:
        BREAKERS.append((code, named, function))
        return function

    return register


@breaks("V001", "%b")
def used_before_it_is_computed(g: Graph) -> None:
    g.move_before(node(g, "b"), node(g, "a"))


@breaks("V001", "%gone")
def used_from_nowhere(g: Graph) -> None:
    g.set_inputs_of(node(g, "b"), [Value("gone", F32), g.inputs[0]])


@breaks("V001", "%gone")
def returned_from_nowhere(g: Graph) -> None:
    g.set_outputs([Value("gone", F32)])


@breaks("V001", "!w")
def parameter_of_another_graph(g: Graph) -> None:
    other = sound().parameters["w"]
    other.name = "!w"
    g.set_inputs_of(node(g, "b"), [node(g, "a").result, other])


@breaks("V002", "%a")
def two_values_of_one_name(g: Graph) -> None:
    node(g, "b").results[0].name = "a"


@breaks("V002", "%x")
def two_inputs_of_one_name(g: Graph) -> None:
    g.inputs[1].name = "x"


@breaks("V002", "@body")
def nested_graph_of_two_nodes(g: Graph) -> None:
    inner = Graph("body")
    inner.set_outputs([inner.add_input("x", F32)], Seq("tuple", (LEAF,)))
    for _ in range(2):
        g.add("torch.map", [(g.inputs[0],)], {"xs": 1}, types=[F32], graphs=[inner])


@breaks("V003", "%a")
def node_of_another_graph(g: Graph) -> None:
    node(g, "a").graph = Graph()


@breaks("V003", "%b")
def result_of_another_node(g: Graph) -> None:
    node(g, "b").results[0].node = node(g, "a")


@breaks("V003", "4 nodes")
def lost_node(g: Graph) -> None:
    g._count += 1


@breaks("V004", "%a")
def uses_counted_wrongly(g: Graph) -> None:
    node(g, "a").result._users.clear()


@breaks("V005", "`S`")
def unbound_size_in_a_type(g: Graph) -> None:
    g.set_type(node(g, "a").result, TensorType(DTYPES["f32"], (symbol("S"), 3)))


@breaks("V005", "`S`")
def unbound_size_in_an_attribute(g: Graph) -> None:
    g.set_attributes(node(g, "a"), dim=symbol("S"))


@breaks("V006", "-1")
def negative_stage(g: Graph) -> None:
    g.set_stage(node(g, "a"), -1)


@breaks("V007", "outputs")
def outputs_without_structure(g: Graph) -> None:
    g.output_tree = Seq("tuple", (LEAF, LEAF))


@breaks("V007", "inputs")
def inputs_without_arguments(g: Graph) -> None:
    g.arguments = g.arguments[:1]


@breaks("V008", "%a")
def mutation_of_a_result(g: Graph) -> None:
    g.set_outputs([g.inputs[0]], None, [(node(g, "a").result, node(g, "b").result)])


@breaks("V008", "!w")
def mutation_by_another_type(g: Graph) -> None:
    g.set_outputs([g.inputs[0]], None, [(g.parameters["w"], node(g, "c").result)])


@breaks("V010", "aten.softmaxx.int")
def unknown_op(g: Graph) -> None:
    node(g, "a").op = "aten.softmaxx.int"


@breaks("V010", "os.system.default")
def unknown_namespace(g: Graph) -> None:
    node(g, "a").op = "os.system.default"


@breaks("V011", "`axis`")
def unknown_attribute(g: Graph) -> None:
    g.set_attributes(node(g, "a"), axis=1)


@breaks("V011", "`alpha`")
def missing_attribute(g: Graph) -> None:
    node(g, "b").attributes = node(g, "a").attributes.__class__()


@breaks("V012", "2 operands, got 1")
def missing_operand(g: Graph) -> None:
    g.set_inputs_of(node(g, "b"), [g.inputs[0]])


@breaks("V012", "`other`")
def absent_operand(g: Graph) -> None:
    g.set_inputs_of(node(g, "b"), [g.inputs[0], None])


@breaks("V012", "one value")
def list_for_one_operand(g: Graph) -> None:
    g.set_inputs_of(node(g, "b"), [g.inputs[0], (g.inputs[0],)])


@breaks("V020", "%b")
def operands_that_the_op_refuses(g: Graph) -> None:
    g.set_inputs_of(node(g, "b"), g.inputs)


@breaks("V021", "%b")
def wrong_dtype(g: Graph) -> None:
    g.set_type(node(g, "b").result, F32.with_dtype(DTYPES["f64"]))
    g.set_type(g.parameters["w"], F32.with_dtype(DTYPES["f64"]))
    g.set_type(node(g, "a").result, F32)
    node(g, "b").op = "aten.sub.Tensor"
    g.set_type(g.parameters["w"], F32)
    g.set_outputs([node(g, "b").result])


@breaks("V021", "%c")
def wrong_symbolic_size(g: Graph) -> None:
    g.set_type(node(g, "c").result, TensorType(DTYPES["f32"], (symbol("B") * 2, 3)))


@breaks("V021", "says 2")
def wrong_number_of_results(g: Graph) -> None:
    b = node(g, "b")
    b.results = (*b.results, Value("more", F32, b, 1))


def test_the_sound_graph_is_valid() -> None:
    verify(sound())


@pytest.mark.parametrize("code, named, breaker", BREAKERS, ids=lambda x: getattr(x, "__name__", x))
def test_broken_graph_is_named(code: str, named: str, breaker: Callable[[Graph], None]) -> None:
    graph = sound()
    breaker(graph)
    with pytest.raises(DfcError) as error:
        verify(graph)
    found = [d for d in error.value.diagnostics if d.code == code]
    assert found, f"{error.value}"
    assert any(named in d.render() for d in found), f"{error.value}"
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "breaker",
    [used_before_it_is_computed, negative_stage, operands_that_the_op_refuses, missing_operand],
)
def test_errors_name_node_and_source_line(breaker: Callable[[Graph], None]) -> None:
    graph = sound()
    breaker(graph)
    with pytest.raises(DfcError, match=r"note: node %[ab], traced from net.py:31 \(blocks.0.mlp\)"):
        verify(graph)


def test_every_code_of_the_verifier_is_broken_once() -> None:
    source = (Path(dfc.__file__).parent / "ir" / "verify.py").read_text()
    assert set(re.findall(r'"(V\d{3})"', source)) <= {code for code, *_ in BREAKERS}


def test_all_errors_are_reported_at_once() -> None:
    graph = sound()
    negative_stage(graph)
    unbound_size_in_an_attribute(graph)
    outputs_without_structure(graph)
    with pytest.raises(DfcError) as error:
        verify(graph)
    assert {d.code for d in error.value.diagnostics} == {"V005", "V006", "V007"}


def test_structure_is_checked_inside_nested_graphs() -> None:
    graph = sound()
    inner = Graph("body")
    x = inner.add_input("x", F32)
    bad = inner.add("aten.neg.default", [x], types=[F32], names=["deep"], loc=PLACE)
    inner.set_outputs([bad.result], Seq("tuple", (LEAF,)))
    inner.set_stage(bad, -2)
    graph.add("torch.map", [(graph.inputs[0],)], {"xs": 1}, types=[F32], graphs=[inner])
    with pytest.raises(DfcError, match="%deep"):
        verify(graph)


def test_types_are_checked_where_asked() -> None:
    graph = sound()
    operands_that_the_op_refuses(graph)
    verify(graph, types=False)
    verify(graph, types=[node(graph, "a")])
    with pytest.raises(DfcError, match="V020"):
        verify(graph, types=[node(graph, "b")])


@pytest.mark.parametrize("seed", range(0, 50, 10))
def test_no_swapped_type_goes_unnoticed(seed: int) -> None:
    """Give one result of each node another element type: the verifier sees it."""
    for i in range(len(random_graph(seed))):
        graph = random_graph(seed).copy()
        changed = list(graph.nodes)[i]
        t = changed.results[0].type
        if not isinstance(t, TensorType) or changed.op == "torch.cond":
            continue
        other = DTYPES["i16" if t.dtype.is_float else "f64"]
        graph.set_type(changed.results[0], t.with_dtype(other))
        with pytest.raises(DfcError):
            verify(graph)


def test_a_type_rule_that_looks_at_numbers_leaves_what_is_declared() -> None:
    """`istft` asks whether its window's sums are 0: sizes cannot tell."""
    import torch

    class Sound(torch.nn.Module):
        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            window = torch.ones(32)
            spectrum = torch.stft(wave, 32, 8, window=window, return_complex=True)
            return torch.istft(spectrum, 32, 8, window=window, length=160)

    graph = dfc.trace(Sound(), (torch.randn(2, 160),))
    assert any(n.op == "aten.istft.default" for n in graph.nodes)
    verify(graph, types=True)
