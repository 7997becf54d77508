"""What cannot be streamed is told: wrong arguments, too little memory, files that changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.api import opened
from dfc.errors import DfcError
from tests.tower import Tower, ids, memory_of

pytestmark = pytest.mark.usefixtures("no_weights_thread_is_left")


def test_what_cannot_be_is_told(tower: Path) -> None:
    with pytest.raises(DfcError, match="N064") as e:
        dfc.load(tower, memory=1000)
    assert e.value.status == 6 and "not even streamed" in str(e.value)
    for size in ("2 bananas", "-3MB", "", 0, "0GB", "1e400GB", "3GHz"):
        with pytest.raises(DfcError, match="Q010") as e:
            dfc.load(tower, memory=size)
        assert e.value.status == 2
    with pytest.raises(DfcError, match="K073"):
        dfc.load(tower, memory="1GB", engine="onnxruntime")
    held = dfc.compile(Tower().eval(), (ids(4),), engine="eager", passes=[])
    with pytest.raises(DfcError, match="K070") as e:
        held.within(memory_of(held, 0.5, [ids(4)]))
    assert "save the model as a package" in str(e.value)


def test_a_closed_model_says_so(tower: Path) -> None:
    for share in (0.45, 10.0):
        streamed = dfc.load(tower, memory=memory_of(opened(tower), share, [ids(4)]))
        streamed.close()
        streamed.close()
        with pytest.raises(DfcError, match="K076"):
            streamed(ids(4))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"slots": 0}, "Q055"),
        ({"slots": "a"}, "Q055"),
        ({"placement": "tial"}, "Q055"),
        ({"say": 3}, "Q055"),
        ({"inputs": []}, "K012"),
        ({"inputs": torch.ones(4, 12)}, "K012"),
        ({"inputs": ["a"]}, "K013"),
        ({"inputs": [torch.ones(4, 12)]}, "K013"),
        ({"device": "gpu"}, "Q007"),
        ({"memory": []}, "Q010"),
        ({"memory": True}, "Q010"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_read(
    tower: Path, given: dict[str, Any], code: str
) -> None:
    with pytest.raises(DfcError, match=code) as e:
        opened(tower, engine="eager", build=False).within(**{"memory": "1GB", **given})
    assert e.value.status == 2


@pytest.fixture
def copy(tower: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(tower, tmp_path / "copy.dfcpkg"))


def test_a_file_that_is_cut_off_or_changed_is_an_error(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    whole = dfc.load(copy)
    memory = memory_of(whole, 0.4, whole.probes[0].inputs)
    inputs = [x.clone() for x in whole.probes[0].inputs]
    del whole
    streamed = dfc.load(copy, memory=memory)
    streamed.run_flat(inputs)
    os.truncate(weights, weights.stat().st_size // 8)
    with pytest.raises(DfcError, match="K071") as e:
        streamed.run_flat(inputs)
    assert e.value.status == 8
    streamed.close()


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    from dfc.runtime.tiers.files import Extent, Files

    path = tmp_path / "w"
    path.write_bytes(bytes(100))
    whole = Extent(path, 0, 200)
    files = Files([whole])
    into = torch.empty(200, dtype=torch.uint8)
    with pytest.raises(DfcError, match="has become shorter: it ends at 100 bytes"):
        files.read(whole, into)
    files.close()
    with pytest.raises(DfcError, match="K071"):
        Files([Extent(tmp_path / "none", 0, 1)])
