"""What cannot be pruned is refused, in words that name it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rewrite.pass_ import Context, find_pass
from tests.pruned import Net, X, compiled, prune, shape


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return dfc.trace(Net().eval(), (X,))


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


@pytest.mark.parametrize("options", [{"smallest": 1}, {"smallest": 1, "scheme": "static"}])
def test_what_reads_codes_is_to_be_pruned_before(graph: Graph, options: dict[str, Any]) -> None:
    data = {"data": "calib"} if "scheme" in options else {}
    coded = graph.copy()
    find_pass("quantize", options | data).run(coded, Context(data={"calib": [X]}))
    error = refused(coded)
    assert error.code == "Q071" and "reads codes in `layers" in error.diagnostics[0].notes[0]
    assert "`prune` goes before `quantize`" in str(error.diagnostics[0].help)


def test_activations_and_norms_are_no_layers() -> None:
    """They keep sizes, and have no weights or small ones: they would be the first to go."""

    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU())
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.stem(x))  # type: ignore[no-any-return]

    graph = dfc.trace(Staged().eval(), (X,))
    ctx = Context(decisions=[])
    small = prune(graph, ctx=ctx, what="layers", ratio=0.5)
    left = [n for n in small.nodes if n.op == "aten.linear.default"]
    assert len(left) == 2 + 2 * 2 and sum("relu" in n.op for n in small.nodes) == 1 + 2
    kept = " ".join(d.reason for d in ctx.decisions or ())
    assert "layer stem.2: it multiplies by no weights" in kept
    error = refused(graph, '"stem.**"', what="layers")
    assert error.code == "Q071" and "next to nothing" in " ".join(error.diagnostics[0].notes)
