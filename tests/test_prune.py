"""`prune`: what goes and what stays, by which measure; predicted, and refused in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress import refit as fitting
from dfc.compress.blocks import find_blocks
from dfc.compress.choice import Part, aligned, counts, counts_by_time
from dfc.compress.groups import Group, find_groups
from dfc.compress.importance import by_magnitude, by_taylor, per_unit
from dfc.compress.reconstruction import by_reconstruction
from dfc.compress.sequential import Prefix
from dfc.compress.work import work_of
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.lang.selectors import parse_selector
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context, find_pass

X = torch.linspace(-2, 2, 6 * 16).reshape(6, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net: Net) -> Graph:
    return dfc.trace(net, (X,))


def prune(graph: Graph, select: str = "", ctx: Context | None = None, **options: Any) -> Graph:
    if select:
        options["select"] = parse_selector(select)
    small = graph.copy()
    find_pass("prune", options).run(small, ctx or Context())
    verify(small)
    return small


def shape(graph: Graph, name: str) -> tuple[Any, ...]:
    return graph.parameters[name].tensor_type.shape


def numbers(graph: Graph, name: str) -> Tensor:
    data = graph.parameters[name].data
    assert data is not None
    return data.tensor()


def test_hidden_units_go_and_the_stream_stays(graph: Graph) -> None:
    small = prune(graph, ratio=0.3)
    for i in range(4):
        assert shape(small, f"layers.{i}.up.weight") == (48, 16), "44.8 is nearest to 48"
        assert shape(small, f"layers.{i}.down.weight") == (16, 48)
        assert shape(small, f"layers.{i}.norm.weight") == (16,)
    assert len(small.parameters) == len(graph.parameters)
    assert shape(graph, "layers.0.up.weight") == (64, 16), "the original is as it was"


def test_the_units_that_matter_least_go() -> None:
    net = Net().eval()
    gone = [3, 5, 17, 40]
    with torch.no_grad():
        net.layers[0].up.weight[gone] = 0  # type: ignore[index,union-attr]
        net.layers[0].up.bias[gone] = 0  # type: ignore[index,union-attr]
        net.layers[0].down.weight[:, gone] = 0  # type: ignore[index,union-attr]
    graph = dfc.trace(net, (X,))
    data = Context(examples=[[X]])
    for by in ("magnitude", "activation", "taylor", "reconstruction"):
        small = prune(graph, '"layers.0.up"', data, ratio=4 / 64, align=4, by=by)
        assert shape(small, "layers.0.up.weight") == (60, 16)
        torch.testing.assert_close(interpret(small, [X])[0], net(X))


def test_only_what_is_selected_goes_and_not_what_is_excepted(graph: Graph) -> None:
    small = prune(graph, '"layers.1.up"', ratio=0.5)
    assert shape(small, "layers.1.up.weight") == (32, 16)
    assert shape(small, "layers.0.up.weight") == (64, 16)
    small = prune(graph, ratio=0.5, exclude=parse_selector('"layers.1.**"'))
    assert shape(small, "layers.1.up.weight") == (64, 16)
    assert shape(small, "layers.0.up.weight") == (32, 16)


def test_a_global_ratio_takes_more_where_units_matter_less() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.layers[2].up.weight[8:] *= 1e-3  # type: ignore[index,union-attr]
        net.layers[2].down.weight[:, 8:] *= 1e-3  # type: ignore[index,union-attr]
    small = prune(dfc.trace(net, (X,)), ratio=56 / 256, scope="global")
    kept = [shape(small, f"layers.{i}.up.weight")[0] for i in range(4)]
    assert kept[2] == 8 and all(k >= 56 for i, k in enumerate(kept) if i != 2), kept


def test_a_ratio_of_the_time_goes_where_little_is_lost_for_much_of_it() -> None:
    from dfc.compress.axes import leaf

    dear, cheap, heads = Group(leaf(64), "ffn"), Group(leaf(64), "ffn"), Group(leaf(8), "heads")
    scores = {dear: torch.ones(64), cheap: torch.ones(64), heads: torch.full((8,), 1000.0)}
    parts = [
        Part(6.0, frozenset({dear.axis})),
        Part(1.0, frozenset({cheap.axis, heads.axis})),
        Part(3.0, frozenset()),  # what no group has a part in
    ]
    assert counts_by_time(scores, 0.3, 16, parts) == {dear: 32, cheap: 64, heads: 8}
    scores[dear] = torch.arange(64.0)  # its first 16 cost 80 a second, those of `cheap` 64
    assert counts_by_time(scores, 0.2, 16, parts) == {dear: 48, cheap: 16, heads: 8}
    scores[dear] = torch.full((64,), 1e6)
    assert counts_by_time(scores, 0.05, 16, parts) == {dear: 64, cheap: 32, heads: 8}
    least = counts_by_time(scores, 0.95, 16, parts)
    assert least == {dear: 16, cheap: 16, heads: 1}, "what is left when the ratio is out of reach"


def test_time_is_saved_where_it_is_spent(net: Net) -> None:
    """Layers on long rows take more of it than the same layers on short ones."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.short = Block(), Block()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.long(x), self.short(y)

    torch.manual_seed(0)
    two = Two().eval()
    two.short.load_state_dict(two.long.state_dict())
    x, y = torch.randn(512, 16), torch.randn(2, 16)
    small = prune(dfc.trace(two, (x, y)), ctx=Context(examples=[[x, y]]), ratio=0.2, scope="time")
    assert shape(small, "long.up.weight")[0] < 64 == shape(small, "short.up.weight")[0]


def test_counts_are_multiples_and_at_least_one_of_them() -> None:
    from dfc.compress.axes import leaf

    channels, heads = Group(leaf(64), "channels"), Group(leaf(12), "heads")
    assert [aligned(channels, n, 8) for n in (1, 43, 44, 64)] == [8, 40, 48, 64]
    assert aligned(heads, 8.4, 8) == 8 and aligned(Group(leaf(5), "ffn"), 3, 8) == 5
    scores = {channels: torch.ones(64), heads: torch.ones(12)}
    assert counts(scores, 0.5, 16, "layer") == {channels: 32, heads: 6}


def test_the_norm_of_a_head_is_that_of_its_rows() -> None:
    from dfc.compress.axes import find, leaf, refine

    width = leaf(6)
    heads, _ = refine(width, (3, 2))
    along = torch.arange(6.0)
    assert per_unit(width, along, find(heads)).tolist() == [1.0, 5.0, 9.0]


def test_taylor_is_the_squared_change_of_the_outputs() -> None:
    """For a linear model the first order is exact: both sides can be computed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)).eval()
    rows = torch.randn(400, 1, 4)
    graph = dfc.trace(net, (rows[0],))
    groups = find_groups(graph)
    (g,) = groups.prunable
    found = by_taylor(groups, [g], [[x] for x in rows], Context())[g] / len(rows)
    hidden = net[0](rows[:, 0])
    wanted = (hidden.square().mean(0) * net[1].weight.square().sum(0)).detach()
    torch.testing.assert_close(found, wanted, rtol=0.35, atol=0.0)
    assert found.argsort()[:2].tolist() == wanted.argsort()[:2].tolist()


def test_taylor_takes_gradients_whatever_the_caller_does(graph: Graph) -> None:
    data = Context(examples=[[X]])
    with torch.no_grad():
        small = prune(graph, ctx=data, ratio=0.5, by="taylor")
    assert sum("the example's inputs are all the data" in s for s in data.products["notes"]) == 1
    assert torch.equal(
        numbers(small, "layers.0.up.weight"),
        numbers(prune(graph, ctx=data, ratio=0.5, by="taylor"), "layers.0.up.weight"),
    )


def test_magnitude_does_not_let_a_wide_weight_drown_the_others(graph: Graph) -> None:
    groups = find_groups(graph)
    scores = by_magnitude(groups, groups.prunable)
    for score in scores.values():
        assert float(score.mean()) == pytest.approx(2.0), "mean 1 for each of two weights"


# Refitting


def test_refitting_to_the_data_is_nearer_to_the_original(net: Net, graph: Graph) -> None:
    torch.manual_seed(1)
    low_rank = torch.randn(256, 4) @ torch.randn(4, 16)  # hidden units depend on one another
    data = Context(data={"calib": [low_rank[:128], low_rank[128:]]})
    test = torch.randn(64, 4) @ torch.randn(4, 16)
    wide = dfc.trace(
        net, (low_rank[:128],), dynamic_shapes={"x": {0: torch.export.Dim("B", max=512)}}
    )
    test = low_rank[::5]

    def error(small: Graph) -> float:
        with torch.no_grad():
            wanted = net(test)
            return float((interpret(small, [test])[0] - wanted).norm() / wanted.norm())

    plain = prune(wide, ratio=0.5)
    fitted = prune(wide, ctx=data, ratio=0.5, refit=True, calib="calib")
    assert shape(fitted, "layers.0.down.weight") == (16, 32)
    assert error(fitted) < 0.5 * error(plain), (error(fitted), error(plain))


class Pixels(nn.Module):
    """Layers of single pixels in a row, one with strides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1, bias=False)
        self.c = nn.Conv2d(24, 8, 1, stride=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(torch.relu(self.b(torch.relu(self.a(x))))))


def halved(graph: Graph, x: Tensor, refit: bool = True, journal: Journal | None = None) -> Graph:
    ctx = Context(data={"calib": [x[:20], x[20:]]}, journal=journal)
    return prune(graph, '"a" | "b"', ctx, ratio=0.5, align=4, refit=refit, calib="calib")


def test_a_layer_is_refitted_to_what_the_pruned_layers_before_it_give() -> None:
    """What is left of its error has nothing to do with what it reads."""
    x = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = dfc.trace(Pixels().eval(), (x[:20],))

    def alike(small: Graph) -> float:
        """Of the error of the last convolution, and what it reads there."""
        assert shape(small, "c.weight") == (8, 12, 1, 1)
        layers = [
            next(n for n in g.nodes if n.results[0].name == "conv2d_2") for g in (small, graph)
        ]
        seen, made = ([], [])
        for batch in (x[:20], x[20:]):
            read = next(Prefix(small, [[batch]]).reach(layers[0].inputs[0]))
            ys = [
                next(Prefix(g, [[batch]]).reach(n.results[0]))
                for g, n in zip((small, graph), layers, strict=True)
            ]
            seen.append(read[..., ::2].movedim(1, -1).flatten(0, -2))
            made.append((ys[0] - ys[1]).movedim(1, -1).flatten(0, -2))
        a, b = torch.cat(seen), torch.cat(made)
        return float((a.T @ b).norm() / (a.norm() * b.norm()))

    assert alike(halved(graph, x)) < 1e-3
    assert alike(halved(graph, x, refit=False)) > 0.1


def test_reconstruction_takes_units_that_others_can_stand_for() -> None:
    """Two units that carry much, and the same; the rest carries little, each on its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[0].weight[:2] = 5 * net[0].weight[0]
        net[0].bias[:2] = 1.0
    x = torch.randn(400, 16)
    graph = dfc.trace(net, (x,))
    data = Context(examples=[[x]])

    def error(by: str) -> float:
        small = prune(graph, '"0"', data, ratio=1 / 8, align=1, by=by, refit=True)
        assert shape(small, "0.weight") == (7, 16)
        with torch.no_grad():
            return float((interpret(small, [x])[0] - net(x)).norm() / net(x).norm())

    assert error("reconstruction") < 1e-3 < 0.01 < error("activation")


def test_what_cannot_be_refitted_has_the_scores_of_taylor() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    graph = dfc.trace(net, (x,))
    data = Context(examples=[[x]])
    options = {"ratio": 0.5, "refit": True}
    small, other = (prune(graph, ctx=data, by=by, **options) for by in ("reconstruction", "taylor"))
    assert shape(small, "0.weight") == (8, 3, 3, 3)
    assert torch.equal(numbers(small, "2.weight"), numbers(other, "2.weight"))


def test_reconstruction_costs_what_solving_again_costs() -> None:
    """The order and the losses, against solving the least squares for every unit left out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    x = torch.randn(300, 6)
    graph = dfc.trace(net, (x,))
    groups = find_groups(graph)
    (g,) = [g for g in groups.groups if g.size == 9]
    scores = by_reconstruction(groups, [g], [[x]], Context())[g] / 300
    with torch.no_grad():
        read = torch.cat([net[:2](x), torch.ones(300, 1)], 1).double()
    h = read.T @ read / 300
    h.diagonal().add_(10 / 300 * h.diagonal().mean())
    w = torch.cat([net[2].weight, net[2].bias[:, None]], 1).detach().double()

    def loss(units: list[int]) -> float:
        left = [*units, 9]
        gone = [i for i in range(9) if i not in units]
        rest = h[gone][:, gone] - h[gone][:, left] @ h[left][:, left].inverse() @ h[left][:, gone]
        return float((w[:, gone] @ rest * w[:, gone]).sum())  # gradients by the outputs are 1

    left = list(range(9))
    for unit in scores.argsort().tolist()[:-1]:
        fewer = {u: loss([i for i in left if i != u]) - loss(left) for u in left}
        assert unit == min(fewer, key=fewer.__getitem__)
        assert float(scores[unit]) == pytest.approx(fewer[unit], rel=1e-5)
        left.remove(unit)


def test_refitting_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = dfc.trace(Pixels().eval(), (x[:20],))
    journal = Journal(tmp_path, every_s=0)
    solved: list[str] = []
    solve, kill = fitting._solve, "c.weight"

    def counted(layer: Any, *rest: Any) -> Any:
        if layer.weight.name == kill:
            raise KeyboardInterrupt
        solved.append(layer.weight.name)
        return solve(layer, *rest)

    monkeypatch.setattr(fitting, "_solve", counted)
    with pytest.raises(KeyboardInterrupt):
        halved(graph, x, journal=journal)
    kill = ""
    again = halved(graph, x, journal=journal)
    assert solved == ["b.weight", "c.weight"]
    once = halved(graph, x)
    for name in ("b.weight", "c.weight", "c.bias"):
        assert torch.equal(numbers(again, name), numbers(once, name))


# Whole layers


def test_the_layer_that_does_least_goes() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.layers[2].down.weight *= 0.01  # type: ignore[union-attr,operator]
        net.layers[2].down.bias *= 0.01  # type: ignore[union-attr,operator]
    graph = dfc.trace(net, (X,))
    assert [b.path for b in find_blocks(graph) if not b.reason] == [f"layers.{i}" for i in range(4)]
    for by in ("magnitude", "activation"):
        small = prune(graph, ctx=Context(examples=[[X]]), what="layers", ratio=0.25, by=by)
        assert not any(name.startswith("layers.2.") for name in small.parameters)
        assert sum(name.startswith("layers.1.") for name in small.parameters) == 6
    shorter = copy.deepcopy(net)
    del shorter.layers[2]
    torch.testing.assert_close(interpret(small, [X])[0], shorter(X))


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_layers_without_a_residual_stay_and_say_so() -> None:
    graph = dfc.trace(Uneven().eval(), (X,))
    with pytest.raises(DfcError, match="no layer that") as error:
        prune(graph, '"layers.*"', what="layers")
    assert error.value.code == "Q071"
    assert any("no residual ties" in n for n in error.value.diagnostics[0].notes)


# Recipes


def compiled(net: Net, steps: str, head: str = "", **options: Any) -> dfc.Compiled:
    text = f"dfc 1\n{head}\nrecipe r {{\n{steps}\n}}\n"
    return dfc.compile(net, (X,), recipe=text, engine="eager", **options)


def data_bytes(package: Path) -> int:
    """Of the weights' file, without the table of names, which is as long as before."""
    data = (package / "weights.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_a_recipe_prunes_predicts_and_packs_what_is_left(net: Net, tmp_path: Path) -> None:
    said: list[str] = []
    whole = compiled(net, "dce")
    small = compiled(
        net, 'p: prune "layers.*.up" by activation using calib with ratio=0.5, refit=yes',
        "data calib", data={"calib": [X]}, progress=said.append,
    )  # fmt: skip
    (note,) = [n for n in small.report.notes if "predicted" in n]
    assert note in said and "fewer multiply-adds" in note and "x as fast by the roofline" in note
    whole.save(tmp_path / "whole.dfcpkg")
    small.save(tmp_path / "small.dfcpkg")
    small.export(tmp_path / "small.onnx")
    bytes_of = {n: data_bytes(tmp_path / n) for n in ("whole.dfcpkg", "small.dfcpkg")}
    kept = work_of(small.graph).weight_bytes / work_of(whole.graph).weight_bytes
    assert bytes_of["small.dfcpkg"] <= 1.02 * kept * bytes_of["whole.dfcpkg"]
    import onnx

    shapes = {tuple(t.dims) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert (32, 16) in shapes or (16, 32) in shapes
    assert not shapes & {(64, 16), (16, 64), (64,)}
    again = dfc.load(tmp_path / "small.dfcpkg", engine="eager")
    torch.testing.assert_close(again(X), small(X))


def test_keep_if_smaller_and_taking_it_back(net: Net) -> None:
    kept = compiled(net, 'p: prune "layers.*.up" keep if smaller with ratio=0.5')
    assert shape(kept.graph, "layers.0.up.weight") == (32, 16)
    back = compiled(net, 'p: prune "layers.*.up" with ratio=0.5\nrevert p')
    assert shape(back.graph, "layers.0.up.weight") == (64, 16)


# Explained


def test_explain_lists_the_groups_and_why_others_stay(graph: Graph) -> None:
    text = str(dfc.explain(graph, pass_="prune", passes=["prune"], all=True))
    assert "layers.0.up: 64 ffn, importance" in text
    assert "layers.0.up.weight[0]" in text and "48 of 64 stay" in text
    assert "it is a size of the output" in text


# Refused in words


def refused(graph: Graph, select: str = "", **options: Any) -> DfcError:
    with pytest.raises(DfcError) as error:
        prune(graph, select, **options)
    return error.value


def test_layers_that_cannot_be_pruned_are_named_with_their_reason(graph: Graph) -> None:
    error = refused(graph, '"head"')
    assert error.code == "Q071" and "`head`" in "".join(error.diagnostics[0].notes)
    assert "size of the output" in "".join(error.diagnostics[0].notes)
    assert error.diagnostics[0].span is not None


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"what": "heads"}, "Q071", "no heads of this model can be pruned"),
        ({"what": "layers", "ratio": 0.1}, "Q072", "less than one"),
        ({"align": 256}, "Q072", "`align=256` leaves nothing to prune"),
    ],
)
def test_a_step_that_can_do_nothing_is_refused(
    graph: Graph, options: dict[str, Any], code: str, words: str
) -> None:
    error = refused(graph, **options)
    assert error.code == code and words in error.message


def test_an_error_of_a_step_stands_where_the_step_does(net: Net) -> None:
    with pytest.raises(DfcError) as error:
        compiled(net, "  cse\n  prune with ratio=1.5")
    span = error.value.diagnostics[0].span
    assert span is not None and span.text is not None and "ratio=1.5" in span.text


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.3, 30.0])
def test_a_ratio_out_of_range_is_refused(graph: Graph, ratio: float) -> None:
    error = refused(graph, ratio=ratio)
    assert error.code == "Q070" and "between 0 and 1" in error.message


def test_an_alignment_that_leaves_nothing_is_refused(graph: Graph) -> None:
    assert refused(graph, align=0).code == "Q070"
    error = refused(graph, '"layers.*.up"', align=64)
    assert error.code == "Q072" and "layers.0.up" in error.message
    assert "align=1" in str(error.diagnostics[0].help)


def test_a_selector_that_matches_nothing_is_refused_with_the_nearest(net: Net) -> None:
    with pytest.raises(DfcError, match="layers") as error:
        compiled(net, 'p: prune "layer.*.up"')
    assert error.value.code == "Q021"


def test_missing_data_is_refused(graph: Graph) -> None:
    assert refused(graph, by="taylor").code == "Q073"
    assert refused(graph, refit=True).code == "Q073"
    assert refused(graph, by="taylor", calib="val").code == "D084"


def test_what_changes_the_rest_is_taken_only_when_asked_for() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))  # type: ignore[no-any-return]

    graph = dfc.trace(Normed().eval(), (X,))
    error = refused(graph, '"a"')
    assert "what=width" in "".join(error.diagnostics[0].notes)
    assert shape(prune(graph, '"a"', what="width", ratio=0.5), "norm.weight") == (16,)


def test_the_prediction_stands_on_stderr_before_anything_is_measured(tmp_path: Path) -> None:
    """Progress is shown after a second; what a pass tells is shown in any case."""
    from typer.testing import CliRunner

    from dfc.cli.command import app

    graph, recipe = tmp_path / "net.pt2", tmp_path / "p.dfc"
    torch.export.save(torch.export.export(Net().eval(), (X,)), graph)
    recipe.write_text("dfc 1\nrecipe p {\n  prune with ratio=0.5\n}\n")
    done = CliRunner().invoke(
        app, ["compile", str(graph), "-r", str(recipe), "--engine", "eager", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "prune: predicted" in done.stderr and done.stdout.startswith("{")
