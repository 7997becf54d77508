"""What a caller can get wrong in Python: refused with a code, before the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dfc


@pytest.mark.parametrize(
    ("given", "code", "status"),
    [
        ({"args": torch.ones(4, 16)}, "T030", 2),
        ({"kwargs": [1]}, "Q055", 2),
        ({"model": "net.py"}, "Q055", 2),
        ({"recipe": 3}, "Q055", 2),
        ({"data": [1]}, "Q055", 2),
        ({"metrics": [1]}, "Q055", 2),
        ({"passes": "cse"}, "Q055", 2),
        ({"passes": [dfc.Pass]}, "Q001", 2),
        ({"progress": True}, "Q055", 2),
        ({"engine": 3}, "Q055", 2),
        ({"device": "gpu"}, "Q007", 2),
        ({"device": "cuda:x"}, "Q007", 2),
        ({"device": "cuda:99"}, "K004", 7),
    ],
)
def test_arguments_of_compile_are_checked_first(
    given: dict[str, Any], code: str, status: int
) -> None:
    right = {"model": torch.nn.Linear(16, 4).eval(), "args": (torch.ones(4, 16),)}
    with pytest.raises(dfc.DfcError, match=code) as e:
        dfc.compile(**{**right, **given})
    assert e.value.status == status


def test_sparse_tensors_are_refused() -> None:
    x = torch.ones(4, 16)
    compiled = dfc.compile(torch.nn.Linear(16, 4).eval(), (x,), engine="eager")
    with pytest.raises(dfc.DfcError, match="K013"):
        compiled(x.to_sparse())


def test_an_index_beyond_a_table_is_an_error_of_the_run() -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    compiled = dfc.compile(torch.nn.Embedding(8, 4).eval(), (ids,), engine="eager")
    with pytest.raises(dfc.DfcError, match="K023"):
        compiled(ids + 8)


def test_data_with_an_index_beyond_a_table_is_an_error_of_the_data() -> None:
    """It has the right shape, and a step that could not run it was left out."""
    model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 16)).eval()
    recipe = "dfc 1\ndata calib\nrecipe r {\n  quantize int8 using calib with scheme=static\n}\n"
    with pytest.raises(dfc.DfcError, match="a batch of data `calib` cannot be run") as e:
        dfc.compile(
            model, (torch.arange(4)[None],), recipe=recipe, engine="eager",
            data={"calib": [(torch.full((1, 4), 8),)]},
        )  # fmt: skip
    assert e.value.code == "D081" and e.value.status == 2 and "aten.embedding" in e.value.message


def test_data_that_a_step_names_and_does_not_read_is_told() -> None:
    recipe = "dfc 1\ndata calib\nrecipe q {\n  quantize int8 using calib\n}\n"
    compiled = dfc.compile(
        torch.nn.Linear(64, 64).eval(), (torch.ones(2, 64),), recipe=recipe, engine="eager",
        data={"calib": [torch.ones(2, 64)]},
    )  # fmt: skip
    (note,) = [n for n in compiled.report.notes if "`calib` was not read" in n]
    assert "`dynamic` rounds by the numbers at hand, `scheme=static` by data" in note
    assert "`scheme=tune(dynamic, static)`" in note


def test_a_model_that_fails_with_an_expanded_buffer_is_told_as_it_fails() -> None:
    class Wrong(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.ones(1, 4).expand(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.row

    with pytest.raises(dfc.DfcError, match=r"T003.*itself fails on the example"):
        dfc.compile(Wrong().eval(), (torch.ones(2, 4),))


@pytest.mark.parametrize("given", [3, None, b"graph"])
def test_what_is_no_text_is_no_graph(given: Any) -> None:
    with pytest.raises(dfc.DfcError, match="`text` is the text of a graph, got") as e:
        dfc.parse(given)
    assert (e.value.code, e.value.status) == ("Q055", 2)


def test_a_limit_below_zero_is_refused() -> None:
    graph = dfc.parse("dfc 1\ngraph @f(%x: f32[2]) -> f32[2] {\n  return %x\n}\n")
    with pytest.raises(dfc.DfcError, match="`limit` counts changes: it is 0 or more, got -1"):
        dfc.compile(graph, recipe="dfc 1\nrecipe r {\n  cse with limit=-1\n}\n", engine="eager")
