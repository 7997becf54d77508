"""Where ONNX Runtime ran each node: read from profiles, and from a run on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.runtime.placement import CPU, placement, read_profile

CUDA = "CUDAExecutionProvider"


def event(name: str, op: str, provider: str, took: int) -> dict[str, Any]:
    """A line of a profile, as ONNX Runtime 1.31 writes it."""
    return {
        "cat": "Node", "pid": 1, "tid": 1, "dur": took, "ts": 0, "ph": "X",
        "name": f"{name}_kernel_time", "args": {"op_name": op, "provider": provider},
    }  # fmt: skip


def profile(path: Path, *events: dict[str, Any]) -> Path:
    session = {"cat": "Session", "name": "model_run", "dur": 500, "args": {}}
    path.write_text(json.dumps([session, *events]))
    return path


def test_what_fell_back_and_what_was_copied_is_counted_once(tmp_path: Path) -> None:
    run = [
        event("a", "MatMul", CUDA, 50),
        event("copy", "MemcpyToHost", CUDA, 20),
        event("b", "NonZero", CPU, 10),
        event("c", "NonZero", CPU, 10),
        event("back", "MemcpyFromHost", CUDA, 10),
    ]
    found = read_profile(profile(tmp_path / "p.json", *run, *run), CUDA)  # two runs
    assert found.nodes == {CUDA: 1, CPU: 2} and found.ops == {"MatMul": 1, "NonZero": 2}
    assert found.fallen == {"NonZero": 2}
    assert found.copies == {"MemcpyToHost": 1, "MemcpyFromHost": 1}
    assert not found.is_whole
    assert str(found) == (
        "2 of 3 nodes ran on the CPU instead of CUDA (2 NonZero; 20% of the time), "
        "2 copies between them (30% of the time)"
    )


def test_a_session_on_one_provider_is_whole(tmp_path: Path) -> None:
    path = profile(tmp_path / "p.json", event("a", "MatMul", CUDA, 5))
    assert str(read_profile(path, CUDA)) == "all 1 nodes ran on CUDA"


@pytest.mark.parametrize("text", ["", "[1]", '[{"cat": "Node", "name": "x_kernel_time"}]'])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(dfc.DfcError, match="is no profile of ONNX Runtime") as e:
        read_profile(path, CUDA)
    assert e.value.code == "K026"


def test_a_run_on_the_cpu_tells_the_ops_as_they_were_fused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    found = placement(dfc.trace(model.eval(), (x,)), [x])
    assert found.is_whole and found.nodes == {CPU: sum(found.ops.values())}
    assert found.ops["Gelu"] == 1 and str(found).endswith("nodes ran on CPU")


def test_nodes_that_a_run_left_to_another_provider_are_found() -> None:
    """The CPU alone is here: asked as if for CUDA, every node of a real run has fallen back."""
    import tempfile

    from dfc.runtime.engines.onnxruntime_ import session

    x = torch.randn(3, 4)
    with tempfile.TemporaryDirectory() as folder:
        made, _ = session(dfc.trace(torch.nn.Linear(4, 2), (x,)), profile=f"{folder}/p")
        made.run([x])
        found = read_profile(made.end_profiling(), CUDA)
    assert sum(found.fallen.values()) == sum(found.nodes.values()) > 0
    assert "instead of CUDA" in str(found) and "100% of the time" in str(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_provider_that_does_not_load_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this build has no CUDA provider")
    from dfc.runtime.engines import onnxruntime_

    monkeypatch.setattr(onnxruntime_, "_require_cuda", lambda: None)
    with pytest.raises(dfc.DfcError, match="CUDAExecutionProvider does not load"):
        onnxruntime_.session(dfc.trace(torch.nn.Linear(4, 2), (torch.ones(1, 4),)), "cuda")
