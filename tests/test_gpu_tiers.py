"""Models in less of a CUDA device's memory than their weights take."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.cli import main
from dfc.compiled import Compiled
from dfc.planning.cost import default_sizes
from dfc.planning.model import live_bytes
from dfc.planning.weight_blocks import weight_bytes
from dfc.runtime.tiers.streamed import Streamed
from tests.tiny_models import tiny_llama, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 1 << 20
WORKSPACE = 64 * MIB  # what cuBLAS takes for itself, and the allocator's rounding


class Wide(nn.Module):
    """Large layers with little to compute: copies are always behind."""

    def __init__(self, layers: int = 12, width: int = 2048) -> None:
        super().__init__()
        self.table = nn.Embedding(512, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x @ self.table.weight.T


def memory_of(compiled: Compiled, share: float) -> int:
    """What holds so much of the weights, and what is computed of the example."""
    live = live_bytes(compiled.graph, default_sizes(compiled.graph))
    weights = sum(weight_bytes(p) for p in compiled.graph.parameters.values())
    return int(weights * share + live)


@pytest.fixture(scope="module")
def wide() -> Compiled:
    torch.manual_seed(0)
    ids = torch.randint(512, (2, 16))
    return dfc.compile(Wide().eval(), (ids,), engine="eager", passes=[], verify="none")


def runner_of(compiled: Compiled) -> Streamed:
    assert isinstance(compiled.runner, Streamed)
    return compiled.runner


@pytest.mark.parametrize("slots", [None, 1, 2, 3])
@pytest.mark.parametrize("placement", ["even", "tail"])
def test_many_passes_give_the_whole_models_results(
    wide: Compiled, slots: int | None, placement: str
) -> None:
    ids = [torch.randint(512, (2, 16), device="cuda") for _ in range(3)]
    whole = dfc.compile(wide.graph, engine="eager", passes=[], verify="none", device="cuda")
    expected = [whole.run_flat([x])[0].clone() for x in ids]
    streamed = wide.within(memory_of(wide, 0.4), device="cuda", slots=slots, placement=placement)
    runner = runner_of(streamed)
    assert runner.plan.streamed and (slots is None or runner.plan.slots == slots)
    found = [streamed.run_flat([ids[i % 3]])[0] for i in range(12)]  # the host is far ahead
    for i, x in enumerate(found):
        assert torch.equal(x, expected[i % 3])
    copied = runner.carrier.copied()
    assert sum(b for b, _ in copied) == runner.plan.bytes_per_pass
    assert sum(b for b, _ in copied) / sum(s for _, s in copied) > 1e9
    streamed.close()


def test_a_language_model_with_a_tied_table() -> None:
    model, x = tiny_llama(4), tokens()
    held = dfc.compile(model, (x,), engine="eager", passes=[], verify="none")
    whole = dfc.compile(held.graph, engine="eager", passes=[], verify="none", device="cuda")
    for share in (0.8, 0.5):
        streamed = held.within(memory_of(held, share), device="cuda")
        assert torch.equal(streamed(x.cuda())["logits"], whole(x.cuda())["logits"])
        streamed.close()


def test_the_device_holds_no_more_than_its_memory() -> None:
    x = torch.randint(512, (2, 16), device="cuda")
    many = dfc.compile(Wide(24).eval(), (x.cpu(),), engine="eager", passes=[], verify="none")
    nn.Linear(64, 64, device="cuda")(x.new_zeros(4, 64, dtype=torch.float32))  # for its workspace
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    memory = memory_of(many, 0.3)
    streamed = many.within(memory, device="cuda")
    for _ in range(3):
        streamed.run_flat([x])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < memory + WORKSPACE
    assert runner_of(streamed).held_bytes <= memory
    streamed.close()
    del streamed
    gc.collect()
    assert torch.cuda.memory_allocated() - before < WORKSPACE


def test_passes_on_streams_of_the_callers_own(wide: Compiled) -> None:
    x = torch.randint(512, (2, 16), device="cuda")
    whole = dfc.compile(wide.graph, engine="eager", passes=[], verify="none", device="cuda")
    expected = whole.run_flat([x])[0].clone()
    streamed = wide.within(memory_of(wide, 0.4), device="cuda")
    torch.cuda.synchronize()
    made: Any = torch.cuda.Stream
    for stream in (made(), made(), torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            found = streamed.run_flat([x])[0]
        stream.synchronize()
        assert torch.equal(found, expected)
    streamed.close()


def test_memory_is_pinned_and_given_back() -> None:
    from dfc.runtime.tiers.cuda import pinned

    memory = pinned(5 * MIB)
    assert memory.is_pinned() and memory.numel() == 5 * MIB
    x = torch.randint(256, (5 * MIB,), dtype=torch.uint8)
    memory.copy_(x)
    assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), x)
    del memory
    gc.collect()
    again = [pinned(3 * MIB) for _ in range(3)]
    assert all(m.is_pinned() for m in again)


def test_the_command_streams_to_a_device(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "wide.dfcpkg"
    with_example = dfc.compile(
        Wide(4).eval(), (torch.randint(512, (2, 16)),), engine="eager", passes=[]
    )
    with_example.save(path)
    memory = memory_of(with_example, 0.5)
    args = ["run", str(path), "--device", "cuda", "--memory", str(memory), "--json"]
    assert main(args) == 0
    data = json.loads(capsys.readouterr().out)["tiers"]
    assert data["from"] == "memory" and data["streamed"] and data["held_bytes"] <= memory
    assert data["bandwidth"] > 1e9


@pytest.mark.parametrize("slots", [None, 1, 2])
def test_a_host_that_does_not_hold_it_either_reads_from_disk(
    tmp_path: Path, slots: int | None
) -> None:
    from dfc.api import opened
    from dfc.runtime.tiers.relay import Relay

    torch.manual_seed(0)
    ids = [torch.randint(512, (2, 16), device="cuda") for _ in range(3)]
    made = dfc.compile(Wide().eval(), (ids[0].cpu(),), engine="eager", passes=[], verify="none")
    made.save(tmp_path / "wide.dfcpkg")
    whole = dfc.compile(made.graph, engine="eager", passes=[], verify="none", device="cuda")
    expected = [whole.run_flat([x])[0].clone() for x in ids]
    weights = sum(weight_bytes(p) for p in made.graph.parameters.values())
    package = opened(tmp_path / "wide.dfcpkg", build=False)
    memory, host = memory_of(made, 0.3), weights // 3
    streamed = package.within(memory, device="cuda", host=host, inputs=[ids[0]], slots=slots)
    runner = runner_of(streamed)
    carrier, below = runner.carrier, runner.plan.below
    assert isinstance(carrier, Relay) and below is not None and below.streamed
    assert carrier.host_bytes <= host and runner.held_bytes <= memory
    assert all(x.is_pinned() for x in [*carrier.held.values(), *carrier.reader.slots])
    found = [streamed.run_flat([ids[i % 3]])[0] for i in range(9)]
    for i, x in enumerate(found):
        assert torch.equal(x, expected[i % 3])
    assert carrier.lower.brought >= 9 * below.bytes_per_pass
    streamed.close()
