"""Where a model turns data into Python numbers: other data end in an error or the right answer."""

from __future__ import annotations

import pytest
import torch

import dfc


class _Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _branch(x):
    return x * 2 if x.sum() > 0 else x - 1


def _integer(x):
    return x + (int(x.max().item()) + 1)


def _number(x):
    return x * float(x.mean())


def _loop(x):
    y = x
    while y.sum() > 1:
        y = y / 2
    return y


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
@pytest.mark.parametrize("function", [_branch, _integer, _number, _loop], ids=lambda f: f.__name__)
def test_other_data_are_computed_or_refused(function, engine):
    model = _Model(function).eval()
    x = torch.tensor([0.5, 2.0, 1.0])
    try:
        compiled = dfc.compile(model, (x,), engine=engine)
    except dfc.DfcError as e:
        assert e.status == 3
        return
    torch.testing.assert_close(compiled(x), model(x))
    for other in (-x, x * 3, torch.tensor([9.0, -1.0, 0.25])):
        try:
            got = compiled(other)
        except dfc.DfcError as e:
            assert e.code == "K023" and compiled.report.notes
            continue
        torch.testing.assert_close(got, model(other))


def test_numbers_from_a_list_are_refused():
    model = _Model(lambda x: torch.tensor([float(v) for v in x.tolist()]) + x).eval()
    with pytest.raises(dfc.DfcError):
        dfc.compile(model, (torch.randn(3),), engine="eager")
