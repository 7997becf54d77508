"""`autocast`: what runs in 16 bits, where casts stand, what overflows, and what comes out."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress.casting import choose_half, is_f32, takes_part
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.types import DTYPES, TensorType
from dfc.lang.selectors import parse_selector
from dfc.ops.precision import precision_of
from dfc.recipe.quantities import weight_bytes
from dfc.rewrite.driver import Outcome, run_passes
from dfc.rewrite.pass_ import Context, Decision, find_pass
from dfc.rewrite.probe import make_probes

CAST = "aten._to_copy.default"


class Block(nn.Module):
    """Attention and a feed-forward part with residuals, after an embedding tied to the output."""

    def __init__(self, lowest: float = -1e4) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.lowest = lowest

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        x = self.table(tokens)
        mask = (1.0 - keep[:, None, :].float()) * self.lowest
        x = x + nn.functional.scaled_dot_product_attention(x, x, x, mask)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return nn.functional.linear(x, self.table.weight)


def model(lowest: float = -1e4) -> tuple[Block, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    keep = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    return Block(lowest).eval(), (torch.randint(0, 20, (2, 4)), keep)


def cast(graph: Graph, inputs: tuple[Tensor, ...], **options: object) -> tuple[Outcome, list]:  # type: ignore[type-arg]
    """A graph after `autocast`, proved on probes, and what was decided."""
    ctx = Context(decisions=[])
    probes = make_probes(graph, list(inputs))
    outcome = run_passes(graph, [find_pass("autocast", options)], probes=probes, ctx=ctx)
    assert ctx.decisions is not None
    return outcome, ctx.decisions


def reason(decisions: list[Decision], op: str) -> str:
    return next(d.reason for d in decisions if d.op.split(".")[1] == op)


def types(graph: Graph) -> dict[str, str]:
    return {n.results[0].name: str(n.results[0].tensor_type.dtype) for n in graph.nodes}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products_are_cast_and_weights_stored_so(dtype: str) -> None:
    net, args = model()
    graph = dfc.trace(net, args)
    outcome, decisions = cast(graph, args, dtype=dtype)
    after = outcome.graph
    assert outcome.reports[0].verdict == "proved", outcome.reports
    kinds = types(after)
    assert {kinds[n] for n in ("linear", "linear_1", "embedding")} == {dtype}
    assert kinds["layer_norm"] == "f32"
    assert {p.name for p in after.parameters.values()} == set(graph.parameters)
    stored = {n: str(p.tensor_type.dtype) for n, p in after.parameters.items()}
    assert stored["table.weight"] == stored["up.bias"] == dtype and stored["norm.bias"] == "f32"
    norm = 4 * 2 * 16
    assert weight_bytes(after) == norm + (weight_bytes(graph) - norm) // 2
    assert after.outputs[0].tensor_type == graph.outputs[0].tensor_type
    assert [v.type for v in after.inputs] == [v.type for v in graph.inputs]
    assert "long sums of squares" in reason(decisions, "layer_norm")
    assert "runs in" in reason(decisions, "linear")


def test_a_tied_table_stays_one() -> None:
    net, args = model()
    after = cast(dfc.trace(net, args), args, dtype="f16")[0].graph
    assert len(after.parameters["table.weight"].users) == 2


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_no_cast_undoes_another_and_none_stands_twice(dtype: str) -> None:
    net, args = model()
    after = cast(dfc.trace(net, args), args, dtype=dtype)[0].graph
    casts = [n for n in after.nodes if n.op == CAST]
    assert casts
    for node in casts:
        (source,) = node.operands
        assert source.type != node.result.type
        assert source.node is None or source.node.op != CAST
    twice = Counter((next(n.operands), str(n.attributes["dtype"])) for n in casts)
    assert set(twice.values()) == {1}


def test_a_second_run_finds_nothing() -> None:
    net, args = model()
    once = cast(dfc.trace(net, args), args)[0].graph
    text = str(once)
    assert find_pass("autocast").run(once, Context(examples=[list(args)])) == 0
    assert str(once) == text


def cost(graph: Graph, half: set[Node]) -> int:
    """Bytes that casts move, counted anew: each value once up and once down."""
    total = 0
    for v in [*graph.inputs, *(r for n in graph.nodes for r in n.results)]:
        if is_f32(v):
            others = {u in half for u in v.users} - {v.node in half}
            total += 6 * int(v.tensor_type.numel) * len(others)  # type: ignore[arg-type]
    return total


@pytest.mark.parametrize("seed", range(12))
def test_casts_move_as_few_bytes_as_can_be(seed: int) -> None:
    """Against every way to assign the nodes of small graphs."""
    graph = random_chain(seed)
    wishes = {n: precision_of(n)[0] for n in graph.nodes if takes_part(n)}
    free = [n for n, w in wishes.items() if w == "follow"]
    must = {n for n, w in wishes.items() if w == "half"}
    chosen = choose_half(graph, wishes)
    assert must <= chosen and not any(wishes[n] == "f32" for n in chosen)
    ways = [
        must | {n for n, on in zip(free, bits, strict=True) if on}
        for bits in itertools.product((False, True), repeat=len(free))
    ]
    least = min(cost(graph, w) for w in ways)
    assert cost(graph, chosen) == least
    assert len(chosen) == min(len(w) for w in ways if cost(graph, w) == least)


def random_chain(seed: int) -> Graph:
    """A graph of a few products, sums, exponentials and what takes any type."""
    random = Random(seed)
    graph = Graph()
    f32 = TensorType(DTYPES["f32"], (4, 4))
    values = [graph.add_input("x", f32)]
    weight = graph.add_parameter("w", f32)
    for _ in range(12):
        a, b = random.choice(values), random.choice(values)
        op, inputs, attributes = random.choice(
            [
                ("aten.add.Tensor", [a, b], {"alpha": 1}),
                ("aten.linear.default", [a, weight, None], {}),
                ("aten.relu.default", [a], {}),
                ("aten.exp.default", [a], {}),
                ("aten.neg.default", [a], {}),
                ("aten.maximum.default", [a, b], {}),
            ]
        )
        values.append(graph.add(op, inputs, attributes, types=[f32]).result)
    graph.set_outputs([graph.add("aten.add.Tensor", values[-2:], {"alpha": 1}).result])
    return graph


class Large(nn.Module):
    """The second layer's input is a thousand times as large as its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        big = self.a(x) * 60000.0
        return self.c(torch.tanh(self.b(big) * 1e-5))


def test_f16_leaves_what_overflows_on_the_example() -> None:
    torch.manual_seed(0)
    net, x = Large().eval(), torch.randn(4, 8)
    outcome, decisions = cast(dfc.trace(net, (x,)), (x,), dtype="f16")
    assert outcome.reports[0].verdict == "proved"
    kinds = types(outcome.graph)
    assert (kinds["linear"], kinds["linear_1"], kinds["linear_2"]) == ("f16", "f32", "f16")
    why = next(d.reason for d in decisions if d.value == "%linear_1")
    assert "on the example: f16 ends at 65504" in why and why.startswith("stays in f32: %")


def test_f16_without_anything_to_run_looks_at_weights_and_numbers() -> None:
    torch.manual_seed(0)
    net = Large().eval()
    with torch.no_grad():
        net.b.weight[0, 0] = 1e6
    graph = dfc.trace(net, (torch.randn(4, 8),))
    ctx = Context(decisions=[])
    find_pass("autocast", {"dtype": "f16"}).run(graph, ctx)
    kinds = types(graph)
    assert kinds["linear_1"] == "f32" and kinds["linear"] == "f16"
    assert any("!b.weight holds 1e+06" in d.reason for d in ctx.decisions or ())
    with torch.no_grad():
        net.c.weight[0, 0] = 1e5
    graph = dfc.trace(net, (torch.randn(4, 8),))
    find_pass("autocast", {"dtype": "f16"}).run(graph, ctx)
    one = "!b.weight holds 1e+06: f16 ends at 65504"
    assert [n for n in ctx.products["notes"] if "stay" in n] == [
        f"autocast: 1 node stays in f32: {one}",
        f"autocast: 2 nodes stay in f32: {one}; 1 other value does not fit either",
    ]


def test_f16_reads_the_data_that_is_named() -> None:
    """The example is small; the data is not, and one batch of it is enough."""
    torch.manual_seed(0)
    net, x = Large().eval(), torch.randn(4, 8) * 1e-3
    text = "dfc 1\ndata calib\nrecipe r {\n  autocast f16 using calib\n}\n"
    graph = dfc.trace(net, (x,))
    assert types(cast(graph, (x,), dtype="f16")[0].graph)["linear_1"] == "f16"
    batches = [x, torch.randn(4, 8), x]
    compiled = dfc.compile(net, (x,), recipe=text, engine="eager", data={"calib": batches})
    assert types(compiled.graph)["linear_1"] == "f32"
    (told,) = [n for n in compiled.report.notes if "stay in f32" in n]
    assert told.startswith("autocast: 2 nodes stay in f32: %mul reaches ")
    assert told.endswith(" on calib: f16 ends at 65504")
    with pytest.raises(DfcError, match="batch 2 of data `calib`: `x` has"):
        batches = [x, torch.full((4, 8), torch.nan)]
        dfc.compile(net, (x,), recipe=text, engine="eager", data={"calib": batches})


def test_bf16_has_the_range() -> None:
    torch.manual_seed(0)
    net, x = Large().eval(), torch.randn(4, 8)
    outcome, _ = cast(dfc.trace(net, (x,)), (x,))
    assert outcome.reports[0].verdict == "proved"
    assert types(outcome.graph)["linear_1"] == "bf16"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("lowest", [-1e4, -3.4028234663852886e38, float("-inf")])
def test_masks_look_away_in_every_type(dtype: str, lowest: float) -> None:
    """The most negative f32 number is -inf in both types; clamped, it hides just as well."""
    net, args = model(lowest if lowest > -1e39 else -1e38)
    args = (args[0], torch.ones_like(args[1])) if lowest < -1e39 else args
    outcome, _ = cast(dfc.trace(net, args), args, dtype=dtype)
    assert outcome.reports[0].verdict == "proved", outcome.reports[0].reason
    clamps = [n for n in outcome.graph.nodes if n.op == "aten.clamp.default"]
    assert len(clamps) == 1


def test_small_numbers_stay_where_they_count() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y = x @ w
            return y / (y.square() + 1e-12).clamp_min(1e-9)

    args = (torch.randn(4, 4), torch.randn(4, 4))
    outcome, decisions = cast(dfc.trace(Norm(), args), args, dtype="f16")
    assert outcome.reports[0].verdict == "proved"
    assert reason(decisions, "clamp_min") == "stays in f32: `min=1e-09` does not fit into f16"


def test_a_part_is_left_out_or_done_alone() -> None:
    net, args = model()
    graph = dfc.trace(net, args)
    outcome, decisions = cast(graph, args, exclude=parse_selector('"down"'))
    kinds = types(outcome.graph)
    assert (kinds["linear"], kinds["linear_1"]) == ("bf16", "f32")
    assert any('`except "down"` names it' in d.reason for d in decisions)
    kinds = types(cast(graph, args, select=parse_selector('"up"'))[0].graph)
    assert (kinds["linear"], kinds["linear_1"], kinds["embedding"]) == ("bf16", "f32", "f32")


def test_a_recipe_says_it() -> None:
    net, args = model()
    text = "dfc 1\nrecipe r {\n  autocast f16 except op(linear)\n}\n"
    compiled = dfc.compile(net, args, recipe=text, engine="eager")
    assert compiled.report.proved
    assert types(compiled.graph)["linear"] == "f32"
    assert types(compiled.graph)["embedding"] == "f16"
    with pytest.raises(DfcError, match="none of bf16, f16"):
        dfc.compile(net, args, recipe="dfc 1\nrecipe r {\n  autocast f8\n}\n")


def test_weights_that_the_model_writes_to_are_cast_when_it_runs() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("state", torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.state
            self.state.add_(1.0)
            return y @ self.w

    torch.manual_seed(0)
    net, x = State().eval(), torch.randn(4, 4)
    graph = dfc.trace(net, (x,))
    outcome, _ = cast(graph, (x,))
    assert outcome.reports[0].verdict == "proved"
    stored = {n: str(p.tensor_type.dtype) for n, p in outcome.graph.parameters.items()}
    assert stored == {"w": "bf16", "state": "f32"}


def test_a_model_without_weights_is_cast_too() -> None:
    with torch.device("meta"):
        net = Large()
    graph = dfc.trace(net, (torch.randn(4, 8, device="meta"),))
    assert find_pass("autocast").run(graph, Context()) > 2
    assert str(graph.parameters["a.weight"].type) == "bf16[8, 8]"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(
    "engine", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_engines_run_it(engine: str, dtype: str) -> None:
    net, args = model()
    text = f"dfc 1\nrecipe r {{\n  autocast {dtype}\n}}\n"
    compiled = dfc.compile(net, args, recipe=text, engine=engine)
    want = net(*args).detach()
    error = float((compiled(*args) - want).abs().max() / want.abs().max())
    assert 0 < error < {"bf16": 0.05, "f16": 0.005}[dtype]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_onnx_is_valid_and_small(dtype: str, tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 kernels on CPUs: products are written in f32 around stored bf16."""
    import onnx
    import onnxruntime

    net, args = model()
    text = f"dfc 1\nrecipe r {{\n  autocast {dtype}\n}}\n"
    dfc.compile(net, args, recipe=text, engine="eager").export(tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(written, full_check=True)
    kind = {"bf16": onnx.TensorProto.BFLOAT16, "f16": onnx.TensorProto.FLOAT16}[dtype]
    by_name = {i.name: i.data_type for i in written.graph.initializer}
    assert by_name["table.weight"] == by_name["up.weight"] == kind
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, [a.numpy() for a in args], strict=True)))
    want = net(*args).detach().numpy()
    assert found.dtype == want.dtype
    assert abs(found - want).max() / abs(want).max() < {"bf16": 0.05, "f16": 0.005}[dtype]


def test_onnx_of_a_small_difference_is_as_near_as_bf16_is(tmp_path: Path) -> None:
    """The result is float32, and 3 % of it is the rounding of the products that it is made of."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            with torch.no_grad():
                self.b.weight.copy_(self.a.weight + 0.004 * torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    torch.manual_seed(0)
    net, args = Apart().eval(), (torch.randn(16, 64),)
    text = "dfc 1\nrecipe r {\n  autocast bf16\n}\n"
    compiled = dfc.compile(net, args, recipe=text, engine="eager")
    want = net(*args).detach()
    assert 0.01 < float((compiled(*args) - want).abs().max() / want.abs().max()) < 0.1
    compiled.export(tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_weights_alone_are_stored_and_everything_is_computed_in_f32(
    dtype: str, tmp_path: Path
) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    net, args = Wide().eval(), (torch.randn(4, 32),)
    outcome, decisions = cast(dfc.trace(net, args), args, dtype=dtype, only_weights=True)
    after = outcome.graph
    assert dfc.parse(str(after)) == after
    assert outcome.reports[0].verdict == "proved" and outcome.reports[0].changes == 2
    assert set(types(after).values()) == {"f32"}
    stored = {n: str(p.tensor_type.dtype) for n, p in after.parameters.items()}
    assert stored == {
        "up.weight": dtype,
        "up.bias": "f32",
        "down.weight": dtype,
        "down.bias": "f32",
    }
    assert sum("computed with in f32" in d.reason for d in decisions) == 2
    assert find_pass("autocast", {"dtype": dtype, "only_weights": True}).run(after, Context()) == 0
    text = f"dfc 1\nrecipe r {{\n  autocast {dtype} with only_weights=yes\n}}\n"
    compiled = dfc.compile(net, args, recipe=text, engine="onnxruntime")
    compiled.export(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1.4 * 2 * (2 * 32 * 64)
    rounded = Wide().eval()
    rounded.load_state_dict(
        {
            k: v.to(getattr(torch, {"bf16": "bfloat16", "f16": "float16"}[dtype])).float()
            if k.endswith("weight") else v
            for k, v in net.state_dict().items()
        }
    )  # fmt: skip
    torch.testing.assert_close(compiled(*args), rounded(*args).detach(), rtol=1e-5, atol=1e-6)


def test_declared_ops_say_what_they_want() -> None:
    from dfc.ir.op import declared_ops

    said = {op.name: op.cls.precision for op in declared_ops()}
    assert said["dfc.multi_head_attention"] == "half"
    assert said["dfc.rotary_embedding"] == "follow"
    assert said["dfc.skip_layer_norm"] == "f32"


def test_integer_layers_stay_as_they_are() -> None:
    """A layer that reads codes is run on whole numbers: a cast would tear it from them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
    )
    steps = 'quantize int8 using calib except "4" with scheme=static\n  autocast bf16'
    compiled = dfc.compile(
        net.eval(), (torch.randn(5, 32),), engine="eager",
        recipe=f"dfc 1\ndata calib\nrecipe r {{\n  {steps}\n}}\n",
        data={"calib": [torch.randn(5, 32)]},
    )  # fmt: skip
    linears = [n for n in compiled.graph.nodes if n.op == "aten.linear.default"]
    types = [str(n.result.tensor_type.dtype) for n in linears]
    assert types == ["f32", "f32", "bf16"]


def test_calibrated_integers_behind_autocast_are_told_their_place() -> None:
    steps = "autocast f16\n  quantize int8 using calib with scheme=static"
    with pytest.raises(DfcError, match="`quantize` belongs before `autocast`"):
        dfc.compile(
            nn.Linear(64, 64).eval(), (torch.randn(5, 64),), engine="eager",
            recipe=f"dfc 1\ndata calib\nrecipe r {{\n  {steps}\n}}\n",
            data={"calib": [torch.randn(5, 64)]},
        )  # fmt: skip
