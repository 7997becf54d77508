"""`recover`: a function of the user trains what was pruned; its weights are taken if they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.emit.trainable import TrainableGraph
from dfc.errors import DfcError
from dfc.rewrite.pass_ import Context, find_pass

X = torch.linspace(-2, 2, 6 * 8).reshape(6, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.down(self.norm(torch.relu(self.up(x))))}


def distil(module: nn.Module, batches: list[Tensor]) -> None:
    teacher = Net().eval()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(60):
        for x in batches:
            loss = (module(x)["y"] - teacher(x)["y"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compiled(steps: str, train: Any = None, **options: Any) -> dfc.Compiled:
    text = f"dfc 1\ndata texts\nrecipe r {{\n{steps}\n}}\n"
    functions = {} if train is None else {"distil": train}
    return dfc.compile(
        Net().eval(), (X,), recipe=text, engine="eager", data={"texts": [X]}, functions=functions,
        **options,
    )  # fmt: skip


PRUNE = 'prune "up" with ratio=0.5, what=width\n'


def error(found: dfc.Compiled) -> float:
    return float((found(X)["y"] - Net().eval()(X)["y"]).detach().norm())


def test_results_that_are_no_numbers_any_more_are_told() -> None:
    """The largest error is that of numbers, and says nothing of them."""

    def grow(module: nn.Module) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(3e4)

    recipe = "dfc 1\nrecipe r {\n  recover by grow\n}\n"
    layer, x = nn.Linear(8, 4).half().eval(), torch.ones(2, 8).half()
    made = dfc.compile(layer, (x,), recipe=recipe, engine="eager", functions={"grow": grow})
    (note,) = [n for n in made.report.notes if "NaN or infinite" in n]
    assert made(x).isinf().all() and not note.startswith("0 of")
    recipe = recipe.replace("recover by grow", "quantize int8 with smallest=1")
    made = dfc.compile(layer, (x,), recipe=recipe, engine="eager")
    assert not [n for n in made.report.notes if "NaN or infinite" in n]


def test_training_brings_back_what_pruning_took() -> None:
    pruned = compiled(
        f"{PRUNE}recover by noop using texts".replace("noop", "distil"), lambda m, d: None
    )
    trained = compiled(f"{PRUNE}recover by distil using texts", distil)
    assert error(trained) < 0.2 * error(pruned), (error(trained), error(pruned))
    assert trained.graph.parameters["up.weight"].tensor_type.shape == (16, 8)
    (before,) = [p for p in pruned.report.passes if p.step.startswith("recover")]
    (after,) = [p for p in trained.report.passes if p.step.startswith("recover")]
    assert (before.changes, after.changes) == (0, 6)


def test_the_module_is_called_like_the_model_and_has_its_names() -> None:
    graph = dfc.trace(Net().eval(), (X,))
    module = TrainableGraph(graph)
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in Net().named_parameters()}
    torch.testing.assert_close(module(X), Net().eval()(X))
    module(x=X)["y"].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.state_dict().keys() == Net().state_dict().keys()


def test_weights_that_a_pass_has_made_are_trained_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    graph = dfc.trace(net, (torch.randn(2, 3, 6, 6),))
    find_pass("fold_batch_norm").run(graph, Context())
    find_pass("dce").run(graph, Context())
    assert len(list(TrainableGraph(graph).parameters())) == 2


def diverge(module: nn.Module, data: Any) -> None:
    with torch.no_grad():
        next(iter(module.parameters()))[0] = float("nan")


def fail(module: nn.Module, data: Any) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).zero_()
    raise RuntimeError("out of texts")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (diverge, "left 8 of 256 numbers that are not finite"),
        (fail, "raised RuntimeError: out of texts"),
    ],
)
def test_a_function_that_fails_leaves_the_graph_as_it_was(train: Any, said: str) -> None:
    graph = dfc.trace(Net().eval(), (X,))
    before = graph.fingerprint()
    step = find_pass("recover", {"function": "distil", "calib": "texts"})
    with pytest.raises(DfcError, match=said) as error:
        step.run(graph, Context(functions={"distil": train}, data={"texts": [X]}))
    assert (error.value.code, error.value.status) == ("K040", 8)
    assert graph.fingerprint() == before
    with pytest.raises(DfcError, match=said):
        compiled("recover by distil using texts", train)


def test_what_a_function_must_not_do_is_told_with_what_to_do() -> None:
    def another(module: Any, data: Any) -> Any:
        return nn.Linear(2, 2)

    def narrower(module: Any, data: Any) -> None:
        weight = next(module.parameters())
        weight.data = weight.data[:1].clone()

    def three(module: Any, data: Any, teacher: Any) -> None:
        raise AssertionError("it is not called")

    def told(train: Any) -> str:
        with pytest.raises(DfcError) as error:
            compiled("recover by distil using texts", train)
        return str(error.value)

    assert "returned another module" in told(another) and "in place" in told(another)
    assert "gave it the shape [1," in told(narrower) and "learning rate" not in told(narrower)
    assert "'teacher'" in told(three) and "called as distil(module, texts)" in told(three)
    idle = compiled("recover by distil using texts", lambda module, data: 0.25)
    assert (
        "recover: `distil` changed no weight of the module that it was given" in idle.report.notes
    )


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_what_is_put_beside_or_in_the_place_of_weights_is_told() -> None:
    """The graph computes with its own weights: what adapters add would be lost in silence."""

    def parametrized(module: nn.Module, data: Any) -> None:
        nn.utils.parametrize.register_parametrization(module.up, "weight", Halved())
        distil(module, data)

    def replaced(module: nn.Module, data: Any) -> None:
        module.up.weight = nn.Parameter(torch.zeros(32, 8))

    def adapted(module: nn.Module, data: Any) -> None:
        module.low = nn.Linear(8, 2)

    def merged(module: nn.Module, data: Any) -> None:
        nn.utils.parametrize.register_parametrization(module.up, "weight", Halved())
        nn.utils.parametrize.remove_parametrizations(module.up, "weight")

    def helped(module: nn.Module, data: Any) -> None:
        module.teacher = nn.Linear(4, 4)
        distil(module, data)

    for train, said in (
        (parametrized, "in the place of `up.weight`"), (replaced, "in the place of `up.weight`"),
        (adapted, "added the new parameters `low.weight` and 1 more, and changed no weight"),
    ):  # fmt: skip
        with pytest.raises(DfcError) as error:
            compiled("recover by distil using texts", train)
        assert error.value.code == "K040" and said in str(error.value), train
        assert "copy_" in str(error.value.diagnostics[0].help)
    found = compiled("recover by distil using texts", merged)
    torch.testing.assert_close(
        found.graph.parameters["up.weight"].data.tensor(), Net().up.weight.detach() / 2
    )
    found = compiled(f"{PRUNE}recover by distil using texts", helped)
    assert any("teacher.weight` and 1 more, which `distil` added" in n for n in found.report.notes)


def test_zeros_that_training_fills_are_told() -> None:
    def kept(module: nn.Module, data: Any) -> None:
        masks = {p: p != 0 for p in module.parameters() if p.dim() > 1}
        distil(module, data)
        for p, mask in masks.items():
            p.data.mul_(mask)

    for train, lost in ((distil, True), (kept, False)):
        steps = 'sparsify "up" by magnitude\nrecover by distil using texts'
        notes = compiled(steps, train).report.notes
        told = [n for n in notes if "filled the zeros of `up.weight`, which was sparse" in n]
        assert bool(told) == lost


def test_a_function_or_data_that_was_not_passed_is_named() -> None:
    with pytest.raises(DfcError, match="function `distil` is not passed") as error:
        compiled("recover by distil using texts")
    assert error.value.code == "Q074" and "--function distil=" in str(
        error.value.diagnostics[0].help
    )
    with pytest.raises(DfcError, match="is a int, not a function"):
        compiled("recover by distil using texts", 3)
    step = find_pass("recover", {"function": "distil", "calib": "text"})
    with pytest.raises(DfcError, match="data `text` is not passed"):
        step.run(
            dfc.trace(Net().eval(), (X,)), Context(functions={"distil": distil}, data={"texts": []})
        )


def test_the_command_takes_a_function(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dfc.cli.command import app

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(3, 2).eval(), (torch.ones(1, 3),)\n"
        "def double(module):\n"
        "    with torch.no_grad():\n"
        "        module.weight.mul_(2)\n"
        "        module.bias.mul_(2)\n"
    )
    (tmp_path / "r.dfc").write_text("dfc 1\nrecipe r {\n  recover by double\n}\n")
    place = f"{tmp_path}/net.py"
    arguments = ["compile", f"{place}:build", "-r", f"{tmp_path}/r.dfc", "--engine", "eager",
                 "-o", f"{tmp_path}/m.dfcpkg", "--function", f"double={place}:double"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    wanted = 2 * torch.nn.Linear(3, 2)(torch.ones(1, 3))
    torch.testing.assert_close(dfc.load(tmp_path / "m.dfcpkg")(torch.ones(1, 3)), wanted.detach())


@pytest.mark.slow
def test_the_example_gives_a_smaller_network_that_is_as_right() -> None:
    import subprocess
    import sys

    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "examples/prune_and_recover.py"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("bytes ")[1].split()
    assert int(words[2]) < 0.5 * int(words[0]), done.stdout
    assert "top1 >= baseline - 1pp: met" in done.stdout


def test_what_a_model_froze_is_not_trained_unless_it_froze_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    args = (torch.randn(2, 4),)
    assert set(TrainableGraph(dfc.trace(model, args)).weights()) == {"2.weight", "2.bias"}
    model.requires_grad_(False)
    assert len(TrainableGraph(dfc.trace(model, args)).weights()) == 4
