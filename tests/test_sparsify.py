"""Weights that become 0: how many, which, and what the others do about it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.compress.calibrate import batches_of
from dfc.compress.hessian import Hessian
from dfc.compress.sequential import Group, groups_of, layer_by_layer, weight_of
from dfc.compress.sparse import Sparsity, magnitude, settled, sparsegpt, wanda
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context, find_pass
from tests.test_gptq import layer
from tests.tiny_models import CALIB, run_step, tiny_llama, tokens

HALF, PAIRS, QUADS = Sparsity(0.5), Sparsity(zeros=2, of=4), Sparsity(zeros=4, of=8)


def zeros_of_each(w: torch.Tensor, of: int) -> set[int]:
    return set((w.reshape(-1, of) == 0).sum(dim=1).tolist())


@pytest.mark.parametrize("sparsity", [HALF, Sparsity(0.3), Sparsity(0.0), PAIRS, QUADS], ids=str)
def test_exactly_so_many_become_0(sparsity: Sparsity) -> None:
    w, hessian = layer(12, 160)
    found = {
        "magnitude": magnitude(w, sparsity),
        "wanda": wanda(w, hessian, sparsity),
        "sparsegpt": sparsegpt(w, hessian, sparsity)[0],
    }
    for name, sparse in found.items():
        share = 0.5 if sparsity.of else sparsity.ratio
        assert int((sparse == 0).sum()) == round(share * w.numel()), name
        if sparsity.of:
            assert zeros_of_each(sparse, sparsity.of) == {sparsity.zeros}, name
    for name in ("magnitude", "wanda"):
        kept = found[name] != 0
        assert torch.equal(found[name][kept], w[kept]), name


@pytest.mark.parametrize("sparsity", [HALF, PAIRS, QUADS], ids=str)
def test_each_method_hurts_less_than_the_one_before(sparsity: Sparsity) -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.rand(160, generator=g) * 3 + 0.1  # inputs of differing size
    x = (torch.randn(400, 160, generator=g) @ torch.randn(160, 160, generator=g)) * size
    hessian = Hessian(160)
    hessian.update(x)
    w = torch.randn(12, 160, generator=g)
    by_size = hessian.loss(magnitude(w, sparsity) - w)
    by_input = hessian.loss(wanda(w, hessian, sparsity) - w)
    compensated = hessian.loss(sparsegpt(w, hessian, sparsity)[0] - w)
    assert compensated < by_input < by_size


def test_wanda_is_best_where_inputs_are_independent() -> None:
    """With a diagonal Hessian the score is the loss itself: no other choice is better."""
    hessian = Hessian(6)
    hessian.update(torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1, 1.0])))
    w = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    choices = itertools.combinations(range(6), 3)
    losses = [hessian.loss(-w * torch.isin(torch.arange(6), torch.tensor(c))) for c in choices]
    assert hessian.loss(wanda(w, hessian, HALF) - w) == pytest.approx(min(losses))


@pytest.mark.parametrize("sparsity", [HALF, PAIRS], ids=str)
def test_weights_that_stay_are_the_best_for_their_zeros(sparsity: Sparsity) -> None:
    """Beside a solution of each row alone, in double precision."""
    w, hessian = layer(12, 160)
    sparse, used = sparsegpt(w, hessian, sparsity)
    h = hessian.sum + used.damping * hessian.sum.diagonal().mean() * torch.eye(160)
    best = torch.zeros(12, 160, dtype=torch.float64)
    for row, goal, kept in zip(best, w.double(), sparse != 0, strict=True):
        row[kept] = torch.linalg.solve(h[kept][:, kept], (h @ goal)[kept])
    lost, least = hessian.loss(sparse - w), hessian.loss(best - w)
    assert least * 0.999 < lost < least * 1.01, (lost, least)


def test_zeros_stay_where_a_layer_is_settled() -> None:
    w, hessian = layer(12, 160)
    sparse = magnitude(w, HALF)
    better = settled(w, sparse, hessian, damping=0.0)
    assert ((better == 0) == (sparse == 0)).all()
    assert hessian.loss(better - w) < 0.7 * hessian.loss(sparse - w)


def test_sparsegpt_compensates_as_least_squares_would() -> None:
    """With one weight per row to remove, what is left is close to the refit on the others."""
    w, hessian = layer(5, 16, tokens=200)
    sparse, _ = sparsegpt(w, hessian, Sparsity(1 / 16), damping=1e-6)
    for row, before in zip(sparse.double(), w.double(), strict=True):
        kept = (row != 0).nonzero().flatten()
        h = hessian.sum
        best = torch.linalg.solve(h[kept][:, kept], h[kept] @ before)
        refit = torch.zeros(16, dtype=torch.float64)
        refit[kept] = best
        loss, least = (hessian.loss((r - before)[None].float()) for r in (row, refit))
        masked = hessian.loss(((row != 0) * before - before)[None].float())
        assert least <= loss * (1 + 1e-4) + 1e-9 and loss <= masked * (1 + 1e-4)


def test_dead_inputs_are_the_first_to_go() -> None:
    w, _ = layer(4, 32)
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 17]] = 0
    hessian = Hessian(32)
    hessian.update(x)
    for sparse in (wanda(w, hessian, HALF), sparsegpt(w, hessian, HALF)[0]):
        assert not sparse[:, [3, 17]].any()


# The step


@pytest.fixture(scope="module")
def graph() -> Graph:
    return dfc.trace(tiny_llama(), (tokens(),))


def zeros_by_layer(graph: Graph) -> dict[str, float]:
    layers = [n for n in graph.nodes if weight_of(n)]
    return {n.loc.module: float((weight_of(n).data.tensor() == 0).float().mean()) for n in layers}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_step_thins_every_layer_but_the_tied_table(graph: Graph, method: str) -> None:
    using = "" if method == "magnitude" else "using calib"
    sparse, changes, ctx = run_step(graph, f"sparsify {using} by {method}")
    found = zeros_by_layer(sparse)
    assert found.pop("lm_head") == 0 and len(found) == 14 == changes
    assert set(found.values()) == {0.5}
    verify(sparse)
    told = {d.outcome: d.reason for d in ctx.decisions}
    assert "no speed on this target" in told["sparsified"]
    assert "%embedding (aten.embedding.default)" in told["kept"]


def test_a_pattern_and_a_part_of_the_model(graph: Graph) -> None:
    text = 'sparsify "model.layers.1.**" using calib by wanda except "**.mlp.**" with pattern="2:4"'
    sparse, changes, _ = run_step(graph, text)
    found = {k: v for k, v in zeros_by_layer(sparse).items() if v}
    assert changes == 4 and set(found) == {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"}
    for node in sparse.nodes:
        if weight_of(node) and node.loc.module in found:
            assert zeros_of_each(weight_of(node).data.tensor(), 4) == {2}


def test_layers_are_thinned_on_what_sparse_layers_give(graph: Graph) -> None:
    """The second block's choice depends on the first block's zeros."""
    whole, _, _ = run_step(graph, "sparsify using calib by wanda with ratio=0.9")
    alone, _, _ = run_step(
        graph, 'sparsify "model.layers.1.**" using calib by wanda with ratio=0.9'
    )

    def mask(graph: Graph) -> torch.Tensor:
        last = [n for n in graph.nodes if n.loc and n.loc.module == "model.layers.1.mlp.down_proj"]
        return weight_of(last[0]).data.tensor() == 0

    assert not torch.equal(mask(whole), mask(alone))


def test_the_step_is_the_sum_of_its_parts(graph: Graph) -> None:
    """The first group's Hessian is that of the float model: the step equals the algorithm."""
    sparse, _, _ = run_step(graph, 'sparsify "model.layers.0.self_attn.q_proj" using calib')
    (layer,) = [n for n in graph.nodes if n.loc and n.loc.module.endswith("0.self_attn.q_proj")][:1]
    hessian = Hessian(32)

    def watch(node: Node, results: Any) -> None:
        if layer.inputs[0] in node.results:
            hessian.update(results[0])

    for batch in CALIB:
        interpret(graph, [batch], observe=watch)
    wanted, _ = sparsegpt(weight_of(layer).data.tensor(), hessian, HALF)
    made = sparse.parameters["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(made.data.tensor(), wanted)


def test_thinned_again_by_magnitude_nothing_changes(graph: Graph) -> None:
    sparse, _, _ = run_step(graph, "sparsify by magnitude")
    again, changes, ctx = run_step(sparse, "sparsify by magnitude")
    assert changes == 0 and again == sparse
    assert any("sparse already" in d.reason for d in ctx.decisions)


class Seen:
    """A method that changes nothing and counts tokens."""

    key = ""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def solve(self, group: Group, hessian: Hessian) -> None:
        self.tokens.append(hessian.tokens)

    def weights(self, group: Group) -> dict[str, torch.Tensor]:
        return {}


def test_a_weight_that_an_unchosen_layer_shares_stays() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    graph = dfc.trace(Tied().eval(), (torch.randn(3, 8),))
    same, changes, ctx = run_step(graph, 'sparsify "a" by magnitude')
    assert changes == 0 and same == graph
    assert "is read by %linear_1 (aten.linear.default) as well" in ctx.decisions[0].reason
    both, changes, _ = run_step(graph, "sparsify by magnitude")
    assert changes == 1 and zeros_by_layer(both) == {"a": 0.5, "b": 0.5}


def test_padding_is_not_seen() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    options = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, **options)).eval()
    mask = torch.ones(2, 16, dtype=torch.int64)
    graph = dfc.trace(model, (), {"input_ids": tokens(), "attention_mask": mask})
    seen = Seen()
    layer = next(n for n in graph.nodes if weight_of(n) is not None)
    mask[1, 5:] = 0
    batches = batches_of(
        Context(data={"c": [dict(input_ids=tokens(), attention_mask=mask)]}), "c", graph
    )
    layer_by_layer(graph, groups_of(graph, [layer]), batches, Context(), seen)
    assert seen.tokens == [16 + 5]


@pytest.mark.parametrize(
    "text, code, words",
    [
        ("sparsify using calib with ratio=1.5", "D095", "`ratio` is a number between 0 and 1"),
        ("sparsify using calib with ratio=0", "D095", "between 0 and 1, got 0"),
        ('sparsify using calib with pattern="4:2"', "D095", "got `4:2`"),
        ('sparsify using calib with pattern="half"', "D095", "got `half`"),
        ('sparsify by magnitude with pattern="2:4", ratio=0.9', "D095", "50% to 0, `ratio` 90%"),
        ('sparsify by magnitude with pattern="1:4", ratio=0.5', "D095", "75% to 0, `ratio` 50%"),
        ('sparsify using calib with pattern="2:6"', "D095", "power of two"),
        (
            'sparsify "**.q_proj" using calib with pattern="2:64"', "D095",
            "of `model.layers.0.self_attn.q_proj`: its 32 inputs are no multiple of 64",
        ),
        ("sparsify by wanda", "D085", "by wanda needs data"),
        ('sparsify "model.norm" using calib', "D093", 'no linear layer in `"model.norm"`'),
        ('sparsify "lm_head" using calib except "lm_*"', "D093", "excluded by the step"),
        ('sparsify "encoder.**" using calib', "Q021", "encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(graph: Graph, text: str, code: str, words: str) -> None:
    with pytest.raises(DfcError) as e:
        run_step(graph, text)
    assert e.value.code == code and words in str(e.value)


def test_layers_that_stay_dense_are_told(graph: Graph) -> None:
    """What was quantized before, and what is no linear layer, would be left in silence."""
    with pytest.raises(DfcError, match="`sparsify` cannot come after `quantize`"):
        dfc.compile(
            tiny_llama(), (tokens(),), recipe="dfc 1\nrecipe r {\n quantize int8\n sparsify\n}\n"
        )
    half, _, _ = run_step(graph, 'quantize int8 on "model.layers.0.**" with smallest=1')
    told: dict[str, Any] = {}
    find_pass("sparsify", {"method": "magnitude", "data": "calib", "damping": 0.5}).run(
        half, Context(products=told)
    )
    first, second = told["notes"]
    assert "7 layers read codes and stay as they are" in first and "before `quantize`" in first
    assert "`magnitude` does not read `damping`, `using calib`" in second
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 8)
    ).eval()
    told.clear()
    pictures = dfc.trace(net, (torch.ones(1, 3, 4, 4),))
    find_pass("sparsify", {"method": "magnitude"}).run(pictures, Context(products=told))
    assert "no convolutions or experts: layer %conv2d of `0` stay" in told["notes"][0]


def test_activations_that_overflow_are_blamed_on_the_layer(graph: Graph) -> None:
    broken = graph.copy()
    name = "model.layers.1.input_layernorm.weight"
    broken.parameters[name].data = TensorData(name, torch.full((32,), torch.nan))
    with pytest.raises(
        DfcError, match=r"of `model\.layers\.1\.self_attn\.q_proj` \(and .* NaN"
    ) as e:
        run_step(broken, "sparsify using calib")
    assert e.value.code == "D090"


def test_an_input_that_is_always_0_is_told(graph: Graph) -> None:
    broken = graph.copy()
    name = "model.layers.0.input_layernorm.weight"
    broken.parameters[name].data = TensorData(name, torch.zeros(32))
    with pytest.raises(DfcError, match=r"self_attn\.q_proj.*all its 32 inputs were 0") as e:
        run_step(broken, "sparsify using calib")
    assert e.value.code == "D091" and "`except`" in str(e.value.diagnostics[0].help)


@pytest.mark.parametrize(
    "text", ["sparsify using calib", 'sparsify using calib by wanda with pattern="2:4"']
)
def test_after_an_interrupt_it_goes_on_and_ends_equal(
    graph: Graph, text: str, tmp_path: Path
) -> None:
    wanted, _, _ = run_step(graph, text)
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 14:  # of 4 batches for each of 8 groups
            raise KeyboardInterrupt

    journal = Journal(tmp_path, every_s=0)
    with pytest.raises(KeyboardInterrupt):
        run_step(graph, text, progress=progress, journal=journal)
    assert calls == [*range(1, 15)]
    got, _, _ = run_step(graph, text, progress=progress, journal=journal)
    assert calls[14:] == [*range(13, 33)] and got == wanted
    other = [tokens(seed=s) for s in range(5, 9)]  # other data: from the start
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        run_step(graph, text, other, progress=progress, journal=journal)
    assert calls == [*range(1, 15)]


@pytest.mark.parametrize("data, code", [([], "D080"), ([torch.zeros(2, 99)], "D081")])
def test_data_that_does_not_fit(graph: Graph, data: Any, code: str) -> None:
    with pytest.raises(DfcError) as e:
        run_step(graph, "sparsify using calib", data)
    assert e.value.code == code


def test_in_a_recipe_and_a_package(tmp_path: Path) -> None:
    model = tiny_llama()
    text = "dfc 1\ndata calib\nrecipe r { sparsify using calib by wanda }"
    compiled = dfc.compile(model, (tokens(),), recipe=text, data={"calib": CALIB}, engine="eager")
    compiled.save(tmp_path / "m.dfcpkg")
    again = dfc.load(tmp_path / "m.dfcpkg")
    assert compiled.report.bytes_after <= compiled.report.bytes_before  # no weight is stored twice
    assert {*again.graph.parameters} <= {*dfc.trace(model, (tokens(),)).parameters}
    assert set(zeros_by_layer(again.graph).values()) == {0.5, 0.0}
