"""A compiled model among other Python: copies, other processes, the modes that PyTorch is in."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import dfc
from dfc.ir.weights import TensorData
from dfc.recipe.requirements import RequirementMissed
from dfc.report import Report, RequirementReport


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls


@pytest.fixture(scope="module")
def compiled() -> dfc.Compiled:
    torch.manual_seed(0)
    return dfc.compile(Counter().eval(), (torch.ones(2, 8),), engine="eager", verify="none")


def test_completion_offers_what_is_for_users() -> None:
    assert {*dfc.__all__} <= {*dir(dfc)}


def test_a_deep_copy_has_a_state_of_its_own(compiled: dfc.Compiled) -> None:
    twin = copy.deepcopy(compiled)
    before = compiled.state["calls"].item()
    twin(torch.ones(2, 8))
    assert compiled.state["calls"].item() == before
    assert twin.state["calls"].item() == before + 1
    assert copy.deepcopy(compiled.graph) == compiled.graph


def test_a_compiled_model_says_how_it_gets_to_another_process(compiled: dfc.Compiled) -> None:
    with pytest.raises(dfc.DfcError, match=r"K024.*\n.*dfc\.load"):
        pickle.dumps(compiled)


def test_weights_can_be_pickled() -> None:
    weight = torch.nn.init.ones_(torch.empty(3))  # written to: its version is not 0
    again = pickle.loads(pickle.dumps(TensorData("w", weight)))
    assert torch.equal(again.tensor(), weight)


def test_errors_come_back_from_another_process() -> None:
    error = dfc.DfcError("D050", "there is no `x`", help="write y", status=7)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(again), again.code, again.status) == (str(error), "D050", 7)
    compiled = type("Made", (), {"report": Report(model="m")})()
    missed = RequirementMissed([RequirementReport("size <= 1", False, "size is 2")], compiled)
    again = pickle.loads(pickle.dumps(missed))
    assert (again.status, again.report, again.compiled) == (5, missed.report, None)


def test_a_notebook_shows_the_report_and_the_plan(compiled: dfc.Compiled) -> None:
    assert repr(compiled.report) == f"<dfc report of Counter: {compiled.report.proof}>"
    shown = compiled.report._repr_html_()
    assert shown.count("<") == 2 and "&lt;h1&gt;Counter&lt;/h1&gt;" in shown  # the frame alone
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    target = "dfc 1\ntarget t { device a : h100 }\n"
    plan = dfc.plan(model, target, (torch.ones(2, 8),))
    assert repr(plan) == "<dfc plan main: 1 stage on a>"


def test_autocast_around_a_call_changes_nothing(compiled: dfc.Compiled) -> None:
    x = torch.randn(2, 8)
    first, second = copy.deepcopy(compiled), copy.deepcopy(compiled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = first(x)
    assert torch.equal(found, second(x))


def test_a_gradient_that_would_end_is_told(compiled: dfc.Compiled) -> None:
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.warns(UserWarning, match="no gradients"):
        assert not compiled(x).requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            compiled(x)
        compiled(x.detach())


def test_arrays_are_refused_with_what_converts_them(compiled: dfc.Compiled) -> None:
    with pytest.raises(dfc.DfcError, match=r"torch\.as_tensor"):
        compiled(torch.ones(2, 8).numpy())
    with pytest.raises(dfc.DfcError, match="takes 1 positional argument, got 2"):
        compiled(torch.ones(2, 8), 1)
