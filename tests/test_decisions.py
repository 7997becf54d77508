"""Where a model turns data into Python numbers: other data end in an error or the right answer."""

from __future__ import annotations

import pytest
import torch

import dfc
from dfc.capture import torch_export


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


def _list(x):
    return torch.tensor([float(v) for v in x.tolist()]) + x


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
@pytest.mark.parametrize(
    "function", [_branch, _integer, _number, _loop, _list], ids=lambda f: f.__name__
)
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


def _all_large(x):
    torch._check((x > -9).all().item())
    return x * 2


def _none_small(x):
    torch._check(not (x < -9).any().item())
    return x * 2


def _one_number(x):
    torch._check(x[0].int().item() == 1)
    return x * 2


def _as_many_as_rows(x):
    torch._check(x[0].int().item() == x.shape[0] - 2)
    return x * 2


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
@pytest.mark.parametrize(
    "function", [_all_large, _none_small, _one_number, _as_many_as_rows], ids=lambda f: f.__name__
)
def test_what_the_model_checks_is_checked(function, engine):
    """torch knows the number from then on, and drops what reads it."""
    model, x = _Model(function).eval(), torch.tensor([1.0, 2.0, 3.0])
    shapes = {"x": {0: torch.export.Dim("N", min=2)}} if "rows" in function.__name__ else None
    compiled = dfc.compile(model, (x,), engine=engine, dynamic_shapes=shapes)
    torch.testing.assert_close(compiled(x), x * 2)
    bad = torch.tensor([2.0, -10.0, 3.0])
    with pytest.raises(RuntimeError):
        model(bad)
    with pytest.raises(dfc.DfcError, match=r"this is (True|1|N - 2)\b|Ne\(u0, 1\)") as e:
        compiled(bad)
    assert e.value.code == "K023"


def test_a_number_read_twice_is_checked_once():
    def twice(x):
        n, m = x[0].int(), x[0].int()
        a, b = n.item(), n.item()
        torch._check(a == 1)
        return x * a + b + m.item()

    graph = dfc.trace(_Model(twice).eval(), (torch.tensor([1.0, 2.0]),))
    ops = [n.op for n in graph.nodes]
    assert ops.count("aten._local_scalar_dense.default") == 1
    assert (
        dfc.trace(_Model(lambda x: x * torch.tensor(3).item()).eval(), (torch.ones(2),)).notes == []
    )


def test_a_check_that_strict_mode_drops_is_reported(monkeypatch):
    strict = [a for a in torch_export.ATTEMPTS if a.name == "strict"]
    monkeypatch.setattr(torch_export, "ATTEMPTS", strict)
    notes = dfc.trace(_Model(_all_large).eval(), (torch.ones(3),)).notes
    assert len(notes) == 2 and "torch.export dropped the check" in notes[1]
