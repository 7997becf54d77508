"""`worst(n)` in recipes: the layers that a step costs the most in are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.errors import DfcError
from dfc.lang.selectors import parse_selector
from dfc.lang.source import Source
from dfc.recipe.resolve import check_source, resolve
from tests.four_layers import RECIPE, graph, layers, net


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DFC_CACHE", str(tmp_path / "cache"))


def compiled(text: str, **options: Any) -> Any:
    model, args = net()
    return dfc.compile(
        model, args, recipe=f"dfc 1\nrecipe r {{\n  {text}\n}}\n", engine="eager", **options
    )


def stays(c: Any) -> set[str]:
    """The layers whose weights are f32 still."""
    return {
        n.split(".")[0] for n, p in c.graph.parameters.items() if str(p.tensor_type.dtype) == "f32"
    }


def test_the_worst_layers_are_left_out() -> None:
    model, args = net()
    (found,) = dfc.sensitivity(model, args, recipe=RECIPE, times=False)
    order = layers(found)
    c = compiled("autocast bf16 except worst(2)")
    assert stays(c) == set(order[:2])
    (told,) = [d for d in c.report.decisions if d.step == "autocast: worst"]
    assert told.reason.startswith(f"{order[0]}, {order[1]} of 4 layers")
    assert stays(compiled("autocast bf16 except worst(50%)")) == set(order[:2])
    assert stays(compiled("autocast bf16 except worst(1%)")) == set(order[:1])


class Branches(nn.Module):
    """The layer of the large results is far off in numbers; decisions hang on the small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.fine = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1000 * self.large(x), self.fine(x)


def _nearness(run: Any, data: Any) -> Tensor:
    """For each item, how near the second result is to what it should be."""
    return torch.cat([-(run(x)[1] - y).abs().sum(-1) for x, y in data])


def test_the_metric_says_which_layers_are_worst_where_the_recipe_names_one() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(64, 8)
    data = {"val": [(x, model(x)[1].detach())]}
    head = "dfc 1\ndata val\nmetric nearness on val, higher is better\nrecipe r {\n"
    for goal in ("", "  minimize size\n  require nearness >= baseline - 1\n"):
        recipe = f"{head}{goal}  autocast bf16 except worst(1)\n}}\n"
        c = dfc.compile(
            model, (x,), recipe=recipe, engine="eager", data=data, metrics={"nearness": _nearness}
        )
        assert stays(c) == {"fine"}
        (told,) = [d for d in c.report.decisions if d.step == "autocast: worst"]
        assert told.reason == "fine of 2 layers, by the drop of nearness"
    with pytest.raises(DfcError, match="metric `nearness` is not passed"):
        dfc.compile(model, (x,), recipe=recipe, engine="eager", data=data)


def test_worst_combines_with_what_is_named() -> None:
    assert stays(compiled('autocast bf16 except worst(1), "a"')) == {"a", "b"}
    assert stays(compiled('autocast bf16 on "a", "c" except worst(1)')) >= {"b", "head"}
    assert len(stays(compiled('autocast bf16 on "a", "c" except worst(1)'))) == 3


class Tied(nn.Module):
    """An output layer that shares the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


def test_a_shared_table_is_a_layer_of_the_part_that_the_step_names() -> None:
    """The embedding reads what changes, and a step on linear layers finds nothing in it."""
    torch.manual_seed(0)
    model, args = Tied().eval(), (torch.arange(12).reshape(3, 4),)
    step = "quantize int8 using calib with smallest=1"
    text = f"dfc 1\ndata calib\nrecipe r {{\n  {step.replace(' using', ' on op(linear) using')}"
    data = {"calib": [args]}
    (found,) = dfc.sensitivity(model, args, recipe=f"{text}\n}}\n", data=data, times=False)
    assert sorted(layers(found)) == ["head", "mid"]
    both = text.replace(" on op(linear)", "")
    (found,) = dfc.sensitivity(model, args, recipe=f"{both}\n}}\n", data=data, times=False)
    assert sorted(layers(found)) == ["embed", "mid"], "two that share a table are one layer"
    assert sum(e.bytes for e in found.layers) == found.whole.bytes
    worst = text.replace(" with", " except worst(1) with")
    c = dfc.compile(model, args, recipe=f"{worst}\n}}\n", data=data, engine="eager")
    assert sum(n.op.startswith("dfc.") for n in c.graph.nodes) == 1, "one of two linear layers"
    told = [n for n in c.report.notes if "was not read" in n]
    assert len(told) == 1, "a step that is tried layer by layer tells once what it tells"


def test_worst_is_text_until_it_is_measured() -> None:
    text = "dfc 1\nrecipe r {\n  autocast bf16 except worst(3)\n}\n"
    g, _ = graph()
    assert check_source(Source(text), g) == ([], [])
    plan = resolve(Source(text))
    assert "worst(3)" in str(plan) and resolve(Source(str(plan))) == plan
    assert parse_selector('worst(2) | "a"').nodes_left(g)[0].loc.module == "a"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text, words",
    [
        ("autocast bf16 except worst(0)", "takes a whole number above 0, or a share"),
        ("autocast bf16 except worst(101%)", "takes a whole number above 0, or a share"),
        ("autocast bf16 except worst(a)", "takes a whole number above 0, or a share"),
        ("fuse attention except worst(2)", "`fuse` cannot be measured layer by layer"),
        ("autocast bf16 except wurst(2)", "did you mean `worst`"),
    ],
)
def test_worst_where_it_cannot_be(text: str, words: str) -> None:
    errors, _ = check_source(Source(f"dfc 1\nrecipe r {{\n  {text}\n}}\n"))
    shown = " ".join(f"{e.message} {e.help}" for e in errors)
    assert words in shown
