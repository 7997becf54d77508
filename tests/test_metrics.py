"""Requirements that know how sure they are, and metrics that say nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.errors import DfcError
from tests.four_layers import net


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DFC_CACHE", str(tmp_path / "cache"))


# Requirements that know how sure they are


def required(limit: str, wrong: int, items: int, right: int = 0) -> Any:
    """A result that is wrong on `wrong` of the items that the original is right on."""

    def top1(run: Any, batches: Any) -> Tensor:
        x = batches[0]
        first = run(x).double()
        scores = torch.ones(items)
        scores[:right] = 0
        if bool((first != net()[0](x).double()).any()):  # not the original any more
            scores[: wrong + right] = torch.cat([torch.ones(right), torch.zeros(wrong)])
        return scores

    model, args = net()
    text = f"""dfc 1
data val
metric top1 on val, higher is better
recipe r {{
  require top1 >= baseline - {limit}
  autocast bf16
}}
"""
    return dfc.compile(
        model, args, recipe=text, engine="eager", metrics={"top1": top1}, data={"val": [args[0]]}
    )


def test_a_requirement_is_met_when_its_bound_is() -> None:
    (told,) = required("2pp", wrong=10, items=2000).report.requirements
    assert told.met and not told.undecided
    assert "drop 0.50 pp, 95 % bound 0.76 pp, n=2 000, agree 99.5 %" in told.numbers


def test_a_requirement_that_is_surely_missed_is_not_met() -> None:
    with pytest.raises(dfc.RequirementMissed, match="is not met") as caught:
        required("0.5pp", wrong=100, items=2000)
    assert caught.value.status == 5 and "drop 5.00 pp" in str(caught.value)


def test_too_few_items_decide_nothing_and_it_is_said_how_many_would() -> None:
    with pytest.raises(dfc.RequirementMissed, match="cannot be judged") as caught:
        required("0.5pp", wrong=4, items=1000)  # 0.4 pp were seen: within the limit by luck or not
    (told,) = caught.value.report.requirements
    assert told.undecided and told.verdict == "NOT SHOWN"
    assert "1 000 items cannot tell it from the limit of 0.50 pp" in told.numbers
    assert "could, if the truth is this drop" in told.numbers
    with pytest.raises(dfc.RequirementMissed, match="could, if the truth is no drop at all"):
        required("0.5pp", wrong=7, items=1000)


def test_hopelessly_few_items_are_refused_before_any_work() -> None:
    with pytest.raises(DfcError, match="cannot be judged on 100 items") as caught:
        required("0.5pp", wrong=0, items=100)
    assert caught.value.code == "Q056" and "give `top1` 598 items" in str(caught.value)


def test_rows_of_sums_and_weights_are_drawn_by_rows() -> None:
    def wer(run: Any) -> Tensor:
        x = net()[1][0]
        words = torch.arange(1, 41).double()
        errors = (words / 10).floor()
        if bool((run(x) != net()[0](x)).any()):
            errors[::8] += 1
        return torch.stack([errors, words], dim=1)

    model, args = net()
    text = """dfc 1
metric wer, lower is better
recipe r {
  require wer <= baseline + 1.5pp
  autocast bf16
}
"""
    c = dfc.compile(model, args, recipe=text, engine="eager", metrics={"wer": wer})
    (told,) = c.report.requirements
    assert told.met and "drop 0.006098, 95 % bound 0.0" in told.numbers


# Metrics


@dataclass
class Returns:
    """A metric that returns something."""

    value: Any
    __name__ = "top1"

    def __call__(self, run: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "metric `m` returned nothing"),
        ("0.5", "metric `m` returned the text '0.5', not a number"),
        (math.nan, "metric `m` returned nan, not a number"),
        (math.inf, "metric `m` returned inf for the original model"),
        (-math.inf, "metric `m` returned -inf for the original model"),
        (torch.tensor([0.5, math.nan]), "metric `m` returned nan for item 1"),
        (torch.zeros(2, 3), r"metric `m` returned an array of \[2, 3\]"),
        (torch.zeros(0), r"metric `m` returned an array of \[0\]"),
        ({"a": 1}, "metric `m` returned a dict, not a number"),
        ([1.0, "b"], "metric `m` returned a list, not a number"),
        (1j, "metric `m` returned a complex, not a number"),
        ([[1.0, 0.0], [2.0, 0.0]], "metric `m` returned weights that are not positive"),
    ],
)
def test_a_metric_that_returns_nonsense_is_named(value: Any, words: str) -> None:
    text = "dfc 1\nmetric m, higher is better\nrecipe r {\n  maximize m\n}\n"
    model, args = net()
    with pytest.raises(DfcError, match=words) as caught:
        dfc.compile(model, args, recipe=text, engine="eager", metrics={"m": Returns(value)})
    assert caught.value.code == "K041"


def test_a_metric_that_draws_its_number_is_refused_before_the_work() -> None:
    drawn = iter([0.5, 0.48])
    text = "dfc 1\nmetric m, higher is better\nrecipe r {\n  maximize m\n}\n"
    model, args = net()
    with pytest.raises(DfcError, match=r"`m` returned 0\.5, then 0\.48, for") as caught:
        dfc.compile(model, args, recipe=text, engine="eager", metrics={"m": lambda _: next(drawn)})
    assert caught.value.code == "K041" and "with a seed" in str(caught.value)


def test_a_metric_that_raises_is_named_with_its_line() -> None:
    def m(run: Any) -> float:
        raise KeyError("labels")

    text = "dfc 1\nmetric m, higher is better\nrecipe r {\n  maximize m\n}\n"
    model, args = net()
    with pytest.raises(DfcError, match="metric `m`") as caught:
        dfc.compile(model, args, recipe=text, engine="eager", metrics={"m": m})
    assert caught.value.code == "K040" and caught.value.status == 8
    assert "it is called as m(run): the model, to be called like it" in str(caught.value)


def test_a_test_tells_what_its_quantities_are_and_no_number_twice() -> None:
    text = "dfc 1\nrecipe r {\n  require error <= 1e-3\n}\n"
    model, args = net()
    report = dfc.compile(model, args, recipe=text, engine="eager").report
    (told,) = report.requirements
    assert re.fullmatch(r"error is [\d.e-]+", told.numbers)
