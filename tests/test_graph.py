"""The graph: changing it keeps it whole, and size costs nothing but time in proportion."""

from __future__ import annotations

import pytest

import dfc
import dfc.ops
from dfc.errors import DfcError
from dfc.ir.graph import Argument, Attributes, Bind, Graph, Loc, Node, Value
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from dfc.rewrite.pass_ import Context, find_pass

F32 = TensorType(DTYPES["f32"], (2, 3))
LARGE = 100_000


def graph_with(*inputs: str) -> tuple[Graph, list[Value]]:
    graph = Graph()
    values = [graph.add_input(n, F32) for n in inputs]
    graph.arguments = tuple(Argument(n, LEAF) for n in inputs)
    return graph, values


def neg(graph: Graph, x: Value, **kwargs: object) -> Node:
    return graph.add("aten.neg.default", [x], types=[F32], **kwargs)  # type: ignore[arg-type]


def diamond() -> tuple[Graph, list[Node]]:
    graph, (x,) = graph_with("x")
    a = neg(graph, x, names=["a"])
    b = neg(graph, a.result, names=["b"])
    both = [a.result, b.result]
    c = graph.add("aten.add.Tensor", both, {"alpha": 1}, types=[F32], names=["c"])
    graph.set_outputs([c.result])
    return graph, [a, b, c]


# Users


def test_users_count_every_operand() -> None:
    graph, (x,) = graph_with("x")
    a = graph.add("aten.add.Tensor", [x, x], {"alpha": 1}, types=[F32])
    b = graph.add("aten.cat.default", [(x, a.result, None, x)], {"dim": 0}, types=[F32])
    graph.set_outputs([b.result, x])
    assert x.users == (a, b, graph.result) and x.use_count == 5
    assert a.users == (b,) and b.users == (graph.result,)
    assert graph.is_output(x) and not graph.is_output(a.result)
    verify(graph, types=False)


def test_replace_uses_reaches_lists_and_outputs() -> None:
    graph, (x, y) = graph_with("x", "y")
    a = neg(graph, x)
    b = graph.add("aten.cat.default", [(x, x)], {"dim": 0}, types=[F32])
    graph.set_outputs([a.result, b.result, x], None, [(y, x)])
    assert graph.replace_uses(x, x) == 0
    assert graph.replace_uses(x, y) == 3
    assert x.use_count == 0 and y.use_count == 5
    assert b.inputs == ((y, y),) and graph.outputs[2] is y
    assert graph.mutations[0].value is y
    verify(graph, types=False)


def test_a_node_is_replaced_by_one_value() -> None:
    graph, (a, b, c) = diamond()
    graph.replace(b, graph.inputs[0])
    assert c.inputs == (a.result, graph.inputs[0]) and b.graph is None
    verify(graph, types=False)


def test_replace_uses_where() -> None:
    graph, (a, b, c) = diamond()
    x = graph.inputs[0]
    assert graph.replace_uses(a.result, x, where=lambda n: n is c) == 1
    assert b.inputs == (a.result,) and c.inputs == (x, b.result)
    verify(graph, types=False)


def test_replace_erases_and_a_used_node_cannot_be_erased() -> None:
    graph, (a, b, c) = diamond()
    with pytest.raises(AssertionError, match="still used"):
        graph.erase(a)
    graph.replace(b, a)
    assert len(graph) == 2 and c.inputs == (a.result, a.result) and b.graph is None
    assert list(graph.nodes) == [a, c]
    verify(graph, types=False)


def test_names_are_unique_and_free_again_after_erasing() -> None:
    graph, (x,) = graph_with("x")
    names = [neg(graph, x, names=[w]).result.name for w in ("x", "y", "y", None, None, "0")]
    assert names == ["x_1", "y", "y_1", "0", "1", "0_1"]
    graph.erase(x.users[1])
    assert neg(graph, x, names=["y"]).result.name == "y"
    with pytest.raises(AssertionError, match="taken"):
        graph.add_input("y", F32)
    graph.rename(x, "z")
    assert graph.inputs[0].name == "z" and graph.fresh_name("x") == "x"
    assert neg(graph, x, names=["layer.é.weight_f32"]).result.name == "layer___weight_f32"


def test_inserting_and_moving_keep_the_order() -> None:
    graph, (a, b, c) = diamond()
    d = neg(graph, graph.inputs[0], before=b, names=["d"])
    assert list(graph.nodes) == [a, d, b, c]
    graph.move_before(d, a)
    assert list(graph.nodes) == [d, a, b, c]
    assert list(graph.reversed_nodes) == [c, b, a, d] and len(graph) == 4
    verify(graph, types=False)


def test_set_inputs_and_attributes() -> None:
    graph, (a, b, c) = diamond()
    graph.set_inputs_of(c, [b.result, b.result])
    graph.set_attributes(c, alpha=2.0)
    graph.set_stage(c, 1)
    assert a.result.use_count == 1 and b.result.use_count == 2
    assert c.attributes == Attributes({"alpha": 2.0}) != Attributes({"alpha": 2})
    assert "stage 1" in str(graph)
    verify(graph, types=False)


def test_attributes_cannot_be_changed_in_place() -> None:
    attributes = Attributes({"a": [1, [2.0]], "b": True})
    assert attributes["a"] == (1, (2.0,))
    with pytest.raises(TypeError):
        attributes["a"] = 1  # type: ignore[index]
    assert len({attributes, attributes.with_(b=True), attributes.with_(b=1)}) == 2


# While iterating


def test_erase_the_current_node_while_iterating() -> None:
    graph, (x,) = graph_with("x")
    made = [neg(graph, x) for _ in range(10)]
    seen = []
    for node in graph.nodes:
        seen.append(node)
        if made.index(node) % 2:
            graph.erase(node)
    assert seen == made and list(graph.nodes) == made[::2]


def test_erase_the_next_nodes_while_iterating() -> None:
    graph, (x,) = graph_with("x")
    made = [neg(graph, x) for _ in range(10)]
    seen = []
    for node in graph.nodes:
        seen.append(made.index(node))
        if seen[-1] == 2:
            for gone in made[2:7]:
                graph.erase(gone)
    assert seen == [0, 1, 2, 7, 8, 9]


def test_insert_while_iterating_both_ways() -> None:
    graph, (x,) = graph_with("x")
    made = [neg(graph, x) for _ in range(3)]
    for node in graph.nodes:
        if node in made:
            neg(graph, x, before=node)
    assert len(graph) == 6 and list(graph.nodes)[1::2] == made
    for node in graph.reversed_nodes:
        graph.erase(node)
    assert len(graph) == 0 and list(graph.nodes) == [] and x.use_count == 0


# Copies


def test_a_copy_shares_nothing_that_can_change() -> None:
    graph, (a, b, _) = diamond()
    inner = Graph("body")
    inner.set_outputs([inner.add_input("x", F32)])
    graph.add("torch.map", [(a.result,)], {"xs": 1}, types=[F32], graphs=[inner])
    before = str(graph)
    other, twin = graph.copy_with_map()
    assert str(other) == before and other == graph
    other.replace(twin[b.result].node, twin[a.result].node)  # type: ignore[arg-type]
    next(n for n in other.nodes if n.graphs).graphs[0].name = "changed"
    assert str(graph) == before and other != graph
    verify(other, types=False)


def test_a_copy_keeps_everything() -> None:
    graph = Graph("g", ranges={"B": (1, 7)})
    graph.notes.append("a restriction")
    x = graph.add_input("x", F32)
    w = graph.add_parameter("w", F32, "buffer", aliases=("tied",))
    node = neg(graph, x, stage=2, loc=Loc("n.py", 3, "m"), binds=[Bind("u0", 0, 3)])
    graph.set_outputs([node.result], None, [(w, node.result)])
    other = graph.copy()
    (twin,) = other.nodes
    assert (twin.stage, twin.loc, twin.binds) == (node.stage, node.loc, node.binds)
    assert other.parameters["w"].aliases == ("tied",) and other.ranges == {"B": (1, 7)}
    assert other.notes == ["a restriction"]
    assert str(other) == str(graph)


# The analysis view


def test_networkx_view() -> None:
    import networkx

    graph, (a, b, c) = diamond()
    view = graph.to_networkx()
    assert list(view.nodes) == [a, b, c, graph.result]
    edges = {(u, v, d["value"]) for u, v, d in view.edges(data=True)}
    assert edges == {
        (a, b, a.result), (a, c, a.result), (b, c, b.result), (c, graph.result, c.result),
    }  # fmt: skip
    assert networkx.is_directed_acyclic_graph(view)
    assert networkx.dag_longest_path(view) == [a, b, c, graph.result]
    double = graph.copy()
    x = next(iter(double.nodes)).result
    double.set_inputs_of(list(double.nodes)[2], [x, x])
    assert double.to_networkx().number_of_edges(x.node, list(double.nodes)[2]) == 2


# Size


def chain(length: int) -> Graph:
    """A deep chain of varied ops with twins and dead ends."""
    graph, (x,) = graph_with("x")
    y = x
    for i in range(length // 4):
        place = Loc("net.py", i % 997, "deep")
        names = ["neg", "neg", "mul", "relu"]
        a = neg(graph, y, loc=place, names=names[:1])
        b = neg(graph, y, loc=place, names=names[1:2])
        c = graph.add(
            "aten.mul.Tensor", [a.result, b.result], types=[F32], names=names[2:3], loc=place
        )
        graph.add("aten.relu.default", [c.result], types=[F32], names=names[3:])
        y = c.result
    graph.set_outputs([y])
    return graph


@pytest.fixture(scope="module")
def deep() -> Graph:
    return chain(LARGE)


def test_a_deep_chain_is_built_and_copied(deep: Graph) -> None:
    assert len(deep) == LARGE
    other = deep.copy()
    assert len(other) == LARGE and list(other.nodes)[-1].op == "aten.relu.default"


def test_a_deep_chain_is_verified(deep: Graph) -> None:
    verify(deep, types=False)


def test_a_deep_chain_is_printed_and_parsed(deep: Graph) -> None:
    text = str(deep)
    again = dfc.parse(text)
    assert len(again) == LARGE and str(again) == text


def test_a_deep_chain_is_simplified(deep: Graph) -> None:
    graph = deep.copy()
    assert find_pass("canonicalize").run(graph, Context()) == 0
    assert find_pass("cse").run(graph, Context()) == LARGE // 4
    assert find_pass("dce").run(graph, Context()) == LARGE // 4
    assert len(graph) == LARGE // 2


def test_a_deep_chain_is_analysed(deep: Graph) -> None:
    assert deep.to_networkx().number_of_nodes() == LARGE + 1


def test_a_value_with_many_users_is_replaced_fast() -> None:
    graph, (x, y) = graph_with("x", "y")
    for _ in range(50_000):
        neg(graph, x)
    assert graph.replace_uses(x, y) == 50_000
    assert x.use_count == 0 and y.use_count == 50_000 and len(y.users) == 50_000


def test_many_outputs_and_wide_lists_are_replaced_fast() -> None:
    graph, (x, y) = graph_with("x", "y")
    graph.add("aten.cat.default", [(x,) * 50_000], {"dim": 0}, types=[F32])
    graph.set_outputs([x] * 50_000)
    assert graph.replace_uses(x, y) == 2
    assert y.use_count == 100_000


def test_many_equal_name_wishes_cost_no_more_than_others() -> None:
    graph, (x,) = graph_with("x")
    for _ in range(30_000):
        neg(graph, x, names=["same"])
    assert len({n.result.name for n in graph.nodes}) == 30_000


def test_many_parameters_are_dropped_fast() -> None:
    graph, (x,) = graph_with("x")
    for i in range(20_000):
        graph.add_parameter(f"w{i}", F32)
    graph.set_outputs([x])
    assert find_pass("dce").run(graph, Context()) == 20_000


# Adding


def test_add_infers_types_and_names_what_is_wrong() -> None:
    graph, (x,) = graph_with("x")
    node = graph.add("aten.sum.dim_IntList", [x], {"dim": (0,), "keepdim": False, "dtype": None})
    assert str(node.result.type) == "f32[3]"
    with pytest.raises(DfcError) as error:
        graph.add("aten.matmul.default", [x, x], loc=Loc("net.py", 7, "mlp"))
    assert error.value.code == "V020" and "net.py:7 (mlp)" in str(error.value)
    with pytest.raises(DfcError, match=r"did you mean `aten\.matmul\.default`") as error:
        graph.add("aten.matmull.default", [x, x])
    assert error.value.code == "V010"
    assert len(graph) == 1, "a refused node must leave no trace"
    assert x.use_count == 1
