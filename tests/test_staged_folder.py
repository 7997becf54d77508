"""A staged model in a folder: read again it is the same; joint graphs are made when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dfc
from dfc.capture import training
from dfc.errors import DfcError
from dfc.runtime.pipeline import differentiated
from dfc.runtime.pipeline.staged_folder import read_staged, write_staged
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import adamw, captured, evenly, staged, traced


def test_a_model_that_was_written_trains_as_the_one_that_wrote_it(tmp_path: Path) -> None:
    model, (_, args) = staged("tied", 2), captured("tied")
    told = json.loads(json.dumps(write_staged(tmp_path, model)))
    read = read_staged(tmp_path, told)
    assert [p.flow for p in read.parts] == [p.flow for p in model.parts]
    assert list(map(str, read.edges)) == list(map(str, model.edges))
    (tmp_path / "stage_01.dfc").rename(tmp_path / "away")
    assert read.parts[1].whole.graph.fingerprint() == model.parts[1].whole.graph.fingerprint()
    (tmp_path / "away").rename(tmp_path / "stage_01.dfc")  # which is the first stage's
    with (
        Trainer(model, microbatches=4, optimizer=adamw, threads=1) as first,
        Trainer(read, microbatches=4, optimizer=adamw, threads=1) as second,
    ):
        assert torch.equal(first.step(*args), second.step(*args))
        for n, p in first.parameters.items():
            assert torch.equal(p, second.parameters[n]), n


def test_what_is_checked_on_data_is_known_where_it_is_read(tmp_path: Path) -> None:
    class Decides(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.w * x if bool((x > 0).all()) else self.w - x).mean()

    x = torch.tensor([1.0, 2.0, 3.0])
    graph = dfc.trace(Decides(), (x,))
    told = json.loads(json.dumps(write_staged(tmp_path, StagedModel(graph, evenly(graph, 1)))))
    with Trainer(read_staged(tmp_path, told), microbatches=1, optimizer=adamw) as trainer:
        trainer.step(x)
        with pytest.raises(DfcError, match="traced for True here"):
            trainer.step(-x)


def test_a_stage_is_differentiated_when_its_graph_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def counted(graph, *args):  # type: ignore[no-untyped-def]
        made.append(graph.name)
        return training.joint_graph(graph, *args)

    monkeypatch.setattr(differentiated, "joint_graph", counted)
    graph = traced("branches")[2]
    model = StagedModel(graph, evenly(graph, 3))
    assert model.edges and model.readers and not made
    second = model.parts[1]
    assert second.cut.weight_gradients.keys() == set(second.flow.weights)
    assert made == [second.stage.graph.name]
