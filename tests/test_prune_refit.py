"""What is left of a pruned layer is refitted to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress import refit as fitting
from dfc.compress.sequential import Prefix
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context
from tests.pruned import Net, numbers, prune, shape


def test_refitting_to_the_data_is_nearer_to_the_original() -> None:
    net = Net().eval()
    torch.manual_seed(1)
    low_rank = torch.randn(256, 4) @ torch.randn(4, 16)  # hidden units depend on one another
    data = Context(data={"calib": [low_rank[:128], low_rank[128:]]})
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
