"""Models in less memory than their weights take: equal bit for bit, bytes and threads counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.api import opened
from dfc.cli import main
from dfc.errors import DfcError
from dfc.runtime.kernels.graph import are_built
from dfc.runtime.tiers.reader import Reader
from tests.tower import Tower, all_bytes, ids, memory_of, runner_of

SHARES = (0.75, 0.45)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["tower", "llama"])
def test_results_are_those_of_the_whole_model_bit_for_bit(
    name: str, share: float, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    whole = dfc.load(path)
    inputs = whole.probes[0].inputs
    streamed = dfc.load(path, memory=memory_of(whole, share, inputs))
    runner = runner_of(streamed)
    try:
        assert runner.plan.streamed
        for _ in range(4):
            expected, found = whole.run_flat(inputs), streamed.run_flat(inputs)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert runner.held_bytes <= runner.plan.memory
        assert runner.held_bytes < all_bytes(whole)
    finally:
        streamed.close()


def test_state_batches_and_several_calls(tower: Path) -> None:
    whole = dfc.load(tower)
    streamed = dfc.load(tower, memory=memory_of(whole, 0.5, [ids(16)]))
    try:
        for size in (4, 1, 16, 3, 3):
            expected, found = whole(ids(size, size)), streamed(ids(size, size))
            assert torch.equal(expected["logits"], found["logits"])
            assert torch.equal(expected["calls"], found["calls"])
            kept = found["logits"].clone()
            streamed(ids(2))
            whole(ids(2))
            assert torch.equal(kept, found["logits"])  # it lies in no slot
        with pytest.raises(DfcError, match="K015"):
            streamed(ids(17))
    finally:
        streamed.close()


def test_bytes_of_each_pass_are_those_of_the_plan(tower: Path) -> None:
    compiled = opened(tower, build=False)
    inputs = compiled.probes[0].inputs
    streamed = compiled.within(memory_of(compiled, 0.4, inputs))
    runner = runner_of(streamed)
    reader = runner.carrier
    assert isinstance(reader, Reader)
    reader.settle()
    before = reader.bytes_read  # of the slots that are filled ahead
    for count in range(1, 5):
        streamed.run_flat(inputs)
        reader.settle()
        assert reader.bytes_read - before == count * runner.plan.bytes_per_pass
    streamed.close()


def test_models_on_the_meta_device_with_a_file(tmp_path: Path) -> None:
    """`dfc.compile` never holds what lies in the file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).eval()
    x = torch.randn(2, 64)
    expected = model(x)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    compiled = dfc.compile(
        model.to("meta"), (x.to("meta"),), weights=tmp_path / "w.safetensors", engine="eager",
        passes=[],
    )  # fmt: skip
    streamed = compiled.within(memory_of(compiled, 0.5, [x]), inputs=[x])
    assert runner_of(streamed).plan.streamed
    assert torch.equal(streamed(x), expected)
    streamed.close()


def test_threads_that_call_one_model_take_turns(tower: Path) -> None:
    whole = dfc.load(tower, engine="eager")
    expected = [whole(ids(3, seed))["logits"] for seed in range(4)]
    with dfc.load(tower, memory=memory_of(opened(tower), 0.45, [ids(4)])) as streamed:
        assert runner_of(streamed).plan.streamed
        wrong: list[int] = []

        def call(seed: int) -> None:
            for _ in range(12):
                if not torch.equal(streamed(ids(3, seed))["logits"], expected[seed]):
                    wrong.append(seed)

        threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=120)
        assert not any(t.is_alive() for t in threads) and not wrong


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Linear layers with int4 and with int8 weights, which are packed for the kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6))).eval()
    x, found = torch.randn(4, 128), {}
    for bits in (4, 8):
        recipe = f"dfc 1\nrecipe small {{\n  quantize int{bits}\n}}\n"
        compiled = dfc.compile(model, (x,), recipe=recipe, engine="eager", verify="none")
        found[bits] = tmp_path_factory.mktemp("tiers") / "small.dfcpkg"
        compiled.save(found[bits])
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_brought_as_their_codes(quantized: Any, bits: int) -> None:
    """Where the kernels do not have them in a file: within rounding, by the operator's meaning."""
    whole = dfc.load(quantized[bits])
    (x,) = whole.probes[0].inputs
    streamed = dfc.load(quantized[bits], memory=memory_of(whole, 0.6, [x]))
    plan = runner_of(streamed).plan
    assert plan.streamed
    assert plan.bytes_per_pass <= len(plan.streamed) * 128 * 128 * (bits + 1) // 8
    assert torch.equal(streamed(x), whole(x))
    streamed.close()


@pytest.mark.skipif(not are_built(), reason="the kernels are not built")
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_read_packed_weights_from_their_slots(
    quantized: Any, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfc.runtime.kernels.packed.LEAST_BYTES", 1)
    monkeypatch.setattr("dfc.runtime.kernels.packed.cache_folder", lambda name: tmp_path)
    whole = dfc.load(quantized[bits])
    (x,) = whole.probes[0].inputs
    streamed = dfc.load(quantized[bits], memory=memory_of(whole, 0.7, [x]))
    runner = runner_of(streamed)
    files = {f.name: f.stat().st_size for f in tmp_path.glob("*.packed")}
    assert len(files) == 6
    assert runner.plan.streamed
    assert runner.plan.bytes_per_pass == len(runner.plan.streamed) * min(files.values())
    for _ in range(3):
        assert torch.equal(streamed(x), whole(x))
        for file in tmp_path.glob("*.packed"):
            os.utime(file)  # as another process does that uses it
    assert runner.held_bytes <= runner.plan.memory
    streamed.close()


def test_what_fits_is_not_streamed(tower: Path) -> None:
    streamed = dfc.load(tower, memory="1GiB")
    runner = runner_of(streamed)
    assert not runner.plan.streamed and not runner.carrier.slots
    whole = dfc.load(tower)
    assert torch.equal(streamed(ids(4))["logits"], whole(ids(4))["logits"])
    streamed.close()


def test_the_command_runs_and_reports(tower: Path, tmp_path: Path, capsys: Any) -> None:
    compiled = opened(tower, build=False)
    memory = str(memory_of(compiled, 0.5, compiled.probes[0].inputs))
    picture, out = tmp_path / "passes.svg", tmp_path / "out.npz"
    args = ["run", str(tower), "--memory", memory, "--trace", str(picture), "-o", str(out)]
    assert main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["tiers"]
    assert data["held_bytes"] <= data["memory"] == int(memory)
    assert data["streamed"] and data["bytes_per_pass"] and data["pass_seconds"] > 0
    assert data["predicted_seconds"] > 0.999 * data["bound_seconds"] > 0
    assert picture.read_text().startswith("<svg") and out.exists()
    assert main(["run", str(tower), "--memory", memory]) == 0
    assert "streamed from disk" in capsys.readouterr().out
    assert main(["run", str(tower), "--memory", "1KB"]) == 6
    assert main(["run", str(tower), "--memory", "1KX"]) == 2
    assert main(["run", str(tower), "--memory", "1GB", "-m", "2"]) == 2
    assert main(["run", str(tower), "--memory", "1GB", "--engine", "onnxruntime"]) == 2
    capsys.readouterr()


_PEAK = """
import resource, sys, torch
from dfc.api import opened

pytestmark = pytest.mark.usefixtures("no_weights_thread_is_left")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, memory = sys.argv[1], sys.argv[2]
x = torch.zeros(1, 8, dtype=torch.long)
torch.nn.Linear(8, 8)(torch.randn(4, 8))
before = opened(path, engine="eager", build=False)
start = peak()
found = before.within(memory)
for _ in range(3):
    found.run_flat([x])
print(peak() - start, found.runner.plan.bytes_per_pass)
found.close()
"""


@pytest.mark.slow
def test_a_process_stays_within_its_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compiled = dfc.compile(Tower(8, 1024).eval(), (ids(1)[:, :8],), engine="eager", passes=[])
    compiled.save(tmp_path / "wide.dfcpkg")
    weights = all_bytes(compiled)
    memory = weights // 3
    run = [sys.executable, "-c", _PEAK, str(tmp_path / "wide.dfcpkg"), str(memory)]
    out = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True).stdout
    taken, streamed = map(int, out.split())
    assert streamed > weights // 2
    assert taken < memory + (32 << 20)  # and what Python and PyTorch take to run at all
