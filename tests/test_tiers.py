"""Models in less memory than their weights take: equal bit for bit, bytes and threads counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.api import opened
from dfc.cli import main
from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError
from dfc.ir.graph import Parameter
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers
from dfc.planning.weight_blocks import cut, weight_bytes
from dfc.runtime.kernels.graph import are_built
from dfc.runtime.tiers.clock import HostClock
from dfc.runtime.tiers.places import Processor
from dfc.runtime.tiers.reader import Reader
from dfc.runtime.tiers.slots import Load, flat, load_bytes, numbers
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, first_plan, within
from tests.tiny_models import tiny_llama, tokens

B = torch.export.Dim("B", min=1, max=16)
SHARES = (0.75, 0.45)


class Tower(nn.Module):
    """A tied table that is read first and, turned, last; a buffer that calls write to."""

    def __init__(self, layers: int = 6, width: int = 96) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": x @ self.table.weight.T, "calls": self.calls * 2}


def ids(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (size, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiers") / "tower.dfcpkg"
    compiled = dfc.compile(
        Tower().eval(), (ids(4),), dynamic_shapes=({0: B},), engine="eager", passes=[]
    )
    compiled.save(path)
    return path


@pytest.fixture(scope="module")
def held() -> Compiled:
    return dfc.compile(tiny_llama(), (tokens(),), engine="eager", passes=[], verify="none")


@pytest.fixture(scope="module")
def llama(held: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiers") / "llama.dfcpkg"
    held.save(path)
    return path


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    left = [t for t in threading.enumerate() if t.name == "dfc weights"]
    assert not left


def all_bytes(compiled: Compiled) -> int:
    return sum(weight_bytes(p) for p in compiled.graph.parameters.values())


def memory_of(compiled: Compiled, share: float, inputs: Sequence[Any]) -> int:
    """What holds so much of the weights, and what is computed of the inputs."""
    from dfc.ir.interpret import bind_inputs
    from dfc.planning.model import live_bytes

    sizes = bind_inputs(compiled.graph, inputs)
    return int(all_bytes(compiled) * share + live_bytes(compiled.graph, sizes))


def runner_of(compiled: Compiled) -> Streamed:
    assert isinstance(compiled.runner, Streamed)
    return compiled.runner


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


def test_what_is_tied_is_brought_to_each_of_its_readers(tower: Path) -> None:
    compiled = opened(tower, build=False)
    graph = with_state_inputs(compiled.graph)
    parts = cut(graph)
    blocks = parts.blocks
    readers = [b for b in blocks if any(p.name == "table.weight" for p in b.weights)]
    assert len(readers) == 2 and all(len(b.weights) == 1 for b in readers)
    plan = first_plan(parts, Wanted(1 << 30), Processor(), {"B": 4})
    chosen = tuple(i for i, b in enumerate(blocks) if b in readers)
    some = Tiers(plan.layers, plan.weights, chosen, Hop(1e-9, slots=1), 1 << 30, plan.fixed)
    inputs = [*compiled.probes[0].inputs, *compiled.state.values()]
    runner = Streamed(parts, some, Processor())
    try:
        assert some.bytes_per_pass == 2 * 64 * 96 * 4
        expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
        for _ in range(3):
            assert torch.equal(runner(inputs)[0], expected[0])
    finally:
        runner.close()


def test_every_node_and_weight_is_in_one_place(llama: Path) -> None:
    graph = opened(llama, build=False).graph
    _, blocks, stay, _ = cut(graph)
    assert [n for b in blocks for n in b.nodes] == list(graph.nodes)
    inside = {p for b in blocks for p in b.weights}
    assert not inside & set(stay)
    assert {p for p in graph.parameters.values() if p.use_count} == inside | set(stay)
    order = {n: i for i, n in enumerate(graph.nodes)}
    edges = [order[n] for b in blocks if b.first and b.last for n in (b.first, b.last)]
    assert edges == sorted(edges)  # no two are needed at once


def test_a_table_with_most_of_the_bytes_makes_no_block_of_all_the_layers() -> None:
    layers = [m for _ in range(8) for m in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(nn.Embedding(4000, 256), *layers).eval()
    sizes = sorted(b.bytes for b in cut(dfc.trace(model, (ids(2),))).blocks)
    assert sizes[-1] == 4000 * 256 * 4 and sizes[-2] <= 2 * 256 * 256 * 4 and len(sizes) >= 5


def test_a_weight_that_is_handed_out_stays() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(self.a(x)), self.a.weight.t()

    graph = dfc.trace(Shows().eval(), (torch.randn(2, 64),))
    inside = [p.name for b in cut(graph).blocks for p in b.weights]
    assert inside == ["b.weight"]


class Poisoning:
    """A carrier in this process: it copies at the last moment, and spoils what was left."""

    def __init__(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> None:
        self.slots = [torch.zeros(slot_bytes, dtype=torch.uint8) for _ in range(slots)]
        sizes = [load_bytes(load) for load in loads]
        self.sources = [
            flat(load, torch.zeros(size, dtype=torch.uint8))
            for load, size in zip(loads, sizes, strict=True)
        ]
        self.waiting: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []

    def begin(self) -> None:
        self.log.append(("begin", 0))

    def fill(self, load: int, slot: int) -> None:
        assert slot not in self.waiting  # it was read before it is filled again
        self.waiting[slot] = load
        self.log.append(("fill", load))

    def ready(self, slot: int) -> None:
        source = self.sources[self.waiting[slot]]
        self.slots[slot][: source.numel()].copy_(source)

    def leave(self, slot: int) -> None:
        self.slots[slot].fill_(255)  # not a number, in any float
        del self.waiting[slot]

    def settle(self) -> None:
        self.waiting.clear()

    def copied(self) -> list[tuple[int, float]]:
        return [(s.numel(), 1e-6) for s in self.sources]

    def close(self) -> None:
        self.slots = []


class InProcess(Processor):
    """As a device is: weights of the process are put there, and brought from there."""

    source = "memory"

    def hold(self, weight: Parameter) -> Tensor:
        return numbers(weight).clone()

    def carrier(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> Poisoning:  # type: ignore[override]
        return Poisoning(loads, slots, slot_bytes)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("placement", ["even", "tail"])
def test_slots_are_used_in_turn_and_read_before_they_are_left(
    held: Compiled, slots: int, placement: str
) -> None:
    """With a model in memory and a carrier as a device's, in any number of slots."""
    whole, x = held, tokens()
    wanted = Wanted(memory_of(whole, 0.5, [x]), slots, placement)
    runner = within(whole.graph, wanted, inputs=[x], place=InProcess())
    carrier: Any = runner.carrier
    assert runner.plan.slots == slots
    expected = whole.run_flat([x])
    for _ in range(3):
        assert torch.equal(runner([x])[0], expected[0])
    filled = [load for what, load in carrier.log if what == "fill"]
    count = len(runner.plan.streamed)
    assert filled == [q % count for q in range(3 * count + slots)]
    runner.close()


def test_a_pass_that_failed_is_no_harm_to_the_next(held: Compiled) -> None:
    whole, x = held, tokens()
    wanted = Wanted(memory_of(whole, 0.5, [x]))
    runner = within(whole.graph, wanted, inputs=[x], place=InProcess())
    runner([x])
    with pytest.raises(RuntimeError):
        runner([x[:, :7]])  # sizes are fixed: an operator refuses in the middle
    assert torch.equal(runner([x])[0], whole.run_flat([x])[0])


def test_blocks_are_timed_in_order(tower: Path) -> None:
    compiled = opened(tower, build=False)
    graph = with_state_inputs(compiled.graph)
    parts = cut(graph)
    inputs = [*compiled.probes[0].inputs, *compiled.state.values()]
    plan = first_plan(parts, Wanted(1 << 30), Processor(), {"B": 4})
    clock = HostClock()
    runner = Streamed(parts, plan, Processor(), clock)
    runner(inputs)
    runner.close()
    assert len(clock.seconds()) == 2 * len(parts.blocks) - 1


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
